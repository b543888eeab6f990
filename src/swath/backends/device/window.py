"""Who sees whom, on the device: the twin of swath/window.py.

``lead`` is the count of leading tokens of a sequence, its ``global_tokens``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


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
def reach_of(p, band, window_size, lead, F: tl.constexpr):
    """The reach of queries at positions ``p``; no key from ``band.right`` on is in it."""
    low, end = p * 0, p * 0 + band.right
    if F.window:
        low = p - window_size + 1
        if not F.causal:
            end = tl.minimum(p + window_size, end)
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
def band_of(first, last, kv_len, window_size, lead, F: tl.constexpr):
    """The keys that any query at positions ``first .. last`` sees, as ``Window.key_ranges``.

    Leading tokens that touch the window join it: ``Band.lead`` is 0 then.
    """
    end = tl.minimum(tl.maximum(last + 1, 0), kv_len) if F.causal else kv_len
    lead_end, left, right = end * 0, end * 0, end
    if F.window:
        right = tl.where(window_size > 0, tl.minimum(tl.maximum(last + window_size, 0), end), 0)
        left = tl.minimum(tl.maximum(first - window_size + 1, 0), right)
        if F.lead != "":
            lead_end = tl.minimum(tl.maximum(lead, 0), end)
            left = tl.where(left <= lead_end, 0, left)
            right = tl.where(left == 0, tl.maximum(right, lead_end), right)
            lead_end = tl.where(left == 0, 0, lead_end)
    return Band(lead_end, left, right)


@triton.jit
def interior_of(band, first, last, window_size, F: tl.constexpr):
    """Keys ``start .. stop - 1`` that every query at positions ``first .. last`` sees by its window alone."""
    start, stop = band.left, band.right
    if F.window:
        start = tl.maximum(start, last - window_size + 1)
    if F.causal:
        stop = tl.minimum(stop, first + 1)
    elif F.window:
        stop = tl.minimum(stop, first + window_size)
    return start, stop
