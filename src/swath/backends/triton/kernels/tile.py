"""Tiles: prefill. A program owns a tile of query rows and walks every key that some of them see.

Rows are positions, or positions x the heads of one kv head (``PACK``) where that shortens the range of keys. The tiles
of a ragged batch form one flat list: sequence b starts at slot ``cu[b] // POSITIONS + b``, which leaves each sequence
room enough (the trick is known from vLLM's unified kernel); a slot without rows returns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.cache import Keys, table_row
from swath.backends.device.window import band_of, reach_of, view_of
from swath.backends.triton.kernels.query import (
    first_token,
    join_columns,
    keys_within,
    leading_of,
    load_query,
    q_head_of,
    query_scale,
    row_offsets,
    sequence_of,
    store_rows,
    takes,
    token_scales,
)
from swath.backends.triton.kernels.walk import attend_clear_first, clear_tiles, listed, new_state, plan_walk, tile_pages


@triton.jit
def sequence_at(slot, cu_q, num_seqs, steps, POSITIONS: tl.constexpr):
    """The sequence that owns a slot of the flat tile list, and its first slot, which may be a later one.

    ``steps``: query tokens of each sequence, or (with cu_q) of all.
    """
    if cu_q is None:
        each = tl.cdiv(steps, POSITIONS)
        return slot // each, slot // each * each
    else:
        return search_sequence(slot, cu_q, num_seqs, steps, POSITIONS)


@triton.jit
def search_sequence(slot, cu_q, num_seqs, num_tokens, POSITIONS: tl.constexpr):
    """The same for a ragged batch: the last sequence that begins at or before the slot."""
    low, high = slot * 0, num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = first_slot_of(middle, cu_q, num_tokens, POSITIONS)
        low = tl.where(begins <= slot, middle, low)
        high = tl.where(begins <= slot, high, middle - 1)
    return low, first_slot_of(low, cu_q, num_tokens, POSITIONS)


@triton.jit
def first_slot_of(b, cu_q, num_tokens, POSITIONS: tl.constexpr):
    """Where the slots of a sequence of a ragged batch begin."""
    return first_token(b, cu_q, num_tokens) // POSITIONS + b


@triton.jit
def slots_of(b, first_slot, cu_q, steps, POSITIONS: tl.constexpr):
    """How many slots of the flat list a sequence has; after those of the last one some may be left, of no sequence."""
    if cu_q is None:
        return tl.cdiv(steps, POSITIONS)
    else:
        return first_slot_of(b + 1, cu_q, steps, POSITIONS) - first_slot


RUN_TIME = ("leading", "size", "steps", "claimed", "num_seqs", "max_pages", "num_pages", "table_stride")


@triton.jit(do_not_specialize=RUN_TIME)
def tile_kernel(
    q, k, v, out, lse, sink, q_scale, k_scale, v_scale, table, indptr, lens, cu_q, q_start, leading,
    scale_log2, cap_log2, size, steps, claimed, num_seqs, max_pages, num_pages,
    q_seq, q_token, q_head, out_seq, out_token, out_head, k_page, k_head, k_token, v_page, v_head, v_token,
    table_stride, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token,
    F: tl.constexpr, BLOCK_M: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (slot, head of the row tile), heads fastest, the last slots (most keys) first.

    Those of sequences that the launch does not take (``claimed``) return.
    """
    POSITIONS: tl.constexpr = BLOCK_M // PACK
    HEADS: tl.constexpr = F.kv_heads * F.group // PACK
    head = tl.program_id(0) % HEADS
    slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS
    b, first_slot = sequence_at(slot, cu_q, num_seqs, steps, POSITIONS)
    seq = sequence_of(b, cu_q, steps, steps, lens, q_start, F)
    begin = (slot - first_slot) * POSITIONS
    if (begin < 0) | (begin >= seq.q_len) | (takes(b, seq.q_len, claimed) == 0):
        return
    i = tl.arange(0, BLOCK_M)
    step = begin + i // PACK
    valid = step < seq.q_len
    if PACK > 1:
        kv_head = head
        member = q_head_of(kv_head, i % PACK, F)
    else:
        kv_head = head // F.group
        member = q_head_of(kv_head, head % F.group + i * 0, F)
    entries, pages = table, max_pages
    if F.page_size > 0:
        entries, pages = table_row(table, indptr, b, table_stride, max_pages)
    kv_len = keys_within(seq, pages, F)
    view = view_of(seq.start, seq.q_len, kv_len, size)
    first = view.start + begin
    last = view.start + tl.minimum(begin + POSITIONS, seq.q_len) - 1
    lead = leading_of(b, leading, F)
    band = band_of(first, last, kv_len, view.size, lead, F)
    walk = plan_walk(band, 1, 1, BLOCK_N)
    token = seq.token + step
    at = row_offsets(b, step, token, member, q_seq, q_token, q_head, cu_q)
    row_scale = query_scale(q_scale, token * F.kv_heads * F.group + member, valid, F)
    reach = listed(reach_of(view.start + step, band, view.size, lead, F), walk)
    query = load_query(q, at, valid, row_scale, k_scale, kv_head, scale_log2, reach, F)
    key_row = seq.key_row.to(tl.int64)
    k += kv_head.to(tl.int64) * k_head + key_row * k_token
    v += kv_head.to(tl.int64) * v_head + key_row * v_token
    keys = Keys(k, v, entries, num_pages, k_page, k_token, v_page, v_token)
    scales = token_scales(k_scale, v_scale, kv_head, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token, F)
    begin, end = clear_tiles(keys, band, walk, first, last, view.size, 0, walk.total, F, BLOCK_N)
    page = tile_pages(keys, band, walk, begin, F, BLOCK_N)
    m, l, acc, acc_odd = attend_clear_first(
        new_state(BLOCK_M, F), page, query, keys, scales, band, cap_log2,
        walk, 0, walk.total, begin, end, F, BLOCK_N, STAGES,
    )  # fmt: skip
    acc, column = join_columns(acc, acc_odd, v_scale, kv_head, F)
    at = row_offsets(b, step, token, member, out_seq, out_token, out_head, cu_q)
    store_rows(out, lse, sink, at, token, member, valid, m, l, acc, column, F)
