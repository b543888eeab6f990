"""How tiles are launched on Hopper: launch rows, measured on an H200, and what is for splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swath.backends.triton.features import Features
from swath.backends.triton.heuristics import Heuristics
from swath.backends.triton.heuristics.dequantise import CopyTypes, copy_pays
from swath.backends.triton.heuristics.splits import (
    FULL,
    MAX_STEPS,
    ceil_div,
    filled,
    is_mixed,
    keys_in_sight,
    split_steps,
)
from swath.backends.triton.heuristics.tiles import SHORT_WINDOW, is_short, pack_heads
from swath.backends.triton.work import Work
from swath.cache import PagedKeys, PagedKV
from swath.problem import Problem
from swath.quant import E4M3_KEYS
from swath.window import LARGEST_SIZE


@dataclass(frozen=True)
class HopperLaunch:
    """Tile shape and pipeline of kernel.py."""

    block_n: int
    stages: int  # of keys and of values
    q_stages: int  # of query rows; from two of them results leave as boxes (epilogue.py)
    consumers: int = 2  # warpgroups of 64 rows in a program
    programs: int = 1  # that run at once on a multiprocessor
    consumer_registers: int = 240  # a thread's
    producer_registers: int = 24
    registers: int | None = None  # before they are shared out so, where the compiler's choice lets fewer programs run
    pack: int = 1
    box_rows: int = 0
    uniform: bool = False
    narrow_n: int = 0  # keys of a narrow tile: it and one of ``block_n`` hold all that a row tile sees
    sections: bool = False  # whether heads are taken in sections whose keys the L2 cache holds, not all at once

    @property
    def narrow_rows(self) -> int:
        """Keys of the narrow tile that are fetched at once."""
        return min(self.narrow_n, self.box_rows)


SIXTEEN_BITS = (torch.bfloat16, torch.float16)
MOST_V_COLUMNS = 256
"""The most columns of V in one launch: the registers of a warpgroup hold no wider accumulator."""
TILE_ROWS = 128
"""Rows of a tile of two consumers."""
FEW_KEYS = 1024
"""Keys that a row tile sees up to which programs of one consumer win: short runs leave the tensor cores idle at their
ends, and two consumers of one program reach theirs together. 32 ragged sequences of up to 1,024 keys took 274 us so and
348 with two consumers; windows of 257 in sequences of up to 4,096 keys 709 and 1,127; a window of 1,024 1,058 and 972.
"""
SOME_KEYS = 1280
"""Keys that a row tile sees under a window of 1,024, at most."""
FEW_ROWS = 1 << 16
"""Query rows (tokens x heads) up to which one consumer wins with ``SOME_KEYS`` too, as it does over pages, whose tables
are read before a row tile: under a window of 1,024 2,048 tokens of 32 heads took 64 us so and 72 with two, 4,096 tokens
129 and 130, four chunks of 2,048 tokens over pages of 16 304 and 312."""
PACKED_TOKENS = 2048
"""Mean query tokens of a sequence up to which the heads of a group are packed: rows of a half-empty last tile are then
positions of all its heads. 32 ragged sequences took, packed and not: 227 and 275 us (up to 511 tokens each), 2,786 and
3,118 (up to 2,047), 8,340 and 8,900 (up to 4,095); one of 8,192 tokens 788 and 781. Chunks that are all whole tiles
have no such rows: four of 2,048 tokens under a window of 1,024 took 277 and 267."""
MANY_KEYS = 4096
"""Heads of 512 are packed where a window shows a row at most this many keys. Not packed, a row tile has 128 positions,
packed it has 16. The larger one visits four more tiles of 32 keys, and makes their scores twice. 16,384 tokens of 32/4
heads took, packed and not: 1,933 and 2,154 us under a window of 512, 3,003 and 3,236 of 1,024, 5,186 and 5,361 of
2,048, 9,166 and 9,250 of 4,096."""
SECTION_KEYS = 8192
"""Keys that rows with bounds may see beyond which heads are taken in sections, as without a window: their order costs
the load warp 110 instructions a work tile, which show under a window of 1,024. Spans of images over 16,384 keys took
5,627 us so and 5,702 with all heads at once."""
VERY_FEW_KEYS = 256
"""Of rows of 64: a window of 128 took 340 us in four programs with tiles of 32 keys, 406 in three with tiles of 64."""
ONE_PASS = (
    HopperLaunch(128, 2, 2, consumers=2, programs=2, consumer_registers=104, registers=80, narrow_n=16),
    HopperLaunch(128, 1, 2, consumers=1, programs=3, consumer_registers=136, registers=80, narrow_n=16),
)
"""For heads of 64 whose row tiles see 144 keys at most, as under a window of 128 with 8 heads packed. Two consumers
load keys once for both, one sees fewer. Two took 244 us, one 289, and five tiles of 32 keys 329."""


def one_pass(F: Features, problem: Problem, pack: int) -> HopperLaunch | None:
    """The first of ``ONE_PASS`` that holds all keys that the rows of a tile see, by the window alone.

    Bounds of lengths and of leading keys are promises of the caller, on which no result may hang. Pages widen the list
    of keys to whole boxes: 143 keys may touch ten boxes of 16, so those stay with the loop over tiles.
    """
    if F.head_dim != 64 or F.lead != "" or F.dots:
        return None
    for launch in ONE_PASS:
        keys = problem.window.visible_bound(64 * launch.consumers // pack, LARGEST_SIZE)
        if F.page_size > 0:
            box = box_rows(F, launch)
            keys = (ceil_div(max(keys - 1, 0), box) + 1) * box
        if keys <= launch.block_n + launch.narrow_n:
            return launch
    return None


def hopper_launch(work: Work) -> HopperLaunch:
    """Prefill on sm_90: as many stages and registers as a multiprocessor has, in one program or several."""
    problem, F = work.problem, work.features
    # Few leading keys fit into the last tile of a window, if that is not full: packed rows see fewer keys.
    packed = is_short(problem) or F.lead != "" or few_tokens(problem) or problem.max_q_len <= MAX_STEPS
    pack = heads_in_tile(problem, packed or (F.head_dim > 256 and not sees_many(problem)))
    launch = one_pass(F, problem, pack) or looped_launch(F, problem)
    launch = replace(launch, pack=pack, box_rows=box_rows(F, launch), uniform=problem.q.dim() == 4)
    return replace(launch, sections=not F.window or (F.bounds and keys_of_tile(problem) > SECTION_KEYS))


def heads_in_tile(problem: Problem, pays: bool) -> int:
    """Heads of a kv head's group in a row tile: all where that pays, if they are neighbours, as in a box of q."""
    return 1 if problem.interleaved else pack_heads(problem.group, pays, 64)


