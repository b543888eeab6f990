"""How kernels are launched: pure functions of the case and the target.

A row of a table says where it was measured, or "unmeasured, compiles". No autotuning happens when serving: rows come
from ``swath bench tune`` and are pasted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from swath.backends.triton.features import STORED, Features
from swath.cache import PagedKeys
from swath.pages import page_count
from swath.problem import Problem
from swath.target import Target
from swath.window import Window


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; Triton's own costs microseconds on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class TileLaunch:
    """Tile shape and pipeline of a kernel, and where that was measured."""

    block_n: int
    warps: int
    stages: int
    source: str
    resident: int = 2  # programs that run at once on a multiprocessor

    @property
    def options(self) -> dict[str, int]:
        """As the compiler takes them."""
        return {"num_warps": self.warps}


UNMEASURED = "unmeasured, compiles"
H200 = "H200, torch 2.11, Triton 3.6, 2026-11-21"


LARGEST_BOUND = 1 << 30
SHORT_RUN = 2048
"""Keys up to which a slice is over before a deep pipeline pays."""


def keys_in_sight(problem: Problem, queries: int) -> int:
    """Keys that neighbouring queries may see together; with split_size, when no bit may depend on bounds, as the window
    alone says."""
    most = problem.max_kv_len if problem.split_size is None else LARGEST_BOUND
    return problem.window.visible_bound(queries, most)


def is_short_run(problem: Problem) -> bool:
    """Whether a query sees few keys."""
    return keys_in_sight(problem, 1) <= SHORT_RUN


def split_launch(F: Features, target: Target, block_m: int, short_run: bool) -> TileLaunch:
    """Decode: keys per tile, warps and pipeline depth for ``block_m`` rows."""
    source = H200 if target.arch == "sm_90" else UNMEASURED
    if F.interpret:
        launch = TileLaunch(32, 1, 1, "interpreter")
    elif F.fp32:
        launch = TileLaunch(16, 4, 1, UNMEASURED)
    elif target.compute_capability == 0:
        launch = TileLaunch(64, 4, 2, UNMEASURED)
    elif F.pairs and block_m > 16:
        launch = TileLaunch(64, 4 if F.padded else 2, 3, source, resident=4)
    elif F.pairs and short_run and F.head_dim <= 128:
        launch = TileLaunch(32, 1, 2, source, resident=8)
    elif F.pairs:
        launch = TileLaunch(64, 2, 3, source, resident=4)
    elif F.head_dim <= 64 and block_m == 16:
        launch = TileLaunch(64, 2, 3, source, resident=4)
        if short_run:
            launch = TileLaunch(32, 1, 4, source, resident=8)
    elif F.head_dim <= 128 and F.padded:
        launch = TileLaunch(32, 2, 4, source, resident=4)
        if F.head_dim > 80:
            launch = TileLaunch(32, 4, 4, source, resident=3)
    elif F.padded:
        launch = TileLaunch(32, 4, 3, source)
    else:
        launch = TileLaunch(64, 4, 3 if F.head_dim <= 128 else 2, source)
    return fitting(launch, F, block_m, target)


def fitting(launch: TileLaunch, F: Features, block_m: int, target: Target) -> TileLaunch:
    """The launch with fewer stages, then fewer keys, until its buffers fit the target's shared memory.

    A stage holds a tile of K and one of V; query rows and p on their way through shared memory come on top.
    """
    element = 4 if F.fp32 else 2
    row = F.block_d * (1 if F.stored != "wide" and not F.pairs else element)
    block_n, stages = launch.block_n, launch.stages

    def used() -> int:
        decoded = 2 * block_n * F.block_d * element if F.stored != "wide" else 0
        return 2 * stages * block_n * row + block_m * (F.block_d + block_n) * element + decoded

    while used() > target.shared_bytes and (stages > 1 or block_n > 16):
        stages, block_n = (stages - 1, block_n) if stages > 1 else (1, block_n // 2)
    return replace(launch, block_n=block_n, stages=stages)


def tile_launch(F: Features, target: Target, short: bool) -> tuple[int, TileLaunch]:
    """Prefill: rows per tile, then keys per tile, warps and pipeline depth; ``short``: the window is a few tiles."""
    source = H200 if target.arch == "sm_90" else UNMEASURED
    if F.interpret:
        # Its time goes by programs: large groups do with fewer.
        block_m, launch = 128 if F.group > 32 else 32, TileLaunch(32, 1, 1, "interpreter")
    elif F.fp32:
        block_m, launch = 16, TileLaunch(16, 4, 1, UNMEASURED)
    elif F.stored != "wide":
        block_m, launch = 64, TileLaunch(32, 8, 2, UNMEASURED)
    elif F.head_dim <= 64 and short:
        block_m, launch = 64, TileLaunch(32, 4, 2, source)
    elif F.head_dim <= 64:
        block_m, launch = 128, TileLaunch(64, 4, 3, source)
    elif F.head_dim <= 128:
        block_m, launch = 64, TileLaunch(64, 4, 3, source)
    else:
        block_m, launch = 64, TileLaunch(32, 4, 2, UNMEASURED)
    return block_m, fitting(launch, F, block_m, target)


def split_rows(F: Features, problem: Problem, steps: int) -> int:
    """Rows (steps x group) of a split program.

    With split_size they must not depend on the batch: a row's bits would. Over 8-bit keys 32 are most: 8 steps of
    groups of 4 over int8 took 386 us so, 461 in programs of 16 rows; with wide heads they are more than the registers
    hold. In a mixed batch most sequences have one token: programs for the rows of more find none, and return.
    """
    if F.fp32 or is_mixed(problem) or problem.split_size is not None or (F.pairs and F.head_dim > 128):
        return 16
    return next((m for m in (16, 32) if steps * F.group <= m), 32 if F.pairs else 64)


MAX_STEPS = 16
"""Query tokens that a sequence may have to be decoded by splits; longer ones are cut into tiles."""


def is_mixed(problem: Problem) -> bool:
    """Whether sequences of a few query tokens, if any, stand beside longer ones."""
    return problem.cu_seqlens_q is not None and problem.max_q_len > MAX_STEPS


def tile_slots(problem: Problem, positions: int) -> tuple[int, int]:
    """Query tokens of each sequence (0 in a ragged batch), and the slots of a flat list of tiles of ``positions``."""
    if problem.cu_seqlens_q is not None:
        return 0, problem.q.shape[0] // positions + problem.num_seqs
    return problem.steps, problem.num_seqs * ceil_div(problem.steps, positions)


def most_unclaimed(problem: Problem) -> int:
    """How many sequences splits may leave to tiles: in a ragged batch these have more than MAX_STEPS query tokens."""
    if problem.cu_seqlens_q is None:
        return problem.num_seqs
    return min(problem.num_seqs, problem.q.shape[0] // (MAX_STEPS + 1))


SCRATCH_BYTES = 512 << 20
"""Most that a call may take to hold dequantised pages."""
DEQUANTISE_ROWS = 512
"""Query rows (tokens x group) from which copying a page once costs less than decoding it in every tile that reads it.
Measured on an H200: 2,048 tokens over 16,384 int8 keys took 8.5 ms (channel) and 13 ms (token) decoding in the tiles,
where 16-bit tiles took 6.1."""


def dequantises(problem: Problem) -> bool:
    """Whether a prefill over an 8-bit cache copies visible pages into 16-bit scratch first."""
    keys = problem.keys
    if not isinstance(keys, PagedKeys) or keys.cache.k.dtype not in STORED or problem.compute != "float":
        return False
    if problem.q.dtype not in (torch.bfloat16, torch.float16) or problem.split_size is not None:
        return False  # with split_size no bit may depend on how large the batch is
    return problem.max_q_len * problem.group >= DEQUANTISE_ROWS and scratch_rows(problem, keys) > 0


def table_pages(problem: Problem, keys: PagedKeys) -> int:
    """Pages that a sequence may have."""
    return page_count(min(problem.max_kv_len, keys.capacity), keys.cache.page_size)


def scratch_pages(problem: Problem, keys: PagedKeys) -> int:
    """Pages of scratch for a sequence: as many as its queries may see together."""
    visible = problem.window.visible_bound(problem.max_q_len, problem.max_kv_len)
    # Up to three pages are seen in part: the last of the leading keys, the first and the last of the others.
    return min(page_count(visible, keys.cache.page_size) + 2, table_pages(problem, keys))


def scratch_rows(problem: Problem, keys: PagedKeys) -> int:
    """How many sequences have room in the scratch, table included: all that may need it, or as many as fit.

    In a mixed batch each sequence may be a chunk, as far as the host knows; the device gives rows to those that are.
    """
    pages = scratch_pages(problem, keys)
    row = pages * keys.cache.page_size * keys.num_kv_heads * problem.head_dim * 2 * problem.q.element_size()
    table = problem.num_seqs * table_pages(problem, keys) * torch.int32.itemsize
    return min(most_unclaimed(problem), max(SCRATCH_BYTES - table, 0) // row) if row else 0


SHORT_WINDOW = 512
"""Windows up to this size see so few tiles that small tiles and packed heads pay."""


def is_short(window: Window) -> bool:
    """Whether a window is a few tiles wide."""
    return window.size is not None and window.size <= SHORT_WINDOW


MIN_SPLIT_TILES = 4
"""Key tiles that a slice should have: shorter ones cost more in the reduce than they win."""
MAX_SPLIT_KEYS = 32768
"""Keys that the slices on a multiprocessor may have at most together: in a ragged batch all wait for the longest.
128 sequences of 128 to 65,536 keys took 1.50 times their floor uncut and 1.04 so; over int8 keys 3.23 and 1.24."""
LEAST_SPLIT_TILES = 16
"""Key tiles from which short sequences of a ragged batch are not cut further, however long others may be."""
MAX_ROUNDS = 5
"""Rounds of programs beyond which an uneven last one matters little."""
FULL = 0.92
"""Share of the places, over all rounds, that must be taken. 81 sequences with heads of 256 took 237 us in three slices,
which take 0.9205 of them, and 245 in 13, which take 0.997 (H100)."""


def num_splits_for(owners: int, tiles: int, launch: TileLaunch, num_sms: int) -> int:
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


def least_tiles_for(tiles: int, num_splits: int) -> int:
    """Tiles that a slice has at least in a batch whose longest sequence has ``tiles``: the others are cut less."""
    return min(max(ceil_div(tiles, num_splits), 1), LEAST_SPLIT_TILES)


def in_step(launch: TileLaunch, F: Features, block_m: int, programs: int, target: Target) -> TileLaunch:
    """The launch for several rounds of 16-bit decode: one stage more, so that only ``resident`` programs fit at once.

    A third one would come and go between the others. Measured: 64 x 4 tokens under a window of 4,096 took 306 us with
    three stages and 259 with four.
    """
    whole = 64 < F.head_dim <= 128 and not F.padded
    if F.stored != "wide" or programs <= launch.resident * target.num_sms or not whole:
        return launch
    return fitting(replace(launch, stages=launch.stages + 1), F, block_m, target)


def filled(programs: int, places: int) -> float:
    """The share of the places that programs take, over all their rounds."""
    return programs / (places * ceil_div(programs, places))


def pack_heads(group: int, short: bool, block_m: int) -> int:
    """Heads of a kv head's group packed into a row tile: all of them where a short window makes that pay.

    A tile of M positions with window W visits M + W keys; packed with G heads it visits M / G + W.
    """
    power = group & (group - 1) == 0
    return group if short and power and 1 < group <= block_m // 4 else 1
