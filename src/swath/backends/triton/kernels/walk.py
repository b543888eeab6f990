"""The inner loop that tiles and splits share: query rows over a run of key tiles.

The visible keys of a program, ``[0, lead)`` and ``[left, right)``, are laid end to end, and tiles cut from that list: a
few leading keys share a tile with the first of the band. No key is listed twice, and no tile is without visible keys.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

from swath.backends.device.cache import is_live, load_rows, locate, page_ids, slot_offset
from swath.backends.device.quant import decode, half_of_pair, relative, round_half_even
from swath.backends.device.softmax import FLOOR, lazy_step, soft_cap, step
from swath.backends.device.window import Reach, interior_of, visible

BEYOND = tl.constexpr(0x7FFFFFFF)
"""The place of a dead page's key, for the mask: after all that any row may see."""


class Walk(NamedTuple):
    """The list of keys: ``lead`` from key 0, then the band's, ``gap`` keys further on; ``total`` tiles in all."""

    lead: tl.tensor
    gap: tl.tensor
    total: tl.tensor


class Rows(NamedTuple):
    """Query rows as dot operands (even and odd columns where pairs are read, else the same), factors, reach."""

    q: tl.tensor
    q_odd: tl.tensor
    scale: tl.tensor  # > 0, [M] (unit_q) or scalar: makes scores of dots, in base 2 or in units of the soft cap
    reach: tl.tensor  # a Reach in places of the list: who sees whom


class TokenScales(NamedTuple):
    """Token scales of K and V at one kv head, and their strides."""

    k: tl.tensor
    v: tl.tensor
    k_page: tl.tensor
    k_token: tl.tensor
    v_page: tl.tensor
    v_token: tl.tensor


