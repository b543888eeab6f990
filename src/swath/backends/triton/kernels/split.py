"""Splits, for decode of one or a few tokens: a program owns rows of one kv head and a slice of their keys.

The rows are the query tokens of a sequence times the heads of the kv head's group. Their partial states (m, l, acc) are
kept in float32 and joined by reduce.py; where all keys are in one slice, the program writes the result itself. With
``split_size`` slices end at its multiples, so that a row's bits depend neither on the batch nor on the bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from swath.backends.device.cache import Keys, table_row, v_offset
from swath.backends.device.window import apart_of, band_of, reach_of, rows_of, view_of
from swath.backends.triton.kernels.query import (
    join_columns,
    keys_within,
    lead_of,
    load_query,
    q_head_of,
    query_scale,
    row_offsets,
    sequence_of,
    states_of,
    store_output,
    token_scales,
)
from swath.backends.triton.kernels.walk import (
    attend_masked,
    attend_unmasked_first,
    new_column_sums,
    new_state,
    plan_walk,
    reach_in_list,
    tile_pages,
    unmasked_tiles,
)


class TileSlice(NamedTuple):
    """A program's slice of the key tiles: ``first .. end - 1``. ``count``: how many slices there are."""

    first: tl.tensor
    end: tl.tensor
    count: tl.tensor


