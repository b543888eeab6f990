"""Prefill: how query tokens and heads are laid into row tiles."""

from __future__ import annotations

from swath.backends.triton.heuristics.splits import ceil_div
from swath.problem import Problem

SHORT_WINDOW = 512
"""Windows up to this size see so few tiles that small tiles and packed heads pay."""


def is_short(problem: Problem) -> bool:
    """Whether a window is a few tiles wide, or what bounds are said to show; not with split_size, when no bit may
    depend on a promise."""
    window = problem.window
    size = window.max_visible if problem.split_size is None and window.bounds is not None else window.size
    return size is not None and size <= SHORT_WINDOW


def pack_heads(group: int, short: bool, block_m: int) -> int:
    """Heads of a kv head's group packed into a row tile: all of them where a short window makes that pay.

    A tile of M positions with window W visits M + W keys; packed with G heads it visits M / G + W.
    """
    power = group & (group - 1) == 0
    return group if short and power and 1 < group <= block_m // 4 else 1


def tile_slots(problem: Problem, positions: int) -> tuple[int, int]:
    """Query tokens of each sequence (of a ragged batch: of all), and the slots of a flat list of tiles of
    ``positions``."""
    if problem.cu_seqlens_q is not None:
        return problem.q.shape[0], problem.q.shape[0] // positions + problem.num_seqs
    return problem.steps, problem.num_seqs * ceil_div(problem.steps, positions)
