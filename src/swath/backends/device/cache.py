"""Where keys are, on the device: page tables, addresses, and loads of no key that may not be seen."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Keys(NamedTuple):
    """The keys of one sequence and kv head. Dense keys have no page table: their rows follow one another."""

    k: tl.tensor  # at this kv head (dense: and at the sequence's first row)
    v: tl.tensor
    table: tl.tensor  # at the sequence's first entry
    num_pages: tl.tensor  # in the pool; an entry outside is dead
    k_page: tl.tensor  # strides in elements
    k_token: tl.tensor
    v_token: tl.tensor  # read where keys are dense


@triton.jit
def load_int32(at, mask=None, other=None):
    """Lengths, positions or table entries of 32 or 64 bits as int32; what is beyond its range becomes its end.

    So no number of 64 bits turns into another one that would count.
    """
    return to_int32(tl.load(at, mask=mask, other=other))


@triton.jit
def to_int32(x):
    """An integer as int32, the nearest that there is."""
    if x.dtype == tl.int64:
        return tl.minimum(tl.maximum(x, -(1 << 31)), (1 << 31) - 1).to(tl.int32)
    else:
        return x


@triton.jit
def table_row(table, index, b, stride, width, F: tl.constexpr):
    """The first entry of sequence ``b`` and how many pages it has; a hostile ``index`` is cut to what exists.

    ``index`` says where the entries of a flat table begin, or which row of a larger table a sequence has.
    """
    if F.table == "flat":
        first = tl.minimum(tl.maximum(load_int32(index + b), 0), width)
        end = tl.minimum(tl.maximum(load_int32(index + b + 1), first), width)
        entries, count = table + first, end - first
    elif F.table == "rows":
        row = load_int32(index + b)
        inside = (row >= 0) & (row < F.table_rows)
        entries, count = table + tl.where(inside, row, 0).to(tl.int64) * stride, tl.where(inside, width, 0)
    else:
        entries, count = table + b.to(tl.int64) * stride, width
    return entries, tl.cdiv(count, F.page_size) if F.token_table else count


@triton.jit
def load_entries(table, page, wanted, other, F: tl.constexpr):
    """The table entries of a sequence's pages number ``page``, ``other`` (0 or -1) where not ``wanted``.

    A table of tokens has an entry for each position: the first one of a page stands for it.
    """
    return tl.load(table + (page * F.page_size if F.token_table else page), mask=wanted, other=other)


@triton.jit
def pages_of(entry, F: tl.constexpr):
    """The pages that table entries name, int32; no entry that names none becomes one that does."""
    return to_int32(tl.where(entry < 0, -1, entry // F.page_size) if F.token_table else entry)


@triton.jit
def page_in_sight(j, band, page_size):
    """The ``j``-th page with a key of the band, and whether there is one. Leading tokens come first."""
    num_lead = tl.cdiv(band.lead, page_size)
    page = tl.where(j < num_lead, j, tl.maximum(band.left // page_size, num_lead) + j - num_lead)
    return page, (j < num_lead) | (page * page_size < band.right)


@triton.jit
def pages_in_sight(band, page_size):
    """How many there are, or one more: one page may have the last leading token and the first of the other keys."""
    return tl.cdiv(band.lead, page_size) + tl.cdiv(band.right, page_size) - band.left // page_size


@triton.jit
def page_ids(keys, pos, wanted, F: tl.constexpr):
    """The table entries of positions ``pos``, -1 where not ``wanted``; a dense sequence has none."""
    if F.page_size == 0:
        return tl.where(wanted, 0, -1)
    else:
        return load_entries(keys.table, pos.to(tl.uint32) // F.page_size, wanted, -1, F)


@triton.jit
def widen(x):
    """An index or stride >= 0 as int64. With no sign to extend, the product of two is one instruction, not five."""
    return x.to(tl.uint32).to(tl.int64) if x.dtype == tl.int32 else x.to(tl.int64)


@triton.jit
def is_live(keys, entry, F: tl.constexpr):
    """Which table entries name pages of the pool. Others are never followed."""
    if F.page_size == 0:
        return entry >= 0
    elif F.token_table:
        return (entry >= 0) & (entry // F.page_size < keys.num_pages)
    elif entry.dtype == tl.int64:
        return (entry >= 0) & (entry < keys.num_pages)
    else:
        return entry.to(tl.uint32) < keys.num_pages.to(tl.uint32)


@triton.jit
def slot_of(pos, F: tl.constexpr):
    """Where position ``pos`` >= 0 is within its page."""
    return (pos.to(tl.uint32) % F.page_size).to(tl.int32)


@triton.jit
def page_of(entry, F: tl.constexpr):
    """The page that a live table entry names, int64."""
    return widen(entry) // F.page_size if F.token_table else widen(entry)


@triton.jit
def slot_offset(pos, entry, page_stride, token_stride, F: tl.constexpr):
    """Element offset (int64) of the slot of position ``pos`` in the page that a live table entry names.

    It takes the entry as it was loaded, as ``is_live`` does: Triton 3.6 fails to lay out ``pages_of`` in a loop.
    """
    return page_of(entry, F) * widen(page_stride) + widen(slot_of(pos, F)) * widen(token_stride)


@triton.jit
def v_offset(k_offset, page, head, slot, F: tl.constexpr):
    """Element offset (int64) in V of what is at ``k_offset`` in K: the same, where both have the same strides.

    Others are compiled in: an engine keeps one layout of its caches, and entries are wide enough without them.
    """
    if F.v_strides is None:
        return k_offset
    else:
        return (page * F.v_strides[0] + head * F.v_strides[1] + slot * F.v_strides[2]) // F.unit


@triton.jit
def locate(keys, pos, entry, F: tl.constexpr):
    """Element offsets of the K and V rows (int64)."""
    if F.page_size == 0:
        k_row, v_row = pos.to(tl.int64) * keys.k_token, pos.to(tl.int64) * keys.v_token
    else:
        k_row = slot_offset(pos, entry, keys.k_page, keys.k_token, F)
        v_row = v_offset(k_row, page_of(entry, F), 0, widen(slot_of(pos, F)), F)
    return k_row, v_row


@triton.jit
def load_rows(base, row, column, live, COLUMNS: tl.constexpr, ALL_LIVE: tl.constexpr):
    """Rows of K or V with ``COLUMNS`` as [N, columns]; what is not ``live`` [N, 1] is not read and comes as 0."""
    at = base + row[:, None] + column[None, :]
    PADDED: tl.constexpr = column.shape[0] != COLUMNS
    if ALL_LIVE and not PADDED:
        return tl.load(at)
    elif ALL_LIVE:
        return tl.load(at, mask=(column < COLUMNS)[None, :], other=0)
    elif PADDED:
        return tl.load(at, mask=live & (column < COLUMNS)[None, :], other=0)
    else:
        return tl.load(at, mask=live, other=0)
