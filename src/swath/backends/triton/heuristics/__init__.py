"""How kernels are launched: ``Heuristics``, pure functions of a call and a target.

Rows are tables by vendor (``nvidia.py``, ``amd.py``): tile shapes, warps, stages, and where they were measured. Rules
that hold for every GPU stand beside them: ``splits.py`` for decode, ``tiles.py`` and ``dequantise.py`` for prefill.
No autotuning happens when serving: rows come from ``swath bench tune`` and are pasted.

A GPU that runs Triton's kernels takes a row of its vendor's table, or a new one there. A GPU that has tiles of its own
is a folder beside ``hopper``, whose docstring says what is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from swath.backends.triton.heuristics import amd, interpreter, nvidia, splits
from swath.backends.triton.heuristics.dequantise import CopyTypes, copies
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch, fitting
from swath.backends.triton.heuristics.tiles import is_short
from swath.backends.triton.work import Work
from swath.problem import Problem
from swath.target import Target


def table_of(target: Target) -> ModuleType:
    """The rows of the target's vendor."""
    if target.interpret:
        return interpreter
    return nvidia if target.compute_capability else amd


def split_launch(work: Work, block_m: int) -> SplitLaunch:
    """Decode: the table's row for ``block_m`` rows, as it fits the target."""
    keys = splits.keys_in_sight(work.problem, 1)
    row: SplitLaunch = table_of(work.target).split_row(work.features, block_m, keys)
    return fitting(row, work.features, block_m, work.target)


def tile_launch(work: Work) -> TileLaunch:
    """Prefill: the table's row, as it fits the target."""
    row: TileLaunch = table_of(work.target).tile_row(work.features, is_short(work.problem))
    return fitting(row, work.features, row.block_m, work.target)


@dataclass(frozen=True)
class Heuristics:
    """What the planner asks. A backend with tiles of its own extends it; ``swath bench tune`` hands in one with a row
    replaced.

    - split_steps: query tokens of a sequence up to which splits take it, 0 for none
    - split_rows: rows of a split program, for work of that many steps
    - split_launch: of splits with that many rows
    - num_splits: slices of visible keys, for owners, tiles of keys, the launch and multiprocessors
    - copies: whether visible 8-bit pages are copied for tiles first, and as what; None for no
    - tile_launch: of Triton's tiles
    """

    split_steps: Callable[[Problem], int] = splits.split_steps
    split_rows: Callable[[Work, int], int] = splits.split_rows
    split_launch: Callable[[Work, int], SplitLaunch] = split_launch
    num_splits: Callable[[int, int, SplitLaunch, int], int] = splits.num_splits
    copies: Callable[[Problem], CopyTypes | None] = copies
    tile_launch: Callable[[Work], TileLaunch] = tile_launch


TRITON = Heuristics()
"""The tables and rules as they are."""