def keys_of_tile(problem: Problem) -> int:
    """Keys that a row tile may see, if its heads are not packed."""
    return keys_in_sight(problem, TILE_ROWS)


def sees_many(problem: Problem) -> bool:
    """Whether a window may show rows more than ``MANY_KEYS``, by itself: how many keys there are does not count."""
    if problem.split_size is None:
        return problem.window.visible_guess(1, LARGEST_SIZE) > MANY_KEYS
    return keys_in_sight(problem, 1) > MANY_KEYS


def looped_launch(F: Features, problem: Problem) -> HopperLaunch:
    """For row tiles that may see any number of key tiles."""
    if F.dots:
        return narrow_keys_launch(F, problem)
    keys = keys_of_tile(problem)
    few = keys <= (SOME_KEYS if F.page_size > 0 or few_rows(problem) else FEW_KEYS)
    if F.head_dim > 256:  # of which V's columns are one half, as in ``hopper_tiles``
        return HopperLaunch(32, 2, 1)
    if F.v_head_dim > 128:
        return HopperLaunch(64, 2, 1)
    if F.head_dim > 128:
        return narrow_values_launch(F, few)
    if F.head_dim == 128 and (few or problem.max_q_len <= MAX_STEPS):
        return HopperLaunch(
            64, 2, 2, consumers=1, programs=2, consumer_registers=216, producer_registers=40, registers=128
        )
    if keys <= VERY_FEW_KEYS:
        return HopperLaunch(32, 3, 2, consumers=1, programs=4, consumer_registers=104, registers=64)
    if few:
        return HopperLaunch(64, 2, 2, consumers=1, programs=3, consumer_registers=136, registers=80)
    return HopperLaunch(128, 2 if F.head_dim > 64 else 4, 2)


def narrow_keys_launch(F: Features, problem: Problem) -> HopperLaunch:
    """For 8-bit queries and keys, which take half the room; with V in e4m3 a tile takes half in all.

    Heads of 128, 8,192 tokens: tiles of 64 keys took 18 to 25 % more. Under a window of 1,024, 2 x 16,384 tokens of fp8
    queries: one consumer took 825 us, two 844; with V in e4m3 one 887, two 815. For few keys and heads of 64 or 256
    nothing else was measured.
    """
    few = keys_of_tile(problem) <= SOME_KEYS
    if F.head_dim > 128:
        return HopperLaunch(64, 3, 1)
    if F.head_dim == 128 and few and not F.v_e4m3:
        return HopperLaunch(
            64, 3, 2, consumers=1, programs=2, consumer_registers=216, producer_registers=40, registers=128
        )
    if F.head_dim == 64 and few:
        return HopperLaunch(64, 3, 2, consumers=1, programs=3, consumer_registers=136, registers=80)
    return HopperLaunch(128, 4 if F.head_dim == 64 or F.v_e4m3 else 3, 2)


