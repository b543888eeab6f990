"""Which keys a query sees, on the device: the twin of swath/window.py.

``lead`` is the count of leading tokens of a sequence, its ``global_tokens``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from swath.backends.device.cache import load_int32


class Band(NamedTuple):
    """The keys that some row of a program sees: leading tokens ``[0, lead)``, and windows in ``[left, right)``."""

    lead: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Reach(NamedTuple):
    """The keys that each query row sees: ``low .. end - 1`` by its window, and the leading tokens before ``lead``."""

    low: tl.tensor
    end: tl.tensor
    lead: tl.tensor


class View(NamedTuple):
    """From where a sequence's queries see: the position of the first, and how many keys their windows have.

    With bounds positions count from 0, as rows do, and ``size`` is a pointer to the bounds of the first row.
    """

    start: tl.tensor
    size: tl.tensor


class Rows(NamedTuple):
    """The query rows of a program, at positions ``first .. last``, with their ``View.size``.

    ``low``, ``end``: the bounds of each row (``bounds_of``), or nothing that is read.
    """

    first: tl.tensor
    last: tl.tensor
    size: tl.tensor
    low: tl.tensor
    end: tl.tensor


NEAR = tl.constexpr(1 << 29)
"""Keys and query tokens of a sequence, at most, for ``start_near`` and ``size_near``."""


@triton.jit
def start_near(start, q_len, kv_len, size):
    """The first position of ``view_of`` for queries whose windows all have ``size_near(size)`` keys.

    So the size is the same for all sequences of a launch and needs no register. ``kv_len + q_len`` is at most ``NEAR``.
    Windows larger than that hold all keys, except those of queries which stand far from the keys: these are moved by as
    much as the window is made shorter.
    """
    excess = size - size_near(size)
    behind = tl.minimum(tl.maximum(tl.maximum(start, 0) - excess, kv_len), kv_len + NEAR)
    before = tl.maximum(tl.minimum(tl.minimum(start, 0) + excess, -q_len), -q_len - NEAR)
    return tl.where(start >= kv_len, behind, tl.where(start <= -q_len, before, start))


@triton.jit
def size_near(size):
    """How many keys windows have, for queries from ``start_near`` on: no sum of these numbers overflows."""
    return tl.minimum(size, NEAR)


@triton.jit
def view_of(seq, kv_len, window, F: tl.constexpr):
    """The view of a sequence's queries, of which there are some, over ``kv_len`` keys, which are all that may be seen.

    ``window``: the size, or the bounds of all rows. Queries before all keys or behind them are moved near, and their
    windows are as much shorter: the same keys are seen, and no sum of what is returned overflows, whatever int32
    ``seq.q_start`` and ``window`` are.
    """
    if F.bounds:
        return View(seq.q_row * 0, window + seq.q_row.to(tl.int64) * 2)
    else:
        start, q_len = seq.q_start, seq.q_len
        near = tl.maximum(start, -q_len)
        beside = tl.minimum(near, kv_len)
        size = tl.maximum(window - (near - start) - (near - beside), 0)
        return View(beside, tl.minimum(size, kv_len + q_len + 1))


@triton.jit
def view_near(start, q_row, window, F: tl.constexpr):
    """The view of a sequence's queries from ``start`` on, their ``start_near``; with bounds that is 0."""
    if F.bounds:
        return View(start, window + q_row.to(tl.int64) * 2)
    else:
        return View(start, size_near(window))


@triton.jit
def rows_of(first, last, p, view, kv_len, F: tl.constexpr):
    """The rows at positions ``first .. last``, whose numbers are in ``p``."""
    if F.bounds:
        low, end = bounds_of(p, last, kv_len, view)
        return Rows(first, last, view.size, low, end)
    else:
        return Rows(first, last, view.size, first, first)


@triton.jit
def bounds_of(p, last, kv_len, view):
    """The bounds of rows ``p``, within the keys there are. A row whose window is empty begins where all keys end.

    Rows past the ``last`` have its bounds, so that they change nothing of what rows see together.
    """
    at = view.size + 2 * tl.minimum(p, last)
    low, end = tl.maximum(load_int32(at), 0), tl.minimum(load_int32(at + 1), kv_len)
    return tl.where(low < end, low, kv_len), tl.maximum(end, 0)


@triton.jit
def reach_of(p, rows, band, lead, F: tl.constexpr):
    """The reach of queries at positions ``p``; no key from ``band.right`` on is in it."""
    if F.bounds:
        low, end = rows.low, rows.end
    else:
        low, end = p * 0, p * 0 + band.right
        if F.window:
            low = p - rows.size + 1
            if not F.causal:
                end = tl.minimum(p + rows.size, end)
        if F.causal:
            end = tl.minimum(p + 1, end)
    return Reach(low, end, tl.minimum(lead, end if F.causal else band.right + p * 0))


@triton.jit
def visible(k, low, end, lead, F: tl.constexpr):
    """The rule itself: keys ``k`` >= 0 [1, N] in the reach of rows [M, 1]."""
    seen = k < end
    if F.window:
        seen = seen & (k >= low)
    if F.lead != "":
        seen = seen | (k < lead)
    return seen


