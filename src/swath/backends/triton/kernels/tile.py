"""Tiles, for prefill: a program owns a tile of query rows and walks over every key that some of them see.

The rows of a tile are query positions of one head, or (``PACK``) positions times the heads of one kv head, where that
shortens the range of keys. As in FlashAttention, the positions of a sequence are cut into m-blocks. All m-blocks of a
ragged batch form one flat list, in which those of sequence b begin at ``cu_q[b] // POSITIONS + b``: this leaves each
sequence room enough (the trick is known from vLLM's unified kernel). An m-block without rows returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.cache import Keys, table_row
from swath.backends.device.window import apart_of, band_of, reach_of, rows_of, view_of
from swath.backends.triton.kernels.query import (
    first_token,
    join_columns,
    keys_within,
    lead_of,
    load_query,
    q_head_of,
    query_scale,
    row_offsets,
    sequence_of,
    store_output,
    takes,
    token_scales,
)
from swath.backends.triton.kernels.walk import (
    attend_unmasked_first,
    new_state,
    plan_walk,
    reach_in_list,
    tile_pages,
    unmasked_tiles,
)


@triton.jit
def sequence_at(m_block, cu_q, num_seqs, steps, POSITIONS: tl.constexpr):
    """The sequence that has an m-block of the flat list, and its first m-block, which may be a later one.

    ``steps``: query tokens of each sequence, or (with cu_q) of all.
    """
    if cu_q is None:
        each = tl.cdiv(steps, POSITIONS)
        return m_block // each, m_block // each * each
    else:
        return search_sequence(m_block, cu_q, num_seqs, steps, POSITIONS)


@triton.jit
def search_sequence(m_block, cu_q, num_seqs, num_tokens, POSITIONS: tl.constexpr):
    """The same for a ragged batch: the last sequence whose first m-block is at or before this one."""
    low, high = m_block * 0, num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = first_m_block(middle, cu_q, num_tokens, POSITIONS)
        low = tl.where(first <= m_block, middle, low)
        high = tl.where(first <= m_block, high, middle - 1)
    return low, first_m_block(low, cu_q, num_tokens, POSITIONS)


@triton.jit
def first_m_block(b, cu_q, num_tokens, POSITIONS: tl.constexpr):
    """Where the m-blocks of a sequence of a ragged batch begin."""
    return first_token(b, cu_q, num_tokens) // POSITIONS + b


@triton.jit
def num_m_blocks(b, first, cu_q, steps, POSITIONS: tl.constexpr):
    """How many m-blocks the flat list has for a sequence, the first of them at ``first``. After those of the last
    sequence there may be more, which belong to none."""
    if cu_q is None:
        return tl.cdiv(steps, POSITIONS)
    else:
        return first_m_block(b + 1, cu_q, steps, POSITIONS) - first


RUN_TIME = ("lead", "window", "steps", "claimed", "num_seqs", "table_width", "num_pages", "table_stride")


@triton.jit(do_not_specialize=RUN_TIME)
def tile_kernel(
    q, k, v, out, lse, sink, q_scale, k_scale, v_scale, table, table_index, lens, cu_q, q_start, lead,
    scale_log2, cap_log2, window, steps, claimed, num_seqs, table_width, num_pages,
    q_seq, q_token, q_head, out_seq, out_token, out_head, k_page, k_head, k_token, v_head, v_token,
    table_stride, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token,
    F: tl.constexpr, BLOCK_M: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (m-block, head of the tile), heads fastest, the last m-blocks (most keys) first.

    Programs of sequences that the launch does not take (``claimed``) return. ``window``: its size, or bounds of rows.
    """
    POSITIONS: tl.constexpr = BLOCK_M // PACK
    HEADS: tl.constexpr = F.kv_heads * F.group // PACK
    head = tl.program_id(0) % HEADS
    m_block = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS
    b, first_block = sequence_at(m_block, cu_q, num_seqs, steps, POSITIONS)
    seq = sequence_of(b, cu_q, steps, steps, lens, q_start, F)
    q_begin = (m_block - first_block) * POSITIONS
    # Before the first sequence there may be rows that no sequence owns.
    if (q_begin < 0) | (q_begin >= seq.q_len) | (takes(b, seq.q_len, claimed) == 0):
        return
    i = tl.arange(0, BLOCK_M)
    q_index = q_begin + i // PACK  # [BLOCK_M]: query tokens of the sequence, counted from 0
    valid = q_index < seq.q_len
    if PACK > 1:
        kv_head = head
        q_heads = q_head_of(kv_head, i % PACK, F)
    else:
        kv_head = head // F.group
        q_heads = q_head_of(kv_head, head % F.group + i * 0, F)
    entries, pages = table, table_width
    if F.page_size > 0:
        entries, pages = table_row(table, table_index, b, table_stride, table_width, F)
    kv_len = keys_within(seq, pages, F)
    view = view_of(seq, kv_len, window, F)
    first = view.start + q_begin
    last = view.start + tl.minimum(q_begin + POSITIONS, seq.q_len) - 1
    lead = lead_of(b, lead, F)
    rows = rows_of(first, last, view.start + q_index, view, kv_len, F)
    band = band_of(rows, kv_len, lead, F)
    apart = apart_of(view.start + q_index, rows, band, kv_len, lead, F)
    walk = plan_walk(band, 1, 1, BLOCK_N)
    q_row = seq.q_row + q_index
    at = row_offsets(b, q_index, q_row, q_heads, q_seq, q_token, q_head, cu_q)
    row_scale = query_scale(q_scale, q_row * F.kv_heads * F.group + q_heads, valid, F)
    reach = reach_in_list(reach_of(view.start + q_index, rows, band, lead, F), walk)  # each [BLOCK_M]
    query = load_query(q, at, valid, row_scale, k_scale, kv_head, scale_log2, reach, F)
    kv_row = seq.kv_row.to(tl.int64)
    k += kv_head.to(tl.int64) * k_head + kv_row * k_token
    v += kv_head.to(tl.int64) * v_head + kv_row * v_token
    keys = Keys(k, v, entries, num_pages, k_page, k_token, v_token)
    scales = token_scales(k_scale, v_scale, kv_head, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token, F)
    unmasked, unmasked_end = unmasked_tiles(keys, band, walk, rows, 0, walk.total, F, BLOCK_N)
    page = tile_pages(keys, band, walk, unmasked, F, BLOCK_N)
    m, l, acc, acc_odd = attend_unmasked_first(  # [BLOCK_M], [BLOCK_M], [BLOCK_M, columns] twice
        new_state(BLOCK_M, F), page, query, keys, scales, band, cap_log2,
        walk, 0, walk.total, unmasked, unmasked_end, apart, F, BLOCK_N, STAGES,
    )  # fmt: skip
    acc, column = join_columns(acc, acc_odd, v_scale, kv_head, F)  # [BLOCK_M, Dv padded], [Dv padded]
    at = row_offsets(b, q_index, q_row, q_heads, out_seq, out_token, out_head, cu_q)
    store_output(out, lse, sink, at, q_row, q_heads, valid, m, l, acc, column, F)
