"""What makes scores of products: one number for all rows of a work tile, or of 8-bit queries one a row.

A score scale is above 0, so that masked scores, which are -inf, stay so. The signs, zeros and NaN of scales are in the
copies that other kernels make of keys or queries. fp8 queries are read where they lie: their rows take up what is not
above 0 in shared memory, which a warpgroup looks for once in a work tile, and finds in calls that few make.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from swath.backends.device.quant import SMALLEST_FACTOR, head_scale, score_factor
from swath.backends.gluon.compat import reinterpret
from swath.backends.gluon.pipeline import CONSUMER_ROWS
from swath.backends.gluon.scheduler import tile_kv_head
from swath.backends.hopper.epilogue import q_heads, store_layout


class ScoreScales(NamedTuple):
    """What scores are scaled by."""

    scale_log2: gl.tensor  # > 0: to base 2, or to units of the soft cap
    cap_log2: gl.tensor
    k_scale: gl.tensor  # of 8-bit keys that are multiplied, or were copied, without it
    q_scale: gl.tensor  # of 8-bit query rows; of int8 ones it is all that theirs and K's scales are


@gluon.jit
def score_scale(i, work, WG: gl.constexpr, scales, C: gl.constexpr):
    """The score scale of a warpgroup's rows ``i`` [M]: a number, or (``F.row_scales``) one a row; of fp8 queries one
    that need not be above 0."""
    # After the last work tile there is no such head.
    kv_head = gl.minimum(tile_kv_head(work, C), C.F.kv_heads - 1)
    if C.F.dots == "":
        return score_factor(scales.scale_log2, scales.k_scale, kv_head, C.F)
    elif C.F.dots == "int8":
        return scale_of_rows(i, work, WG, scales, C)
    else:
        factor = scales.scale_log2 * head_scale(scales.k_scale, kv_head, False, C.F)
        if C.F.q_scale == "row":
            factor *= scale_of_rows(i, work, WG, scales, C)
        elif C.F.q_scale == "tensor":
            factor *= gl.load(scales.q_scale)
        return factor


@gluon.jit
def scale_of_rows(i, work, WG: gl.constexpr, scales, C: gl.constexpr):
    """``q_scale`` of a warpgroup's rows ``i`` [M]; 1 past those of the sequence."""
    q_index = work.q_begin + WG * (CONSUMER_ROWS // C.pack) + i // C.pack
    at = (work.q_row + q_index) * (C.F.kv_heads * C.F.group) + q_heads(i, work.head, C)
    return gl.load(scales.q_scale + at, mask=q_index < work.q_len, other=1.0)


@gluon.jit
def is_signed(scale, C: gl.constexpr):
    """Whether a score scale of fp8 queries, a number or [M], is somewhere not above 0; of others ()."""
    if C.F.dots != "e4m3":
        return ()
    elif C.F.q_scale == "row":
        return gl.max(gl.where(scale > 0, 0, 1), 0) != 0
    else:
        return (scale > 0) == 0


@gluon.jit
def positive_scale(scale, signed, q, C: gl.constexpr):
    """The score scale above 0, once the rows of fp8 queries, the tile q in blocks of columns, have what is not."""
    if signed:
        for block in gl.static_range(len(q)):
            take_up_sign(q[block], scale, C)
        fence_async_shared()
    return gl.where(scale == scale, gl.maximum(gl.abs(scale), SMALLEST_FACTOR), float("inf"))


@gluon.jit
def take_up_sign(block, scale, C: gl.constexpr):
    """Bytes of fp8 rows [M, columns] in shared memory, two at once, times the sign of their scale: NaN of NaN."""
    PAIRS: gl.constexpr = block.shape[1] // 2
    LAYOUT: gl.constexpr = store_layout(PAIRS)
    pairs = reinterpret(
        block, gl.int16, [CONSUMER_ROWS, PAIRS],
        gl.NVMMASharedLayout.get_default_for([CONSUMER_ROWS.value, PAIRS], gl.int16),
    )  # fmt: skip
    if C.F.row_scales:
        scale = gl.convert_layout(scale, gl.SliceLayout(1, LAYOUT))[:, None]
    x = pairs.load(LAYOUT)
    x = gl.where(scale < 0, x ^ -0x7F80, x)
    x = gl.where(scale == 0, 0, x)
    pairs.store(gl.where(scale == scale, x, 0x7F7F))
