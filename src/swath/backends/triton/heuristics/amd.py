"""Launch rows for AMD's GPUs: they compile, and none was measured yet."""

from __future__ import annotations

from swath.backends.triton.features import Features
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch


def split_row(F: Features, block_m: int, _keys: int) -> SplitLaunch:
    """Decode."""
    if F.fp32:
        return SplitLaunch(16, 4, 1)
    if F.head_dim > 256:
        return SplitLaunch(32, 4 if block_m == 16 else 8, 1)
    return SplitLaunch(64, 4, 2)


def tile_row(F: Features, short_window: bool) -> TileLaunch:
    """Prefill; ``short_window``: it is a few tiles wide."""
    if F.fp32:
        return TileLaunch(16, 16, 4, 1)
    if F.head_dim > 256:
        return TileLaunch(32, 32, 4, 1)
    if F.quantised:
        return TileLaunch(64, 32, 8, 2)
    if F.head_dim <= 64:
        return TileLaunch(64, 32, 4, 2) if short_window else TileLaunch(128, 64, 4, 3)
    return TileLaunch(64, 64, 4, 3) if F.head_dim <= 128 else TileLaunch(64, 32, 4, 2)
