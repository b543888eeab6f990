"""Query rows in 8 bits: as a caller asks for them, and as they multiply with int8 keys, all scales in one a row."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.quant import encode_e4m3, own_scale
from swath.backends.triton.kernels.query import kv_head_of, load_unit_rows


@triton.jit(do_not_specialize=("steps", "num_rows"))
def quantise_kernel(
    q, new_q, new_q_scale, k_scale, scale_log2, steps, num_rows, q_seq, q_token, q_head, F: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program per (``ROWS`` query tokens, query head), heads fastest: new_q [.., Hq, D], new_q_scale [.., Hq].

    The scales are all that makes base-2 scores of products, as in ``load_unit_rows``. ``steps``: query tokens of each
    sequence, or (of a ragged batch) all of them, of which there are ``num_rows``.
    """
    HEADS: tl.constexpr = F.kv_heads * F.group
    head = tl.program_id(0) % HEADS
    row = tl.program_id(0) // HEADS * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    kv_head = kv_head_of(head, F)
    at = (row // steps).to(tl.int64) * q_seq + (row % steps).to(tl.int64) * q_token + head.to(tl.int64) * q_head
    new_row = row.to(tl.int64) * HEADS + head
    column = tl.arange(0, F.block_d)
    mask = valid[:, None] & (column < F.head_dim)[None, :]
    x, _, factor = load_unit_rows(q, at, valid, 1.0, k_scale, kv_head, scale_log2, F)
    tl.store(new_q + new_row[:, None] * F.head_dim + column[None, :], x, mask=mask)
    tl.store(new_q_scale + new_row, factor, mask=valid)


@triton.jit(do_not_specialize=("num_rows", "steps"))
def quantise_q_kernel(
    q, scale, out, q_scale, num_rows, steps, q_seq, q_token, q_head, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One program per ``ROWS`` rows (token, head), heads fastest: out [.., Hq, D] in e4m3, and q_scale [.., Hq].

    ``scale``: the static one, which q_scale [] then is too, or None for one a row. ``steps``: query tokens of each
    sequence, or of all.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    token, head = row // HEADS, row % HEADS
    at = (token // steps).to(tl.int64) * q_seq + (token % steps).to(tl.int64) * q_token + head.to(tl.int64) * q_head
    column = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (column < D)[None, :]
    x = tl.load(q + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if scale is None:
        unit = own_scale(tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1), LARGEST)
        tl.store(q_scale + row, unit, mask=valid)
        x = tl.div_rn(x, unit[:, None])
    else:
        given = tl.load(scale)
        if tl.program_id(0) == 0:
            tl.store(q_scale, given)
        x = tl.div_rn(x, tl.where(given != 0, given, 1.0))
    to = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + to, encode_e4m3(x, HARDWARE), mask=mask)
