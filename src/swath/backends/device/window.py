"""Who sees whom, on the device: the twin of swath/window.py."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Band(NamedTuple):
    """The keys that the rows of a program see together: ``[0, lead)`` and ``[left, right)``."""

    lead: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Reach(NamedTuple):
    """The keys that query rows see: ``low .. end - 1`` by their windows, and the leading ones before ``lead``."""

    low: tl.tensor
    end: tl.tensor
    lead: tl.tensor


class View(NamedTuple):
    """From where a sequence's queries see: the position of the first, and how many keys their windows have."""

    start: tl.tensor
    size: tl.tensor


@triton.jit
def view_of(start, q_len, kv_len, size):
    """The view of ``q_len`` > 0 queries from ``start`` on over ``kv_len`` keys, which are all that may be seen.

    Queries before all keys or behind them are moved near, and their windows are as much shorter: who sees whom stays,
    and no sum of what is returned overflows, whatever int32 ``start`` and ``size`` are.
    """
    near = tl.maximum(start, -q_len)
    beside = tl.minimum(near, kv_len)
    size = tl.maximum(size - (near - start) - (near - beside), 0)
    return View(beside, tl.minimum(size, kv_len + q_len + 1))


@triton.jit
def reach_of(p, band, size, leading, F: tl.constexpr):
    """The reach of queries at positions ``p``; no key from ``band.right`` on is in it."""
    low, end = p * 0, p * 0 + band.right
    if F.window:
        low = p - size + 1
        if not F.causal:
            end = tl.minimum(p + size, end)
    if F.causal:
        end = tl.minimum(p + 1, end)
    return Reach(low, end, tl.minimum(leading, end if F.causal else band.right + p * 0))


@triton.jit
def visible(k, low, end, lead, F: tl.constexpr):
    """The rule itself: keys ``k`` >= 0 [1, N] in the reach of rows [M, 1]."""
    seen = k < end
    if F.window:
        seen = seen & (k >= low)
    if F.leading != "":
        seen = seen | (k < lead)
    return seen


@triton.jit
def band_of(first, last, kv_len, size, leading, F: tl.constexpr):
    """The keys that any query at positions ``first .. last`` sees, as ``Window.key_ranges``."""
    end = tl.minimum(tl.maximum(last + 1, 0), kv_len) if F.causal else kv_len
    lead, left, right = end * 0, end * 0, end
    if F.window:
        right = tl.where(size > 0, tl.minimum(tl.maximum(last + size, 0), end), 0)
        left = tl.minimum(tl.maximum(first - size + 1, 0), right)
        if F.leading != "":
            lead = tl.minimum(tl.maximum(leading, 0), end)
            left = tl.where(left <= lead, 0, left)
            right = tl.where(left == 0, tl.maximum(right, lead), right)
            lead = tl.where(left == 0, 0, lead)
    return Band(lead, left, right)


@triton.jit
def interior_of(band, first, last, size, F: tl.constexpr):
    """Keys ``start .. stop - 1`` that every query at positions ``first .. last`` sees by its window alone."""
    start, stop = band.left, band.right
    if F.window:
        start = tl.maximum(start, last - size + 1)
    if F.causal:
        stop = tl.minimum(stop, first + 1)
    elif F.window:
        stop = tl.minimum(stop, first + size)
    return start, stop
