"""Where keys are, on the device: page tables, addresses and loads that touch nothing nobody may see."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Keys(NamedTuple):
    """The keys of one sequence and kv head. Dense sequences have no table; their rows follow one another."""

    k: tl.tensor  # at this kv head (dense: and at the sequence's first row)
    v: tl.tensor
    table: tl.tensor  # at the sequence's first entry
    num_pages: tl.tensor  # in the pool; an entry outside is dead
    k_page: tl.tensor  # strides in elements
    k_token: tl.tensor
    v_page: tl.tensor
    v_token: tl.tensor


@triton.jit
def table_row(table, indptr, b, stride, max_pages):
    """The first entry of sequence ``b`` and how many it has; a hostile ``indptr`` is cut to what exists."""
    if indptr is None:
        return table + b.to(tl.int64) * stride, max_pages
    else:
        return flat_row(table, indptr, b, max_pages)


@triton.jit
def flat_row(table, indptr, b, max_pages):
    """The same for a flat table of ``max_pages`` entries."""
    first = tl.minimum(tl.maximum(tl.load(indptr + b), 0), max_pages)
    end = tl.minimum(tl.maximum(tl.load(indptr + b + 1), first), max_pages)
    return table + first, end - first


@triton.jit
def page_in_sight(j, band, page_size):
    """The ``j``-th page with a key of the band, and whether there is one. Leading keys come first."""
    num_lead = tl.cdiv(band.lead, page_size)
    page = tl.where(j < num_lead, j, tl.maximum(band.left // page_size, num_lead) + j - num_lead)
    return page, (j < num_lead) | (page * page_size < band.right)


@triton.jit
def pages_in_sight(band, page_size):
    """How many there are, or one more: a page may have the last of the leading keys and the first of the others."""
    return tl.cdiv(band.lead, page_size) + tl.cdiv(band.right, page_size) - band.left // page_size


@triton.jit
def page_ids(keys, pos, wanted, F: tl.constexpr):
    """The table entries of positions ``pos``, -1 where not ``wanted``; a dense sequence has none."""
    if F.page_size == 0:
        return tl.where(wanted, 0, -1)
    else:
        return tl.load(keys.table + pos.to(tl.uint32) // F.page_size, mask=wanted, other=-1)


@triton.jit
def widen(x):
    """An index or stride >= 0 as int64. With no sign to extend, the product of two is one instruction, not five."""
    return x.to(tl.uint32).to(tl.int64) if x.dtype == tl.int32 else x.to(tl.int64)


@triton.jit
def is_live(keys, page, F: tl.constexpr):
    """Which table entries are pages of the pool; what stands in others is never read."""
    if F.page_size == 0:
        return page >= 0
    else:
        return page.to(tl.uint32) < keys.num_pages.to(tl.uint32)


@triton.jit
def slot_of(pos, F: tl.constexpr):
    """Where position ``pos`` >= 0 is within its page."""
    return (pos.to(tl.uint32) % F.page_size).to(tl.int32)


@triton.jit
def slot_offset(pos, page, page_stride, token_stride, F: tl.constexpr):
    """Element offset (int64) of the slot of position ``pos`` in its page."""
    return widen(page) * widen(page_stride) + widen(slot_of(pos, F)) * widen(token_stride)


@triton.jit
def locate(keys, pos, page, F: tl.constexpr):
    """Element offsets of the K and V rows (int64)."""
    if F.page_size == 0:
        k_row, v_row = pos.to(tl.int64) * keys.k_token, pos.to(tl.int64) * keys.v_token
    else:
        k_row = slot_offset(pos, page, keys.k_page, keys.k_token, F)
        v_row = k_row  # the same strides, as PagedKV demands: one offset tensor serves both
    return k_row, v_row


@triton.jit
def load_rows(base, row, column, live, ALL_LIVE: tl.constexpr, F: tl.constexpr):
    """Rows [N, columns] of K or V; what is not ``live`` [N, 1] is not read and comes as 0."""
    at = base + row[:, None] + column[None, :]
    if ALL_LIVE and not F.padded:
        return tl.load(at)
    elif ALL_LIVE:
        return tl.load(at, mask=(column < F.stored_dim)[None, :], other=0)
    elif F.padded:
        return tl.load(at, mask=live & (column < F.stored_dim)[None, :], other=0)
    else:
        return tl.load(at, mask=live, other=0)
