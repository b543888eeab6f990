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


@triton.jit
def visible(p, k, size, leading, F: tl.constexpr):
    """The rule itself, for broadcastable positions ``p`` of queries and ``k`` of keys."""
    seen = k >= 0
    if F.window:
        seen = (p - k < size) if F.causal else (tl.abs(p - k) < size)
        if F.leading != "":
            seen = seen | (k < leading)
    if F.causal:
        seen = seen & (k <= p)
    return seen


@triton.jit
def band_of(first, last, kv_len, size, leading, F: tl.constexpr):
    """The keys that any query at positions ``first .. last`` sees, as ``Window.key_ranges``."""
    end = tl.minimum(tl.maximum(last + 1, 0), kv_len) if F.causal else kv_len
    lead, left, right = end * 0, end * 0, end
    if F.window:
        reach = tl.minimum(size, 1 << 30)
        right = tl.where(size > 0, tl.minimum(tl.maximum(last + reach, 0), end), 0)
        left = tl.minimum(tl.maximum(first - reach + 1, 0), right)
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
        start = tl.maximum(start, last - tl.minimum(size, 1 << 30) + 1)
    if F.causal:
        stop = tl.minimum(stop, first + 1)
    elif F.window:
        stop = tl.minimum(stop, first + tl.minimum(size, 1 << 30))
    return start, stop
