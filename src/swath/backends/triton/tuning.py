"""Launch rows to try in place of the tables' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swath.backends.triton.heuristics import TileLaunch


@dataclass(frozen=True)
class Tuning:
    """Rows to launch with in place of the tables' own: what ``swath bench tune`` tries, and nothing when serving.

    tile: rows per tile beside the row. A split row still passes ``in_step``, as it would from the table.
    hopper: a row of the backend that has tiles of its own, which knows its type.
    """

    split: TileLaunch | None = None
    split_rows: int | None = None
    num_splits: int | None = None
    tile: tuple[int, TileLaunch] | None = None
    hopper: Any = None


UNTUNED = Tuning()
"""As the tables and rules say."""
