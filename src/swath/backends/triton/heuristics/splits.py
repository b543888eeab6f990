"""Decode: which sequences splits take, how many rows a program has, and how visible keys are cut into slices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from swath.backends.triton.features import Features
from swath.backends.triton.heuristics.launch import SplitLaunch, fitting
from swath.backends.triton.work import Work
from swath.cache import PagedKeys
from swath.problem import Problem
from swath.target import Target
from swath.window import LARGEST_SIZE

MAX_STEPS = 16
"""Query tokens that a sequence may have to be decoded by splits; longer ones are cut into tiles."""
MIN_SPLIT_TILES = 4
"""Key tiles that a slice should have: shorter ones cost more in the reduce than they win."""
MAX_SPLIT_KEYS = 32768
"""Keys that the slices on a multiprocessor may have at most together: in a ragged batch all wait for the longest.
128 sequences of 128 to 65,536 keys took 1.50 times their floor uncut and 1.04 so; over int8 keys 3.23 and 1.24."""
LEAST_SPLIT_TILES = 16
"""Key tiles from which short sequences of a ragged batch are not cut further, however long others may be."""
SHORT_RUN = 2048
"""Keys in sight up to which wide heads over 8-bit keys have programs of 16 rows."""
MAX_ROUNDS = 5
"""Rounds of programs beyond which an uneven last one matters little."""
FULL = 0.92
"""Share of the places, over all rounds, that must be taken. 81 sequences with heads of 256 took 237 us in three slices,
which take 0.9205 of them, and 245 in 13, which take 0.997 (H100)."""


@dataclass(frozen=True)
class Slices:
    """How the visible keys of a sequence are cut: at most ``count`` slices, in tiles of ``launch``.

    least_tiles: of an even cut, tiles that a slice has at least.
    tiles: of a cut at multiples of ``split_size``, tiles between two; 0 for an even cut.
    """

    launch: SplitLaunch
    count: int
    least_tiles: int = 1
    tiles: int = 0


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; Triton's own costs microseconds on the host."""
    return -(-a // b)


def is_mixed(problem: Problem) -> bool:
    """Whether sequences of a few query tokens may stand beside longer ones.

    None does where the rows are too many for it, as in a single prefill or in chunks that are all whole: two launches
    that would find nothing took 8 of 742 us for 8,192 tokens. With split_size no bit may depend on how many rows there
    are.
    """
    if problem.cu_seqlens_q is None or problem.max_q_len <= MAX_STEPS:
        return False
    most = (problem.num_seqs - 1) * problem.max_q_len + MAX_STEPS  # rows, if one sequence has a few
    return problem.split_size is not None or problem.q.shape[0] <= most


def split_steps(problem: Problem) -> int:
    """Query tokens of a sequence up to which splits take it; 0: all sequences are for tiles."""
    if not isinstance(problem.keys, PagedKeys):
        return 0
    if problem.cu_seqlens_q is None:
        return problem.steps if problem.steps <= MAX_STEPS else 0
    if problem.max_q_len <= MAX_STEPS:
        return problem.max_q_len
    return MAX_STEPS if is_mixed(problem) else 0


def split_rows(work: Work, steps: int) -> int:
    """Rows (steps x group) of a split program.

    With split_size they must not depend on the batch: a row's bits would. Over 8-bit keys 32 are most: 8 steps of
    groups of 4 over int8 took 386 us so, 461 in programs of 16 rows. In a mixed batch most sequences have one token:
    programs for the rows of more find none, and return.

    int8 products under bounds have 32 at most, too: 64 are multiplied by a warp group, and ptxas of CUDA 12.8 lost the
    address of V there (docs/notes/reliability.md).
    """
    F, problem = work.features, work.problem
    few = F.pairs or (F.compute_int8 and F.bounds)
    crowded = few and F.head_dim > 128 and not wide_heads_pay(work, steps)
    if F.fp32 or is_mixed(problem) or problem.split_size is not None or crowded:
        return 16
    return next((m for m in (16, 32) if steps * F.group <= m), 32 if few else 64)


def wide_heads_pay(work: Work, steps: int) -> bool:
    """Whether programs of 32 rows pay for heads wider than 128 over 8-bit keys, which they then read half as often.

    With heads of 256 8 steps of groups of 4 took 309 us so, 413 in programs of 16 rows. Scales of tokens take registers
    that such rows do not leave: 4 steps of four sequences of 32,768 keys took 83 us, and 72. With V's heads of 128 they
    do: 244 and 394. Over few keys no program reads much: 16 sequences of 2,048 took 36.4 and 34.6.
    """
    F = work.features
    fits = F.pairs and F.head_dim <= 256 and (F.v_head_dim <= 128 or not F.token_scales)
    return fits and keys_in_sight(work.problem, steps) > SHORT_RUN


def keys_in_sight(problem: Problem, queries: int) -> int:
    """Keys that neighbouring queries may see together.

    With split_size, when no bit may depend on a bound, as the window alone says; counts of leading keys in a tensor,
    whose bound is a promise too, are taken for few, and bounds of rows for ones that show everything.
    """
    window = problem.window
    if problem.split_size is None:
        return window.visible_guess(queries, problem.max_kv_len)
    if isinstance(window.global_tokens, Tensor):
        window = replace(window, global_tokens=0, max_global_tokens=None)
    return window.visible_bound(queries, LARGEST_SIZE)


def num_splits(owners: int, tiles: int, launch: SplitLaunch, num_sms: int) -> int:
    """How many slices to cut the visible keys into, for ``owners`` = sequences x kv heads x row tiles.

    Sequences of one length make slices that take about as long, so a round that is half empty costs as much as a full
    one: the fewest slices that fill their rounds, or else those that fill them best. Measured: 8 owners want 33 slices
    of 264 places (64 slices were 8 % slower).
    """
    places = launch.resident * num_sms
    fewest = ceil_div(tiles * launch.block_n * launch.resident, MAX_SPLIT_KEYS)
    most = max(1, fewest, min(tiles // MIN_SPLIT_TILES, ceil_div(MAX_ROUNDS * places, owners)))
    first_round = max(1, fewest, min(places // owners, most))
    return max(range(first_round, most + 1), key=lambda n: (min(filled(owners * n, places), FULL), -n))


def filled(programs: int, places: int) -> float:
    """The share of the places that programs take, over all their rounds."""
    return programs / (places * ceil_div(programs, places))


def even_slices(launch: SplitLaunch, count: int, tiles: int) -> Slices:
    """``count`` slices of a batch whose longest sequence has ``tiles``: the others are cut less."""
    return Slices(launch, count, least_tiles=min(max(ceil_div(tiles, count), 1), LEAST_SPLIT_TILES))


def fixed_slices(launch: SplitLaunch, split_size: int, visible: int) -> Slices:
    """Slices at multiples of ``split_size`` that hold ``visible`` keys, in tiles that divide it."""
    launch = replace(launch, block_n=min(launch.block_n, split_size & -split_size))
    # Up to three are filled in part: by the last of the leading keys, the first and the last of the others.
    return Slices(launch, ceil_div(visible, split_size) + 3, tiles=split_size // launch.block_n)


def in_step(launch: SplitLaunch, F: Features, block_m: int, programs: int, target: Target) -> SplitLaunch:
    """The launch for several rounds of 16-bit decode: one stage more, so that only ``resident`` programs fit at once.

    A third one would come and go between the others. Measured: 64 x 4 tokens under a window of 4,096 took 306 us with
    three stages and 259 with four.
    """
    whole = 64 < F.head_dim <= 128 and not F.padded
    if F.quantised or programs <= launch.resident * target.num_sms or not whole:
        return launch
    return fitting(replace(launch, stages=launch.stages + 1), F, block_m, target)
