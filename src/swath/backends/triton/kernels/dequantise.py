"""Copy the 8-bit pages that a long prefill sees into 16-bit scratch pages, so that its tiles run the 16-bit kernel.

Every 8-bit value is one of float16 and of bfloat16. So nothing is rounded where a scale can be applied later: to scores
(K's tensor and head scales) or to results (V's, and its channel scales). Other scales are multiplied into the copy. For
8-bit products K stays where it is, or is copied so, and queries or scores have its scales. For products with V in e4m3
its values lie side by side by key.

The scratch is a paged cache of its own (of V alone where K stays) for the sequences that splits do not claim. The j-th
page in sight of the r-th of them goes to scratch page ``r * pages + j``, and the entry of a new page table names it, or
is -1 for a dead page. Entries of pages out of sight are undefined, and not read, so that nothing else changes for the
tiles. Sequences without room in the scratch are taken by another launch of tiles, over the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.cache import load_entries, page_in_sight, pages_of, table_row, v_offset
from swath.backends.device.quant import channel_scale, decode, head_scale, key_of_column, sign_of
from swath.backends.device.window import Rows, band_of, bounds_of, rows_of, view_of
from swath.backends.triton.kernels.query import keys_within, lead_of, ranked_sequence, sequence_of, store_claim


@triton.jit
def copy_page(source, target, scale, scale_at, scale_token, kv_head, token_stride, OF_V: tl.constexpr,
              F: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """One kv head of a page: stored [page_size, D or Dv] at ``source`` to the copy at ``target``."""
    BLOCK_D: tl.constexpr = F.block_dv if OF_V else F.block_d
    DIM: tl.constexpr = F.v_head_dim if OF_V else F.head_dim
    fold: tl.constexpr = F.v_fold if OF_V else F.k_fold
    column = tl.arange(0, BLOCK_D)
    live = column < DIM
    for first in range(0, F.page_size, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        mask = (token < F.page_size)[:, None] & live[None, :]
        row = token * token_stride
        if OF_V:
            row = v_offset(row, 0, 0, token, F)
        x = tl.load(source + row[:, None] + column[None, :], mask=mask, other=0)
        if OF_V or F.dots == "":
            x = decode(x, F).to(tl.float32)
            if fold == "token":
                at = scale + scale_at + token * scale_token
                x *= tl.load(at, mask=token < F.page_size, other=0.0).to(tl.float32)[:, None]
            elif fold == "channel" and not OF_V:
                x *= channel_scale(scale, kv_head, column, DIM, live)[None, :]
            elif not OF_V:
                x *= sign_of(head_scale(scale, kv_head, False, F))  # a factor of scores is above 0
        to = target + token[:, None] * DIM + column[None, :]
        tl.store(to, x.to(target.dtype.element_ty), mask=mask)


VALUES_AT_ONCE = tl.constexpr(64)
"""Keys of V that are laid side by side together: a divisor of ``page_size``."""


@triton.jit
def copy_columns(source, target, token_stride, F: tl.constexpr):
    """V of one kv head of a page in e4m3, stored [page_size, Dv] at ``source``, to [Dv, page_size] at ``target``."""
    n, column = tl.arange(0, VALUES_AT_ONCE), tl.arange(0, F.block_dv)
    live = column < F.v_head_dim
    for first in range(0, F.page_size, VALUES_AT_ONCE):
        token = first + key_of_column(n)
        row = v_offset(token * token_stride, 0, 0, token, F)
        x = tl.load(source + row[:, None] + column[None, :], mask=live[None, :], other=0)
        to = target + column[:, None] * F.page_size + first + n[None, :]
        tl.store(to, tl.trans(x), mask=live[:, None])


BOUNDS_AT_ONCE = tl.constexpr(1024)
"""Query rows whose bounds are looked at together."""


@triton.jit
def rows_of_sequence(view, q_len, kv_len, F: tl.constexpr):
    """All rows of a sequence; of bounds, the ones of many rows in one: they see no fewer keys together."""
    last = view.start + q_len - 1
    if F.bounds:
        i = tl.arange(0, BOUNDS_AT_ONCE)
        low, end = bounds_of(i, last, kv_len, view)
        for first in range(BOUNDS_AT_ONCE, q_len, BOUNDS_AT_ONCE):
            more_low, more_end = bounds_of(first + i, last, kv_len, view)
            low, end = tl.minimum(low, more_low), tl.maximum(end, more_end)
        return Rows(view.start, last, last, low, end)
    else:
        return rows_of(view.start, last, last, view, kv_len, F)


RUN_TIME = (
    "lead",
    "window",
    "steps",
    "claimed",
    "num_seqs",
    "pages",
    "width",
    "table_width",
    "num_pages",
    "table_stride",
)


@triton.jit(do_not_specialize=RUN_TIME)
def dequantise_kernel(
    k, v, k_scale, v_scale, table, table_index, lens, cu_q, q_start, lead, new_k, new_v, new_table, copied, others,
    window, steps, claimed, num_seqs, pages, width, table_width, num_pages,
    kv_page, kv_head_stride, kv_token, table_stride, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token,
    F: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per (sequence not claimed, page in sight, kv head), heads fastest.

    A sequence has ``pages`` scratch pages, and ``width`` entries of the new table. Where there may be more sequences
    than the grid has, the first program writes which ones the launch over the scratch takes (``copied``), and which the
    one over the cache (``others``). ``steps``: query tokens of each sequence, or (with cu_q) of all.
    """
    kv_head = tl.program_id(0) % F.kv_heads
    j = tl.program_id(0) // F.kv_heads % pages
    rank = tl.program_id(0) // F.kv_heads // pages
    if copied is not None:
        if tl.program_id(0) == 0:
            end = ranked_sequence(tl.num_programs(0) // F.kv_heads // pages, cu_q, steps, num_seqs, claimed)
            store_claim(copied, claimed, 0, end)
            store_claim(others, claimed, end, num_seqs)
    b = ranked_sequence(rank, cu_q, steps, num_seqs, claimed)
    if b >= num_seqs:
        return
    seq = sequence_of(b, cu_q, steps, steps, lens, q_start, F)
    entries, own_pages = table_row(table, table_index, b, table_stride, table_width, F)
    # The new table has as many entries for each sequence: those that its own table lacks are dead ones.
    kv_len = keys_within(seq, width, F)
    rows = rows_of_sequence(view_of(seq, kv_len, window, F), seq.q_len, kv_len, F)
    band = band_of(rows, kv_len, lead_of(b, lead, F), F)
    page, seen = page_in_sight(j, band, F.page_size)
    entry = pages_of(load_entries(entries, page, seen & (page < own_pages), -1, F), F)
    live = (entry >= 0) & (entry < num_pages)
    new_page = rank * pages + j
    if kv_head == 0:
        tl.store(new_table + b * width + page, tl.where(live, new_page, -1), mask=seen)
    if not live:
        return
    entry, head = entry.to(tl.int64), kv_head.to(tl.int64)
    source = entry * kv_page + head * kv_head_stride
    new_slot = (new_page.to(tl.int64) * F.kv_heads + head) * F.page_size
    k_target, v_target = new_slot * F.head_dim, new_slot * F.v_head_dim
    scale_at = entry * ks_page + head * ks_head
    if new_k is not None:
        copy_page(k + source, new_k + k_target, k_scale, scale_at, ks_token, kv_head, kv_token, False, F, BLOCK_T)
    source = v_offset(source, entry, head, 0, F)
    if F.v_e4m3:
        copy_columns(v + source, new_v + v_target, kv_token, F)
    else:
        scale_at = entry * vs_page + head * vs_head
        copy_page(v + source, new_v + v_target, v_scale, scale_at, vs_token, kv_head, kv_token, True, F, BLOCK_T)