@triton.jit
def plan_walk(band, unit, align, BLOCK_N: tl.constexpr):
    """List the keys of a band: the leading ones in whole ``unit``s, the others from a multiple of ``align`` on."""
    lead = tl.cdiv(band.lead, unit) * unit
    origin = tl.maximum(band.left // align * align, lead)
    return Walk(lead, origin - lead, tl.cdiv(tl.maximum(band.right - origin, 0) + lead, BLOCK_N))


@triton.jit
def key_at(x, walk, F: tl.constexpr):
    """The ``x``-th key of the list."""
    if F.leading != "":
        return x + tl.where(x < walk.lead, 0, walk.gap)
    else:
        return x + walk.gap


@triton.jit
def listed(reach, walk):
    """A reach in places of the list. Where there is a gap, every row's window begins behind it."""
    return Reach(reach.low - walk.gap, reach.end - walk.gap, reach.lead)


@triton.jit
def seen_by_any(pos, band):
    """Which key positions some row of the program sees."""
    return (pos < band.lead) | ((pos >= band.left) & (pos < band.right))


@triton.jit
def interior_tiles(band, walk, first, last, size, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles ``begin .. end - 1`` of the list in which every row sees every key: they need no mask."""
    start, stop = interior_of(band, first, last, size, F)
    begin = tl.minimum(tl.cdiv(tl.maximum(start - walk.gap, walk.lead), BLOCK_N), walk.total)
    end = tl.maximum(stop - walk.gap, 0) // BLOCK_N
    return begin, tl.maximum(tl.minimum(end, walk.total), begin)


ENTRIES = tl.constexpr(256)
"""Of a page table, looked at together."""


@triton.jit
def clear_tiles(
    keys, band, walk, first, last, size, first_tile, end_tile, F: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Tiles ``begin .. end - 1`` of a run that need no mask: the interior ones, if all of their pages are live."""
    begin, end = interior_tiles(band, walk, first, last, size, F, BLOCK_N)
    begin = tl.minimum(tl.maximum(begin, first_tile), end_tile)
    end = tl.maximum(tl.minimum(end, end_tile), begin)
    if F.page_size > 0:
        end_page = tl.cdiv(end * BLOCK_N + walk.gap, F.page_size)
        page = tl.where(begin < end, (begin * BLOCK_N + walk.gap) // F.page_size, end_page)
        for entry in tl.range(page, end_page, ENTRIES, num_stages=1):
            entries = entry + tl.arange(0, ENTRIES)
            dead = is_live(keys, tl.load(keys.table + entries, mask=entries < end_page, other=0), F) == 0
            end = tl.where(tl.max(dead.to(tl.int32), 0) > 0, begin, end)
    return begin, end


@triton.jit
def mma(a, b, acc, F: tl.constexpr):
    """a @ b + acc; IEEE for float32. The interpreter's dot computes garbage for 16-bit operands, so it gets float32."""
    if F.interpret:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(rows, k, k_scale, cap_log2, F: tl.constexpr):
    """Scores [M, N] of the rows with stored keys ``k`` [N, columns], and the scale(s) that make them base-2."""
    BLOCK_M: tl.constexpr = rows.q.shape[0]
    BLOCK_N: tl.constexpr = k.shape[0]
    if F.compute_int8:
        s = tl.dot(rows.q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    else:
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if F.pairs:
            kt = tl.trans(k)
            s = mma(rows.q, half_of_pair(kt, False, F), s, F)
            s = mma(rows.q_odd, half_of_pair(kt, True, F), s, F)
        else:
            s = mma(rows.q, tl.trans(decode(k, F)), s, F)
    scale = rows.scale
    if F.k_fold == "token":
        s *= k_scale[None, :]
    if F.softcap:
        s = soft_cap(s * (scale[:, None] if F.unit_q else scale), cap_log2)
        scale = 1.0
    return s, scale


@triton.jit
def accumulate(p, v, factor, acc, acc_odd, F: tl.constexpr):
    """acc += factor * (p @ v): the even columns, and the odd ones where pairs are read."""
    if F.compute_int8:
        acc += tl.dot(round_half_even(p * 127.0).to(tl.int8), v, out_dtype=tl.int32).to(tl.float32) * (1.0 / 127.0)
    elif F.pairs:
        if F.v_fold == "token":
            zero = tl.zeros(acc.shape, tl.float32)
            p = p.to(tl.float16)
            acc += factor * tl.dot(p, half_of_pair(v, False, F), zero)
            acc_odd += factor * tl.dot(p, half_of_pair(v, True, F), zero)
        else:
            p = p.to(tl.float16)
            acc = tl.dot(p, half_of_pair(v, False, F), acc)
            acc_odd = tl.dot(p, half_of_pair(v, True, F), acc_odd)
    else:
        values = decode(v, F)
        if F.v_fold == "token":
            acc += factor * mma(p.to(values.dtype), values, tl.zeros(acc.shape, tl.float32), F)
        else:
            acc = mma(p.to(values.dtype), values, acc, F)
    return acc, acc_odd


@triton.jit
def new_state(BLOCK_M: tl.constexpr, F: tl.constexpr):
    """The state of rows that have seen nothing: m, l [M] and acc [M, columns] (even, odd)."""
    BLOCK_D: tl.constexpr = F.block_d
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return tl.full((BLOCK_M,), FLOOR, tl.float32), tl.zeros((BLOCK_M,), tl.float32), acc, acc


@triton.jit
def new_partial_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """An l of 0 for programs whose warps stand side by side along the keys, 8 columns each: ``step`` adds up a thread's
    own columns only, and warps need not wait for one another to exchange sums."""
    SIDE_BY_SIDE: tl.constexpr = 8 if F.interpret else 8 * num_warps()
    COLUMNS: tl.constexpr = SIDE_BY_SIDE if SIDE_BY_SIDE < BLOCK_N else BLOCK_N
    return tl.zeros((BLOCK_M, COLUMNS), tl.float32)


@triton.jit
def tile_at(i, skip, skipped):
    """Where tile ``i`` of a run stands in the list: those from ``skip`` on ``skipped`` later."""
    return i + tl.where(i >= skip, skipped, 0)


@triton.jit
def tile_pages(keys, band, walk, i, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """The table entries of tile ``i`` of the list."""
    pos = key_at(i * BLOCK_N + tl.arange(0, BLOCK_N), walk, F)
    return page_ids(keys, pos, seen_by_any(pos, band), F)


@triton.jit
def attend(
    state, page, rows, keys, scales, band, cap_log2, walk, first_tile, end_tile, skip, skipped,
    F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows over tiles ``first_tile .. end_tile - 1``; those from ``skip`` on stand ``skipped`` later in the list.

    ``page``: the ``tile_pages`` of the first one, which callers ask for before they wait for anything else.
    Without ``MASKED`` every row sees every key of these tiles, and their pages are live.
    """
    BY_ROW: tl.constexpr = F.unit_q and not F.softcap
    BLOCK_D: tl.constexpr = F.block_d
    m, l, acc, acc_odd = state
    # Over pairs, where threads keep sums of their own: maxima are then all that warps exchange by row.
    LAZY: tl.constexpr = F.pairs and len(l.shape) == 2
    n = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    for i in tl.range(first_tile, end_tile, num_stages=STAGES):
        x = tile_at(i, skip, skipped) * BLOCK_N + n
        pos = key_at(x, walk, F)
        k_row, v_row = locate(keys, pos, page, F)
        live = is_live(keys, page, F)
        x = tl.where(live, x, BEYOND)
        k_scale, v_scale = load_token_scales(scales, page, pos, live, F)
        # Rows ask their pages themselves: a layout then converts page numbers once, and no predicates.
        live_rows = is_live(keys, page[:, None], F)
        # The next tile's entries are asked for before this tile's rows: the pipeliner would spend a stage on them.
        ahead = key_at(tile_at(i + 1, skip, skipped) * BLOCK_N + n, walk, F)
        # Not one scalar for all: the interpreter would spread it as int32, which is no mask in Triton 3.9.
        more = tl.full((BLOCK_N,), i + 1, tl.int32) < end_tile
        page = page_ids(keys, ahead, seen_by_any(ahead, band) & more, F)
        k = load_rows(keys.k, k_row, column, live_rows, not MASKED, F)
        s, scale = scores(rows, k, k_scale, cap_log2, F)
        factor = 1.0
        if F.v_fold == "token":
            v_scale, factor = relative(v_scale)
        if MASKED:
            reach = rows.reach
            seen = visible(x[None, :], reach.low[:, None], reach.end[:, None], reach.lead[:, None], F)
            s = tl.where(seen, s, float("-inf"))
        if LAZY:
            p, m, l, acc, acc_odd = lazy_step(s, scale, m, l, acc, acc_odd, BY_ROW)
        else:
            p, m, l, alpha = step(s, scale, m, l, BY_ROW)
            acc *= alpha[:, None]
            if F.pairs:
                acc_odd *= alpha[:, None]
        v = load_rows(keys.v, v_row, column, live_rows, not MASKED, F)
        if F.v_fold == "token":
            p *= v_scale[None, :]
        acc, acc_odd = accumulate(p, v, factor, acc, acc_odd, F)
    return m, l, acc, acc_odd


@triton.jit
def attend_clear_first(
    state, page, rows, keys, scales, band, cap_log2, walk, first_tile, end_tile, begin, end,
    F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``attend`` over the ``clear_tiles`` ``begin .. end - 1`` first, then the others: the order of keys is free.

    ``page``: the ``tile_pages`` of tile ``begin``.
    """
    state = attend(
        state, page, rows, keys, scales, band, cap_log2,
        walk, begin, end, end, 0, F, BLOCK_N, STAGES, MASKED=False,
    )  # fmt: skip
    page = tile_pages(keys, band, walk, tl.where(begin > first_tile, first_tile, end), F, BLOCK_N)
    return attend(
        state, page, rows, keys, scales, band, cap_log2,
        walk, first_tile, end_tile - (end - begin), begin, end - begin, F, BLOCK_N, STAGES, MASKED=True,
    )  # fmt: skip


@triton.jit
def load_token_scales(scales, page, pos, live, F: tl.constexpr):
    """Token scales [N] of K and V at ``pos``, 0 where not live; a placeholder for other granularities."""
    k_scale, v_scale = 1.0, 1.0
    if F.k_fold == "token":
        at = slot_offset(pos, page, scales.k_page, scales.k_token, F)
        k_scale = tl.load(scales.k + at, mask=live, other=0.0).to(tl.float32)
    if F.v_fold == "token":
        at = slot_offset(pos, page, scales.v_page, scales.v_token, F)
        v_scale = tl.load(scales.v + at, mask=live, other=0.0).to(tl.float32)
    return k_scale, v_scale