def narrow_values_launch(F: Features, few: bool) -> HopperLaunch:
    """For keys of 192 or 256 and values of at most 128, whose accumulators take no more registers than those of 128.

    Keys of 192 leave no room for a second stage of queries; tiles of 64 keys, which do, were 1 to 9 % slower. For few
    keys, and of 256, nothing else was measured.
    """
    if F.head_dim > 192:
        return HopperLaunch(64, 2, 2)
    if few:
        return HopperLaunch(
            64, 2, 1, consumers=1, programs=2, consumer_registers=216, producer_registers=40, registers=128
        )
    return HopperLaunch(128, 2, 1)


def few_rows(problem: Problem) -> bool:
    """Whether a call has few rows of 128; never with split_size, when no bit may depend on how many."""
    return problem.head_dim == 128 and problem.split_size is None and problem.q.shape[:-1].numel() <= FEW_ROWS


def few_tokens(problem: Problem) -> bool:
    """Whether a ragged batch has short sequences on average, not all whole tiles; never with split_size, when no bit
    may depend on that."""
    if problem.cu_seqlens_q is None or problem.split_size is not None:
        return False
    tokens, longest = problem.q.shape[0], problem.max_q_len
    whole = tokens == longest * problem.num_seqs and longest % TILE_ROWS == 0
    return not whole and tokens <= PACKED_TOKENS * problem.num_seqs


def copies(problem: Problem) -> CopyTypes | None:
    """What pages are copied as for tiles: 16 bits, types for products in 8 bits, or nothing.

    K that multiplies as it is stored stays where it is, if boxes can be fetched there. They are as large as those of a
    copy, which has the cache's pages, so that the copy saved nothing: with that, and fp8 queries read where they lie,
    8,192 tokens of 32 heads of 128 took 654 us, 726 before, and four chunks over pages of 16 2,583 and 2,602.
    """
    keys = problem.keys
    if not isinstance(keys, PagedKeys):
        return None
    types = products(problem, keys.cache)
    if types is None:
        return None
    types = replace(types, k_stays=bool(types.dots) and in_boxes(keys.cache.k))
    return types if copy_pays(problem, types) else None


def products(problem: Problem, cache: PagedKV) -> CopyTypes | None:
    """In which types a prefill multiplies, if a copy of its 8-bit pages pays; None for what tiles decode.

    fp8 queries multiply as they are, so that K's scales must be ones that scores can take. int8 products are made where
    they are faster, for all scores are converted and queries take a pass: 8,192 tokens of 16 heads of 256 took 607 us
    so and 779 in 16 bits, of 32 heads of 128 706 and 771; chunks of 2,048 tokens at 16,384 keys 2,495 and 2,997. Before
    maxima were taken of integers 64 heads of 64 took 1,259 and 1,101, those chunks under a window of 1,024 317 and 294.
    For ``compute="fast"`` int8 keys multiply by the same rule, and p and V beside fp8 queries by ``fast_values``.
    """
    wide = problem.q.dtype in SIXTEEN_BITS
    pays = problem.head_dim in (128, 256) and keys_of_tile(problem) > SOME_KEYS
    if problem.compute == "int8":
        return CopyTypes("int8" if pays else "") if wide else None
    if problem.q.dtype == torch.float8_e4m3fn:
        takes = cache.k.dtype == problem.q.dtype and cache.quant.k in ("none", "tensor", "head")
        return CopyTypes("e4m3", fast_values(problem, cache)) if takes else None
    if problem.compute == "fast" and pays and wide and cache.k.dtype == torch.int8 and has_static_scales(cache):
        return CopyTypes("int8")
    return CopyTypes() if wide else None


