"""The inner loop that tiles and splits share: query rows over a run of key tiles.

The rows of a program see the keys ``[0, lead)`` and ``[left, right)`` between them (a ``Band``). These are laid end to
end as one list, and the list is cut into key tiles: so a few leading tokens share a tile with the first of the window.
No key is in two tiles, and no tile is without a key that some row sees. A place in the list is called x here, and the
position of the key in its sequence pos.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

from swath.backends.device.cache import is_live, load_entries, load_rows, locate, page_ids, slot_offset
from swath.backends.device.quant import decode, relative, round_half_even, unpack_pair
from swath.backends.device.softmax import FLOOR, lazy_softmax, online_softmax, soft_cap
from swath.backends.device.window import Reach, interior_of, seen_by_some, visible

BEYOND = tl.constexpr(0x7FFFFFFF)
"""A place after every key that a row may see. Keys of dead pages are put there, so that the mask hides them."""


class Walk(NamedTuple):
    """The list of keys: ``lead`` of them from key 0 on, then those of the band, whose positions are ``gap`` further on.

    total: key tiles of the list.
    """

    lead: tl.tensor
    gap: tl.tensor
    total: tl.tensor


class Query(NamedTuple):
    """Query rows as dot operands, with what makes scores of their products, and which keys they see."""

    q: tl.tensor  # [BLOCK_M, columns]; the even columns where 8-bit keys are read as pairs
    q_odd: tl.tensor  # the odd columns then, else q again
    scale: tl.tensor  # > 0, [BLOCK_M] (unit_q) or a number: dots to scores, in base 2 or in units of the soft cap
    reach: tl.tensor  # a Reach in places of the list


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
    """The list of a band's keys: leading tokens in whole ``unit``s, then the others from a multiple of ``align`` on."""
    lead = tl.cdiv(band.lead, unit) * unit
    origin = tl.maximum(band.left // align * align, lead)
    return Walk(lead, origin - lead, tl.cdiv(tl.maximum(band.right - origin, 0) + lead, BLOCK_N))


@triton.jit
def key_at(x, walk, F: tl.constexpr):
    """The position of the ``x``-th key of the list."""
    if F.lead != "":
        return x + tl.where(x < walk.lead, 0, walk.gap)
    else:
        return x + walk.gap


@triton.jit
def reach_in_list(reach, walk):
    """A reach as places of the list, not positions. Where there is a gap, every row's window begins behind it."""
    return Reach(reach.low - walk.gap, reach.end - walk.gap, reach.lead)


@triton.jit
def seen_by_any(pos, band):
    """Which key positions some row of the program sees."""
    return (pos < band.lead) | ((pos >= band.left) & (pos < band.right))


@triton.jit
def interior_tiles(start, stop, walk, BLOCK_N: tl.constexpr):
    """Tiles ``begin .. end - 1`` of the list that need no mask where every row sees the keys ``start .. stop - 1``."""
    begin = tl.minimum(tl.cdiv(tl.maximum(start - walk.gap, walk.lead), BLOCK_N), walk.total)
    end = tl.maximum(stop - walk.gap, 0) // BLOCK_N
    return begin, tl.maximum(tl.minimum(end, walk.total), begin)


ENTRIES_AT_ONCE = tl.constexpr(256)
"""Entries of a page table that are looked at together."""


@triton.jit
def unmasked_tiles(keys, band, walk, rows, first_tile, end_tile, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles ``begin .. end - 1`` of the run ``first_tile .. end_tile - 1`` that need no mask.

    They are the interior ones, if all of their pages are live; otherwise there are none.
    """
    start, stop = interior_of(band, rows, F)
    begin, end = interior_tiles(start, stop, walk, BLOCK_N)
    begin = tl.minimum(tl.maximum(begin, first_tile), end_tile)
    end = tl.maximum(tl.minimum(end, end_tile), begin)
    if F.page_size > 0:
        end_page = tl.cdiv(end * BLOCK_N + walk.gap, F.page_size)
        page = tl.where(begin < end, (begin * BLOCK_N + walk.gap) // F.page_size, end_page)
        for entry in tl.range(page, end_page, ENTRIES_AT_ONCE, num_stages=1):
            entries = entry + tl.arange(0, ENTRIES_AT_ONCE)
            dead = is_live(keys, load_entries(keys.table, entries, entries < end_page, 0, F), F) == 0
            end = tl.where(tl.max(dead.to(tl.int32), 0) > 0, begin, end)
    return begin, end


@triton.jit
def mma(a, b, acc, F: tl.constexpr):
    """a @ b + acc, in IEEE arithmetic for float32.

    The interpreter's dot computes garbage for 16-bit operands, so that it gets float32.
    """
    if F.interpret:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(query, k, k_scale, cap_log2, F: tl.constexpr):
    """q @ k^T [BLOCK_M, BLOCK_N] for stored keys ``k`` [BLOCK_N, columns], and the scale(s) that make it base-2."""
    BLOCK_M: tl.constexpr = query.q.shape[0]
    BLOCK_N: tl.constexpr = k.shape[0]
    if F.compute_int8:
        s = tl.dot(query.q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    else:
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if F.pairs:
            kt = tl.trans(k)  # [columns, BLOCK_N]
            s = mma(query.q, unpack_pair(kt, False, F), s, F)
            s = mma(query.q_odd, unpack_pair(kt, True, F), s, F)
        else:
            s = mma(query.q, tl.trans(decode(k, F)), s, F)
    scale = query.scale
    if F.k_fold == "token":
        s *= k_scale[None, :]
    if F.softcap:
        s = soft_cap(s * (scale[:, None] if F.unit_q else scale), cap_log2)
        scale = 1.0
    return s, scale


@triton.jit
def accumulate(p, v, factor, acc, acc_odd, F: tl.constexpr):
    """acc += factor * (p @ v) for p [BLOCK_M, BLOCK_N] and stored values ``v`` [BLOCK_N, columns].

    Where pairs are read, ``acc`` has the even columns and ``acc_odd`` the odd ones.
    """
    if F.compute_int8:
        acc += tl.dot(round_half_even(p * 127.0).to(tl.int8), v, out_dtype=tl.int32).to(tl.float32) * (1.0 / 127.0)
    elif F.pairs:
        if F.v_fold == "token":
            zero = tl.zeros(acc.shape, tl.float32)
            p = p.to(tl.float16)
            acc += factor * tl.dot(p, unpack_pair(v, False, F), zero)
            acc_odd += factor * tl.dot(p, unpack_pair(v, True, F), zero)
        else:
            p = p.to(tl.float16)
            acc = tl.dot(p, unpack_pair(v, False, F), acc)
            acc_odd = tl.dot(p, unpack_pair(v, True, F), acc_odd)
    else:
        values = decode(v, F)
        if F.v_fold == "token":
            acc += factor * mma(p.to(values.dtype), values, tl.zeros(acc.shape, tl.float32), F)
        else:
            acc = mma(p.to(values.dtype), values, acc, F)
    return acc, acc_odd


@triton.jit
def new_state(BLOCK_M: tl.constexpr, F: tl.constexpr):
    """The state of rows before any key: m, l [BLOCK_M] and acc, acc_odd [BLOCK_M, columns]."""
    BLOCK_DV: tl.constexpr = F.block_dv
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    return tl.full((BLOCK_M,), FLOOR, tl.float32), tl.zeros((BLOCK_M,), tl.float32), acc, acc


@triton.jit
def new_column_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """An l of 0 that is kept as sums of every C-th column, [BLOCK_M, C], for programs whose warps share the rows.

    Each warp has 8 columns of scores in a row: warp 0 the columns 0 to 7, C to C + 7, 2 C to 2 C + 7 and so on, where C
    is 8 times the number of warps. So each thread adds up its own columns, and no warp waits for the sums of another.
    """
    SIDE_BY_SIDE: tl.constexpr = 8 if F.interpret else 8 * num_warps()
    COLUMNS: tl.constexpr = SIDE_BY_SIDE if SIDE_BY_SIDE < BLOCK_N else BLOCK_N
    return tl.zeros((BLOCK_M, COLUMNS), tl.float32)


@triton.jit
def tile_at(i, skip, skipped):
    """Which tile of the list is the ``i``-th of a run that leaves ``skipped`` tiles out from the ``skip``-th on."""
    return i + tl.where(i >= skip, skipped, 0)


@triton.jit
def tile_pages(keys, band, walk, i, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page-table entries of the keys of tile ``i`` of the list, [BLOCK_N]."""
    pos = key_at(i * BLOCK_N + tl.arange(0, BLOCK_N), walk, F)
    return page_ids(keys, pos, seen_by_any(pos, band), F)


@triton.jit
def attend(
    state, page, query, keys, scales, band, cap_log2, walk, first_tile, end_tile, skip, skipped, apart,
    F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, APART: tl.constexpr = False,
):  # fmt: skip
    """Take key tiles ``first_tile .. end_tile - 1`` into the state of query rows; see ``tile_at`` for ``skip``.

    ``page``: the ``tile_pages`` of the first one, which callers ask for before they wait for anything else.
    Without ``MASKED`` every row sees every key of these tiles, and their pages are live. ``APART``: some keys are
    seen by no row (see ``apart``); they are not loaded.

    For each tile: s = scale * q @ k^T, p = exp2(s - m), l += sum of p, acc += p @ v. Where the maximum m of a row
    grows, its l and acc are multiplied by exp2(m_old - m_new) first.
    """
    BY_ROW: tl.constexpr = F.unit_q and not F.softcap
    BLOCK_D: tl.constexpr = F.block_d
    BLOCK_DV: tl.constexpr = F.block_dv
    m, l, acc, acc_odd = state  # [BLOCK_M], [BLOCK_M] or [BLOCK_M, C], [BLOCK_M, BLOCK_DV] twice
    # Over pairs, where threads keep sums of their own: maxima are then all that warps exchange by row.
    LAZY: tl.constexpr = F.pairs and len(l.shape) == 2
    n = tl.arange(0, BLOCK_N)
    column, v_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for i in tl.range(first_tile, end_tile, num_stages=STAGES):
        x = tile_at(i, skip, skipped) * BLOCK_N + n  # [BLOCK_N]
        pos = key_at(x, walk, F)
        k_row, v_row = locate(keys, pos, page, F)  # [BLOCK_N]
        live = is_live(keys, page, F)
        x = tl.where(live, x, BEYOND)
        if APART:
            live = live & seen_by_some(pos, apart, F)
        k_scale, v_scale = load_token_scales(scales, page, pos, live, F)  # [BLOCK_N]
        # Asked again as [BLOCK_N, 1]: page numbers are then brought into the layout of rows once, and no predicates.
        live_rows = is_live(keys, page[:, None], F)
        if APART:
            live_rows = live_rows & live[:, None]
        # The next tile's entries are loaded before this tile's rows: the pipeliner would spend a stage on them.
        ahead = key_at(tile_at(i + 1, skip, skipped) * BLOCK_N + n, walk, F)
        # Not one scalar for all: the interpreter would broadcast it as int32, which is no mask in Triton 3.9.
        more = tl.full((BLOCK_N,), i + 1, tl.int32) < end_tile
        page = page_ids(keys, ahead, seen_by_any(ahead, band) & more, F)
        k = load_rows(keys.k, k_row, column, live_rows, F.stored_dim, not MASKED)  # [BLOCK_N, BLOCK_D]
        s, scale = scores(query, k, k_scale, cap_log2, F)  # [BLOCK_M, BLOCK_N]
        factor = 1.0
        if F.v_fold == "token":
            v_scale, factor = relative(v_scale)
        if MASKED:
            reach = query.reach
            seen = visible(x[None, :], reach.low[:, None], reach.end[:, None], reach.lead[:, None], F)
            s = tl.where(seen, s, float("-inf"))
        if LAZY:
            p, m, l, acc, acc_odd = lazy_softmax(s, scale, m, l, acc, acc_odd, BY_ROW)  # p: [BLOCK_M, BLOCK_N]
        else:
            p, m, l, alpha = online_softmax(s, scale, m, l, BY_ROW)  # p: [BLOCK_M, BLOCK_N], alpha: [BLOCK_M]
            acc *= alpha[:, None]
            if F.pairs:
                acc_odd *= alpha[:, None]
        v = load_rows(keys.v, v_row, v_column, live_rows, F.stored_v_dim, not MASKED)  # [BLOCK_N, BLOCK_DV]
        if F.v_fold == "token":
            p *= v_scale[None, :]
        acc, acc_odd = accumulate(p, v, factor, acc, acc_odd, F)
    return m, l, acc, acc_odd


@triton.jit
def attend_masked(
    state, page, query, keys, scales, band, cap_log2, walk, first_tile, end_tile, skip, skipped, apart,
    F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``attend`` with a mask; ``apart``: the keys that rows leave out between theirs, an ``Apart``."""
    together = end_tile
    if F.bounds:
        together = tl.where(apart.some, first_tile, end_tile)
    state = attend(
        state, page, query, keys, scales, band, cap_log2,
        walk, first_tile, together, skip, skipped, apart, F, BLOCK_N, STAGES, MASKED=True,
    )  # fmt: skip
    if F.bounds:  # rows that are apart have a loop of their own: no loop with another one in it is pipelined
        state = attend(
            state, page, query, keys, scales, band, cap_log2,
            walk, together, end_tile, skip, skipped, apart, F, BLOCK_N, 1, MASKED=True, APART=True,
        )  # fmt: skip
    return state


@triton.jit
def attend_unmasked_first(
    state, page, query, keys, scales, band, cap_log2, walk, first_tile, end_tile, unmasked, unmasked_end, apart,
    F: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``attend`` over the tiles ``unmasked .. unmasked_end - 1`` without a mask, then over the others with one.

    The order of keys is free in an online softmax. ``page``: the ``tile_pages`` of tile ``unmasked``.
    """
    state = attend(
        state, page, query, keys, scales, band, cap_log2,
        walk, unmasked, unmasked_end, unmasked_end, 0, apart, F, BLOCK_N, STAGES, MASKED=False,
    )  # fmt: skip
    page = tile_pages(keys, band, walk, tl.where(unmasked > first_tile, first_tile, unmasked_end), F, BLOCK_N)
    num_unmasked = unmasked_end - unmasked
    return attend_masked(
        state, page, query, keys, scales, band, cap_log2,
        walk, first_tile, end_tile - num_unmasked, unmasked, num_unmasked, apart, F, BLOCK_N, STAGES,
    )  # fmt: skip


@triton.jit
def load_token_scales(scales, page, pos, live, F: tl.constexpr):
    """Token scales [BLOCK_N] of K and V at ``pos``, 0 where not live; 1.0 for other granularities."""
    k_scale, v_scale = 1.0, 1.0
    if F.k_fold == "token":
        at = slot_offset(pos, page, scales.k_page, scales.k_token, F)
        k_scale = tl.load(scales.k + at, mask=live, other=0.0).to(tl.float32)
    if F.v_fold == "token":
        at = slot_offset(pos, page, scales.v_page, scales.v_token, F)
        v_scale = tl.load(scales.v + at, mask=live, other=0.0).to(tl.float32)
    return k_scale, v_scale