@triton.jit
def band_of(rows, kv_len, lead, F: tl.constexpr):
    """The keys that any of the rows sees, as ``Window.key_ranges``; with bounds, those between them too.

    Leading tokens that touch the window join it: ``Band.lead`` is 0 then.
    """
    if F.bounds:
        end = tl.max(rows.end, 0)
        right = tl.max(tl.where(rows.low < rows.end, rows.end, 0), 0)
        left = tl.minimum(tl.min(rows.low, 0), right)
    else:
        end = tl.minimum(tl.maximum(rows.last + 1, 0), kv_len) if F.causal else kv_len
        left, right = end * 0, end
        if F.window:
            right = tl.where(rows.size > 0, tl.minimum(tl.maximum(rows.last + rows.size, 0), end), 0)
            left = tl.minimum(tl.maximum(rows.first - rows.size + 1, 0), right)
    lead_end = end * 0
    if F.lead != "":
        lead_end = tl.minimum(tl.maximum(lead, 0), end)
        left = tl.where(left <= lead_end, 0, left)
        right = tl.where(left == 0, tl.maximum(right, lead_end), right)
        lead_end = tl.where(left == 0, 0, lead_end)
    return Band(lead_end, left, right)


@triton.jit
def interior_of(band, rows, F: tl.constexpr):
    """Keys ``start .. stop - 1`` that every one of the rows sees by its window alone."""
    start, stop = band.left, band.right
    if F.bounds:
        start, stop = tl.maximum(start, tl.max(rows.low, 0)), tl.minimum(stop, tl.min(rows.end, 0))
    else:
        if F.window:
            start = tl.maximum(start, rows.last - rows.size + 1)
        if F.causal:
            stop = tl.minimum(stop, rows.first + 1)
        elif F.window:
            stop = tl.minimum(stop, rows.first + rows.size)
    return start, stop


class Sight(NamedTuple):
    """What rows with bounds see together: their ``Band``, and the keys ``full_from .. full_to - 1`` that all of them
    see. ``apart``: whether they may leave out keys between theirs.
    """

    lead: tl.tensor
    left: tl.tensor
    right: tl.tensor
    full_from: tl.tensor
    full_to: tl.tensor
    apart: tl.tensor


@triton.jit
def sight_of(p, last, kv_len, lead, view, F: tl.constexpr):
    """The sight of rows ``p`` [M], which have bounds."""
    rows = rows_of(last, last, p, view, kv_len, F)
    band = band_of(rows, kv_len, lead, F)
    full_from, full_to = interior_of(band, rows, F)
    apart = are_apart(p, rows, full_from, full_to, kv_len)
    return Sight(band.lead, band.left, band.right, full_from, full_to, apart.to(tl.int32))


@triton.jit
def are_apart(p, rows, full_from, full_to, kv_len):
    """Whether rows ``p`` [M], which have bounds, may leave keys out between theirs.

    They do not if all of them have a key in common, or else if the window of each touches that of the next.
    """
    apart = full_from > full_to
    if apart:
        next_low, next_end = bounds_of(p + 1, rows.last, kv_len, View(rows.first, rows.size))
        gaps = tl.maximum(rows.low, next_low) > tl.minimum(rows.end, next_end)
        apart = tl.max(gaps.to(tl.int32), 0) > 0
    return apart


@triton.jit
def seen_bits(first, COUNT: tl.constexpr, low, end, lead):
    """Which of ``COUNT`` keys from ``first`` on, at most 30, some row [M] with these bounds sees: a bit for each."""
    start, stop = _bits_before(low - first, COUNT), _bits_before(end - first, COUNT)
    leading = _bits_before(tl.minimum(lead, end) - first, COUNT)
    return tl.reduce((stop & ~start) | leading, 0, _either)


@triton.jit
def _bits_before(count, COUNT: tl.constexpr):
    return (1 << tl.minimum(tl.maximum(count, 0), COUNT)) - 1


@triton.jit
def _either(a, b):
    return a | b


class Apart(NamedTuple):
    """Rows that may leave keys out between theirs: whether there may be ``some`` keys that none of them sees."""

    some: tl.tensor
    rows: tl.tensor  # the Rows
    lead: tl.tensor


@triton.jit
def apart_of(p, rows, band, kv_len, lead, F: tl.constexpr):
    """What rows at positions ``p`` may leave out between theirs: nothing, but for rows with bounds."""
    some = False
    if F.bounds:
        full_from, full_to = interior_of(band, rows, F)
        some = are_apart(p, rows, full_from, full_to, kv_len)
    return Apart(some, rows, lead)


@triton.jit
def seen_by_some(k, apart, F: tl.constexpr):
    """Which keys ``k`` [N] some row sees, one row after the other: rows that are apart are few."""
    seen = k < 0
    for p in range(apart.rows.first, apart.rows.last + 1):
        at = apart.rows.size + 2 * p
        low, end = load_int32(at), load_int32(at + 1)
        seen = seen | visible(k, low, end, tl.minimum(apart.lead, end), F)
    return seen
