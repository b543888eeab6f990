"""Launch rows for NVIDIA's GPUs, measured on an H200 where they say so; other GPUs take the same rows."""

from __future__ import annotations

from swath.backends.triton.features import Features
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch

H200 = "H200, torch 2.11, Triton 3.6, 2026-11-21"
H200_LATER = "H200, torch 2.11, Triton 3.6, 2026-11-30"
H200_DECEMBER = "H200, torch 2.11, Triton 3.6, 2026-12-01"

SHORT_RUN = 2048
"""Keys that a query sees up to which a slice is over before a deep pipeline pays. Over heads of 512 two programs with
tiles of 16 keys took 46.0 us and one with 32 63.9 (128 sequences under a window of 128), under 1,024 keys 248.7 and
282.0; without a window 940 and 942 (64 sequences of 8,192), 952 and 931 (32 of 16,384)."""
FEW_KEYS = 192
"""The same up to which heads of 128 take two warps: 128 sequences of 20/4 heads under a window of 128 took 16.4 us so,
19.9 in four. Under 512 they gain nothing (78.5 and 78.0); not measured in between, where few sequences would be cut."""
SOME_KEYS = 640
"""The same up to which heads of 128 have tiles of 32 keys, of which three programs fit: 128 sequences of 72/8 heads
under a window of 512 took 74.7 us so, 78.0 in tiles of 64. Half as many programs (48/4 heads) took 49.9 us so, and 48.0
in tiles of 64 in another run. Larger windows are not measured so."""


def split_row(F: Features, block_m: int, keys: int) -> SplitLaunch:
    """Decode, for ``block_m`` rows, of which each sees at most ``keys``."""
    if F.fp32:
        return SplitLaunch(16, 4, 1)
    return _pairs_row(F, block_m, keys <= SHORT_RUN) if F.pairs else _wide_row(F, block_m, keys)


def _pairs_row(F: Features, block_m: int, short_run: bool) -> SplitLaunch:
    """Over 8-bit keys that are read in pairs."""
    if F.head_dim > 256:
        return SplitLaunch(32, 4, 3)
    if F.bounds and F.softcap and F.padded and block_m > 16:
        return SplitLaunch(64, 8, 3)  # four warps spill
    if block_m > 16 and F.head_dim > 128:
        return SplitLaunch(*((128, 4, 2) if F.v_head_dim <= 128 else (64, 4, 3)), H200_DECEMBER)
    if block_m > 16:
        return SplitLaunch(64, 4 if F.padded else 2, 3, H200, resident=4)
    if F.padded and F.page_size & (F.page_size - 1):
        return SplitLaunch(64, 4, 3)  # two warps spill: a slot of such pages takes a division, and registers
    if F.head_dim > 128:  # with two warps and tiles of 64 keys registers spill
        large_tiles = F.token_scales and not (short_run and spills_over_pages(F))
        return SplitLaunch(128, 4, 2, H200_LATER) if large_tiles else SplitLaunch(32, 2, 3, H200_LATER, resident=4)
    if short_run:
        return SplitLaunch(32, 1, 2, H200, resident=8)
    return SplitLaunch(64, 2, 3, H200, resident=4)


def spills_over_pages(F: Features) -> bool:
    """Whether tiles of 128 keys with token scales leave no registers for where keys are: over pages of 32 and more.

    Heads of 256 over pages of 64 spill 208 bytes a thread, over pages of 16 72. 64 sequences under a window of 1,024
    took 98.7 us so, and 83.7 in tiles of 32 keys; over pages of 16 82.2 and 80.7. Long runs gain 2 % in tiles of 32
    where sequences are many, and lose up to 9 % where they are few.
    """
    return F.v_head_dim > 128 and F.page_size > 16


def _wide_row(F: Features, block_m: int, keys: int) -> SplitLaunch:
    """Over 16-bit keys, and 8-bit ones that are read one by one."""
    short_run = keys <= SHORT_RUN
    plain = block_m == 16 and not (F.quantised or F.compute_int8)
    if F.head_dim > 256:
        if block_m > 16:
            return SplitLaunch(32, 8, 2, resident=1)
        if not plain:
            return SplitLaunch(32, 4, 2)
        return SplitLaunch(16, 4, 3, H200_LATER) if short_run else SplitLaunch(32, 4, 3, H200_LATER, resident=1)
    if F.head_dim <= 64 and block_m == 16:
        return SplitLaunch(32, 1, 4, H200, resident=8) if short_run else SplitLaunch(64, 2, 3, H200, resident=4)
    if F.padded:
        if F.head_dim <= 80:
            return SplitLaunch(32, 2, 4, H200, resident=4)
        if F.head_dim <= 128:
            return SplitLaunch(32, 4, 4, H200, resident=3)
        if plain and not short_run and (F.head_dim, F.v_head_dim) == (192, 128):
            return SplitLaunch(64, 4, 3, H200_LATER)  # V's columns leave room for two programs
        return SplitLaunch(32, 4, 3, H200)
    if plain and F.head_dim <= 128 and keys <= FEW_KEYS:
        return SplitLaunch(32, 2, 3, H200_LATER, resident=4)
    if plain and F.head_dim <= 128 and keys <= SOME_KEYS and F.group > 8:
        # Three run at once, but for three num_splits would cut such runs, and a reduce costs more than it wins. Smaller
        # groups are not measured so; where sequences are many, Hopper has tiles for them.
        return SplitLaunch(32, 4, 4, H200_LATER)
    return SplitLaunch(64, 4, 3, H200) if F.head_dim <= 128 else SplitLaunch(64, 4, 2, H200)


def tile_row(F: Features, short_window: bool) -> TileLaunch:
    """Prefill; ``short_window``: it is a few tiles wide."""
    if F.fp32:
        return TileLaunch(16, 16, 8 if F.bounds else 4, 1)  # four warps spill where bounds of rows take registers
    # With more, the LLVM of Triton 3.6 mixed two lanes of the columns' numbers (docs/notes/reliability.md).
    stages = 1 if F.token_scales else 2
    # A warpgroup's products take 64 rows, and ptxas 12.8 lost where their tile of V lies (the same notes).
    if F.block_d != F.block_dv:
        return TileLaunch(32, 32, 4 if F.head_dim <= 256 else 8, stages)
    if F.head_dim > 256:  # 64 rows spill where anything else takes registers
        if F.quantised or F.bounds or F.softcap:
            return TileLaunch(32, 32, 8, stages)
        return TileLaunch(64, 32, 8, stages, H200_LATER)
    if F.quantised:
        return TileLaunch(64, 32, 8, stages)
    if F.head_dim <= 64 and short_window:
        return TileLaunch(64, 32, 4, 2, H200)
    if F.head_dim <= 64:
        return TileLaunch(128, 64, 8, 3) if F.bounds else TileLaunch(128, 64, 4, 3, H200)  # four warps would spill
    if F.head_dim <= 128:
        return TileLaunch(64, 64, 4, 3, H200)
    return TileLaunch(64, 32, 8 if F.bounds else 4, 2)  # as above
