"""The launch rows of Triton's kernels, and how they are cut to the shared memory of a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from swath.backends.triton.features import Features
from swath.target import Target

UNMEASURED = "unmeasured, compiles"


@dataclass(frozen=True)
class SplitLaunch:
    """Keys per tile, warps and pipeline depth of a split program, and where they were measured."""

    block_n: int
    warps: int
    stages: int
    source: str = UNMEASURED
    resident: int = 2  # programs that run at once on a multiprocessor


@dataclass(frozen=True)
class TileLaunch:
    """Rows and keys per tile, warps and pipeline depth of a prefill program, and where they were measured."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    source: str = UNMEASURED


Row = TypeVar("Row", SplitLaunch, TileLaunch)


def fitting(row: Row, F: Features, block_m: int, target: Target) -> Row:
    """The row with fewer stages, then fewer keys, until the buffers of ``block_m`` rows fit the target's shared memory.

    A stage holds a tile of K and one of V. Query rows and p come on top, for they pass through shared memory, and so do
    decoded tiles. Pairs are decoded in registers.
    """
    element = 4 if F.fp32 else 2
    columns = F.block_d + F.block_dv
    stored = columns * (1 if F.quantised and not F.pairs else element)
    block_n, stages = row.block_n, row.stages

    def used() -> int:
        decoded = block_n * columns * element if F.quantised and not F.pairs else 0
        return stages * block_n * stored + block_m * (F.block_d + block_n) * element + decoded

    least = 32 if F.compute_int8 else 16  # keys that a product with V takes
    while used() > target.shared_bytes and (stages > 1 or block_n > least):
        stages, block_n = (stages - 1, block_n) if stages > 1 else (1, block_n // 2)
    return replace(row, block_n=block_n, stages=stages)
