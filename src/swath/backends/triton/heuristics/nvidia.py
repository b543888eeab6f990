"""Launch rows for NVIDIA's GPUs, measured on an H200 where they say so; other GPUs take the same rows."""

from __future__ import annotations

from swath.backends.triton.features import Features
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch

H200 = "H200, torch 2.11, Triton 3.6, 2026-11-21"
H200_512 = "H200, torch 2.11, Triton 3.6, 2026-11-30"


def split_row(F: Features, block_m: int, short_run: bool) -> SplitLaunch:
    """Decode, for ``block_m`` rows; ``short_run``: a query sees few keys."""
    if F.fp32:
        return SplitLaunch(16, 4, 1)
    return _pairs_row(F, block_m, short_run) if F.pairs else _wide_row(F, block_m, short_run)


def _pairs_row(F: Features, block_m: int, short_run: bool) -> SplitLaunch:
    """Over 8-bit keys that are read in pairs."""
    if F.head_dim > 256:
        return SplitLaunch(32, 4, 3)
    if F.bounds and F.softcap and F.padded and block_m > 16:
        return SplitLaunch(64, 8, 3)  # four warps spill
    if block_m > 16:
        return SplitLaunch(64, 4 if F.padded else 2, 3, H200, resident=4)
    if F.padded and F.page_size & (F.page_size - 1):
        return SplitLaunch(64, 4, 3)  # two warps spill: a slot of such pages takes a division, and registers
    if short_run and F.head_dim <= 128:
        return SplitLaunch(32, 1, 2, H200, resident=8)
    return SplitLaunch(64, 2, 3, H200, resident=4)


def _wide_row(F: Features, block_m: int, short_run: bool) -> SplitLaunch:
    """Over 16-bit keys, and 8-bit ones that are read one by one."""
    if F.head_dim > 256:
        if block_m > 16:
            return SplitLaunch(32, 8, 2, resident=1)
        if F.quantised or F.compute_int8:
            return SplitLaunch(32, 4, 2)
        return SplitLaunch(32, 4, 3, H200_512, resident=1)
    if F.head_dim <= 64 and block_m == 16:
        return SplitLaunch(32, 1, 4, H200, resident=8) if short_run else SplitLaunch(64, 2, 3, H200, resident=4)
    if F.padded:
        if F.head_dim <= 80:
            return SplitLaunch(32, 2, 4, H200, resident=4)
        return SplitLaunch(32, 4, 4, H200, resident=3) if F.head_dim <= 128 else SplitLaunch(32, 4, 3, H200)
    return SplitLaunch(64, 4, 3, H200) if F.head_dim <= 128 else SplitLaunch(64, 4, 2, H200)


def tile_row(F: Features, short_window: bool) -> TileLaunch:
    """Prefill; ``short_window``: it is a few tiles wide."""
    if F.fp32:
        return TileLaunch(16, 16, 8 if F.bounds else 4, 1)  # four warps spill where bounds of rows take registers
    # With more, the LLVM of Triton 3.6 mixed two lanes of the columns' numbers (docs/notes/reliability.md).
    stages = 1 if "token" in (F.k_fold, F.v_fold) else 2
    # A warpgroup's products take 64 rows, and ptxas 12.8 lost where their tile of V lies (the same notes).
    if F.block_d != F.block_dv:
        return TileLaunch(32, 32, 4 if F.head_dim <= 256 else 8, stages)
    if F.head_dim > 256:  # 64 rows spill where anything else takes registers
        if F.quantised or F.bounds or F.softcap:
            return TileLaunch(32, 32, 8, stages)
        return TileLaunch(64, 32, 8, stages, H200_512)
    if F.quantised:
        return TileLaunch(64, 32, 8, stages)
    if F.head_dim <= 64 and short_window:
        return TileLaunch(64, 32, 4, 2, H200)
    if F.head_dim <= 64:
        return TileLaunch(128, 64, 8, 3) if F.bounds else TileLaunch(128, 64, 4, 3, H200)  # four warps would spill
    if F.head_dim <= 128:
        return TileLaunch(64, 64, 4, 3, H200)
    return TileLaunch(64, 32, 8 if F.bounds else 4, 2)  # as above