@triton.jit
def slice_of(j, walk, num_splits, least_tiles, slice_tiles, BLOCK_N: tl.constexpr):
    """Slice ``j`` of the key tiles of a walk.

    Slices are even, at most ``num_splits`` and of ``least_tiles`` or more. If ``slice_tiles`` > 0 they end at multiples
    of that many tiles of the sequence instead, wherever the window begins.
    """
    if slice_tiles == 0:
        each = tl.maximum(tl.cdiv(walk.total, num_splits), least_tiles)
        first = tl.minimum(j * each, walk.total)
        return TileSlice(first, tl.minimum(first + each, walk.total), tl.cdiv(walk.total, each))
    # The list of keys is in whole tiles then: num_lead of leading tokens, then num_band from tile ``origin`` on.
    num_lead = walk.lead // BLOCK_N
    origin = num_lead + walk.gap // BLOCK_N
    lead_slices = tl.cdiv(num_lead, slice_tiles)
    band_slice = tl.maximum(origin // slice_tiles, lead_slices)
    num_band = walk.total - num_lead
    band_end = tl.maximum(tl.cdiv(origin + num_band, slice_tiles), band_slice)
    cut = tl.where(j < lead_slices, j, band_slice + j - lead_slices) * slice_tiles
    # Tiles of the list that are before a cut: of leading tokens, then of the band.
    first = tl.minimum(cut, num_lead) + tl.minimum(tl.maximum(cut - origin, 0), num_band)
    cut += slice_tiles
    end = tl.minimum(cut, num_lead) + tl.minimum(tl.maximum(cut - origin, 0), num_band)
    count = lead_slices + tl.where(num_band > 0, band_end - band_slice, 0)
    return TileSlice(first, end, tl.where(num_band > 0, count, lead_slices))


RUN_TIME = (
    "lead",
    "window",
    "steps",
    "num_tokens",
    "num_splits",
    "least_tiles",
    "slice_tiles",
    "table_width",
    "num_pages",
    "table_stride",
)


@triton.jit(do_not_specialize=RUN_TIME)
def split_kernel(
    q, k, v, out, lse, partial, counts, sink, q_scale, k_scale, v_scale,
    table, table_index, lens, cu_q, q_start, lead,
    scale_log2, cap_log2, window, steps, num_tokens, num_splits, least_tiles, slice_tiles, table_width, num_pages,
    q_seq, q_token, q_head, out_seq, out_token, out_head, kv_page, kv_head_stride, kv_token, table_stride,
    ks_page, ks_head, ks_token, vs_page, vs_head, vs_token,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, row tile, kv head, slice), slices fastest.

    ``steps``: query tokens of each sequence, or (with cu_q) the most that this schedule claims; others return.
    ``window``: its size, or the bounds of rows. ``partial``: acc of all rows of all slices, then m and l of each.
    """
    # Programs over 8-bit keys are limited by instructions, of which masks and maxima are a part: 8 steps over int8 take
    # 13 % less time so. Others wait for memory, and a second run of tiles begins with a wait.
    UNMASKED_FIRST: tl.constexpr = F.pairs
    j = tl.program_id(0) % num_splits
    owner = tl.program_id(0) // num_splits  # the (sequence, row tile, kv head)
    row_tiles = tl.cdiv(steps * F.group, BLOCK_M)
    kv_head = owner % F.kv_heads
    row_tile = owner // F.kv_heads % row_tiles
    b = owner // F.kv_heads // row_tiles
    if F.pdl and partial is not None:
        gdc_launch_dependents()
    seq = sequence_of(b, cu_q, steps, num_tokens, lens, q_start, F)
    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # rows: query token r // group, member r % group of the group
    num_rows = tl.where(seq.q_len > steps, 0, seq.q_len * F.group)
    if row_tile * BLOCK_M >= num_rows:
        if partial is not None and j == 0:
            tl.store(counts + owner, 0)
        return
    entries, pages = table_row(table, table_index, b, table_stride, table_width, F)
    kv_len = keys_within(seq, pages, F)
    view = view_of(seq, kv_len, window, F)
    first = view.start + row_tile * BLOCK_M // F.group
    last = view.start + (tl.minimum((row_tile + 1) * BLOCK_M, num_rows) - 1) // F.group
    lead = lead_of(b, lead, F)
    rows = rows_of(first, last, view.start + r // F.group, view, kv_len, F)
    band = band_of(rows, kv_len, lead, F)
    apart = apart_of(view.start + r // F.group, rows, band, kv_len, lead, F)
    align = tl.where(slice_tiles > 0, BLOCK_N, 1)
    walk = plan_walk(band, align, align, BLOCK_N)
    key_slice = slice_of(j, walk, num_splits, least_tiles, slice_tiles, BLOCK_N)
    if partial is not None:
        if j == 0:
            tl.store(counts + owner, key_slice.count)
        if j >= tl.maximum(key_slice.count, 1):
            return
    base = kv_head.to(tl.int64) * kv_head_stride
    v_base = v_offset(base, 0, kv_head.to(tl.int64), 0, F)
    keys = Keys(k + base, v + v_base, entries, num_pages, kv_page, kv_token, kv_token)
    unmasked, unmasked_end = key_slice.first, key_slice.end
    if UNMASKED_FIRST:
        unmasked, unmasked_end = unmasked_tiles(
            keys, band, walk, rows, key_slice.first, key_slice.end, F, BLOCK_N
        )  # fmt: skip
    page = tile_pages(keys, band, walk, unmasked, F, BLOCK_N)
    tl.debug_barrier()  # or ptxas asks for the pages only when the query is there: one more trip to memory before K
    q_heads = q_head_of(kv_head, r % F.group, F)
    q_row = seq.q_row + r // F.group
    valid = r < num_rows
    at = row_offsets(b, r // F.group, q_row, q_heads, q_seq, q_token, q_head, cu_q)
    row_scale = query_scale(q_scale, q_row * F.kv_heads * F.group + q_heads, valid, F)
    reach = reach_in_list(reach_of(view.start + r // F.group, rows, band, lead, F), walk)
    query = load_query(q, at, valid, row_scale, k_scale, kv_head, scale_log2, reach, F)
    scales = token_scales(k_scale, v_scale, kv_head, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token, F)
    m, l, acc, acc_odd = new_state(BLOCK_M, F)  # [BLOCK_M], [BLOCK_M], [BLOCK_M, columns] twice
    state = m, new_column_sums(BLOCK_M, BLOCK_N, F), acc, acc_odd  # l: [BLOCK_M, C]
    if UNMASKED_FIRST:
        m, l, acc, acc_odd = attend_unmasked_first(
            state, page, query, keys, scales, band, cap_log2,
            walk, key_slice.first, key_slice.end, unmasked, unmasked_end, apart, F, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        m, l, acc, acc_odd = attend_masked(
            state, page, query, keys, scales, band, cap_log2,
            walk, key_slice.first, key_slice.end, key_slice.end, 0, apart, F, BLOCK_N, STAGES,
        )  # fmt: skip
    l = tl.sum(l, 1)  # [BLOCK_M]
    acc, column = join_columns(acc, acc_odd, v_scale, kv_head, F)  # [BLOCK_M, Dv padded], [Dv padded]
    if partial is not None:
        if key_slice.count > 1:
            tile_rows = tl.minimum(steps * F.group, BLOCK_M)
            partial_row = (owner.to(tl.int64) * num_splits + j) * tile_rows + tl.arange(0, BLOCK_M)
            mask = valid[:, None] & (column < F.v_head_dim)[None, :]
            tl.store(partial + partial_row[:, None] * F.v_head_dim + column[None, :], acc, mask=mask)
            states = states_of(partial, tl.num_programs(0) * tile_rows, F) + 2 * partial_row
            tl.store(states, m, mask=valid)
            tl.store(states + 1, l, mask=valid)
            return
    at = row_offsets(b, r // F.group, q_row, q_heads, out_seq, out_token, out_head, cu_q)
    store_output(out, lse, sink, at, q_row, q_heads, valid, m, l, acc, column, F)
