"""Launch rows for Triton's interpreter, whose time goes by programs: tiles are small, and few for large groups."""

from __future__ import annotations

from swath.backends.triton.features import Features
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch

SOURCE = "interpreter"


def split_row(_F: Features, _block_m: int, _keys: int) -> SplitLaunch:
    """Decode."""
    return SplitLaunch(32, 1, 1, SOURCE)


def tile_row(F: Features, _short_window: bool) -> TileLaunch:
    """Prefill."""
    return TileLaunch(128 if F.group > 32 else 32, 32, 1, 1, SOURCE)