def fast_values(problem: Problem, cache: PagedKV) -> bool:
    """Whether p and V multiply in e4m3 beside fp8 queries: if the caller allows it, the window keeps sums short, keys
    lie side by side in whole boxes of a page, results can take the scales, no row has bounds, and it is faster.

    It is with heads of 128: 2 x 16,384 tokens under a window of 1,024 took 849 us so and 872 with V in 16 bits. With
    heads of 256 they took 746 and 729, of 64 under a window of 128 544 and 389. ``max_kv_len`` and
    ``max_global_tokens`` do not count: on a hint no result may hang.
    """
    if problem.compute != "fast" or problem.window.bounds is not None or problem.head_dim != 128:
        return False
    window = replace(problem.window, max_global_tokens=None)
    keys = window.visible_bound(TILE_ROWS, problem.keys.capacity)
    fits = problem.v_head_dim == 128 and cache.page_size % BOX_ROWS == 0 and has_static_scales(cache)
    return fits and keys <= E4M3_KEYS


def has_static_scales(cache: PagedKV) -> bool:
    """Whether no scale is a token's own."""
    return "token" not in (cache.quant.k, cache.quant.v_granularity)


def mixed_steps(problem: Problem) -> int:
    """Query tokens of a sequence up to which splits take it: those of a mixed batch alone, the others are for tiles."""
    return split_steps(problem) if is_mixed(problem) else 0


@dataclass(frozen=True)
class HopperHeuristics(Heuristics):
    """Triton's for decode in a mixed batch, and the launch of Hopper's tiles."""

    copies: Callable[[Problem], CopyTypes | None] = copies
    split_steps: Callable[[Problem], int] = mixed_steps
    hopper_launch: Callable[[Work], HopperLaunch] = hopper_launch


HOPPER = HopperHeuristics()
"""The rows and rules as they are."""

MOST_SPLIT_ROWS = 16
"""Query rows (tokens x group) of a sequence up to which splits keep up over 16-bit keys."""


def decodes_in_tiles(problem: Problem, num_sms: int) -> bool:
    """Whether sequences of a few query tokens run as tiles: those that see about 1,024 keys, as under a window, or have
    many rows, where they are enough to fill all places without being cut, and a row tile has all heads of a group.

    Programs that stay ask for the keys of the next owner while they attend those of one; as splits each begins with
    three trips to memory in turn. 128 sequences under a window of 1,024 took 131 us so and 135 as splits, 4 tokens each
    in groups of 8 134 and 153, and over up to 8,192 keys 587 and 642; with heads of 64 under a window of 128 19 and 16,
    and 64 sequences of 8,192 keys 495 and 494.
    """
    keys = problem.keys
    if not isinstance(keys, PagedKeys) or problem.split_size is not None or problem.window.bounds is not None:
        return False  # with split_size no bit may depend on how large the batch is; bounds of rows are not measured
    if (problem.head_dim, problem.v_head_dim) != (128, 128):
        return False
    if heads_in_tile(problem, pays=True) == 1:
        return False  # each head would read the keys anew; groups of one are not measured
    keys_seen = keys_of_tile(problem)
    if keys.cache.k.dtype != problem.q.dtype or keys_seen <= SHORT_WINDOW:
        return False
    places = 2 * num_sms  # of the two programs that ``looped_launch`` lets in
    owners = problem.num_seqs * keys.num_kv_heads
    if owners < places or filled(owners, places) < FULL:
        return False
    return keys_seen <= SOME_KEYS or problem.max_q_len * problem.group > MOST_SPLIT_ROWS


def draws_tiles(problem: Problem) -> bool:
    """Whether programs draw their tiles from a counter. In decode under a window they take them in turn, as if all had
    as much to do: the host has no counter to clear then, which costs it 23 us."""
    return problem.max_q_len > MAX_STEPS or keys_of_tile(problem) > SOME_KEYS


MOST_TOKENS = 1 << 29
"""Keys and query tokens of a sequence at most: those that ``start_near`` is right for."""
BOX_ROWS = 64
"""Keys that are fetched at once at most: fewer than a tile, so that what no query sees of a tile is not fetched."""


def box_rows(F: Features, launch: HopperLaunch) -> int:
    """Keys that are fetched at once: of a page, the largest power of two that divides it, and no more than a tile."""
    if F.page_size == 0:
        return min(launch.block_n, BOX_ROWS)
    return min(launch.narrow_n or launch.block_n, BOX_ROWS, F.page_size & -F.page_size)


BOX_ALIGNMENT = 16
"""What addresses and strides of a tensor must be multiples of for the tensor memory accelerator."""


def in_boxes(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch or write boxes of ``x``."""
    strides = all(s > 0 and s * x.element_size() % BOX_ALIGNMENT == 0 for s in x.stride()[:-1])
    return strides and x.data_ptr() % BOX_ALIGNMENT == 0 and x.numel() > 0
