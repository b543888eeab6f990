"""Bounds of query rows for tests, by name: which keys a query sees where a ``Case`` has ``ranges``.

A rule takes the row's number in its sequence, its position p and the sequence's number of keys, and returns [lo, hi).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Rule = Callable[[int, int, int], tuple[int, int]]

WINDOW, SPAN, STEP, CHUNK = 18, 13, 30, 40
"""Keys of a window, of an image span, from the begin of a span to the next, and of a chunk."""
ENDS = (-(2**31), 2**31 - 1)


def _span(p: int) -> tuple[int, int]:
    """The image span of position ``p``, empty after it for text."""
    begin = p // STEP * STEP
    return (begin, begin + SPAN) if p - begin < SPAN else (p, p)


def _span_in_window(_i: int, p: int, _n: int) -> tuple[int, int]:
    return min(p - WINDOW + 1, _span(p)[0]), max(p + 1, _span(p)[1])


def _random(i: int, p: int, n: int) -> tuple[int, int]:
    """Anywhere, one row in four empty, and far from its neighbours'."""
    random = Random(1_000_003 * i + 1_009 * p + n)
    low = random.randrange(-3, n + 3)
    return low, low + random.choice((-2, 0, 1, 3, 20, 21, 90, 200))


def _hostile(i: int, _p: int, n: int) -> tuple[int, int]:
    """Reversed, beyond both ends, as far as int32 goes; beside some that are right."""
    least, most = ENDS
    kinds = (ENDS, (most, least), (least, n // 2), (n // 2, most), (n, n + 9), (n - 1, 3), (-9, 0), (most, most))
    return kinds[i % len(kinds)]


RULES: dict[str, Rule] = {
    "window": lambda _i, p, _n: (p - WINDOW + 1, p + 1),
    "blocks": lambda _i, p, _n: (0, max(p + 1, _span(p)[1])),
    "blocks in window": _span_in_window,
    "chunked": lambda _i, p, _n: (p // CHUNK * CHUNK, p + 1),
    "prefix": lambda _i, p, n: (0, max(p + 1, n // 2)),
    "shard": lambda _i, p, _n: (max(p - 50, 0) // 2, p // 2 + 1),
    "all": lambda _i, _p, n: (0, n),
    "apart": lambda i, _p, n: ((0, 5), (n - 3, n))[i % 2],
    "late": lambda i, _p, n: ((n - 9, n), (-5, -2), (n - 20, n - 9))[i % 3],
    "random": _random,
    "hostile": _hostile,
}
"""Rules by their names; in "apart" and "random" neighbouring rows leave keys out that lie between theirs."""
