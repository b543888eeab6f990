"""What kernels are compiled for, and how they are launched: pure functions of the case and the target.

A row of a table says where it was measured, or "unmeasured, compiles". No autotuning happens when serving: rows come
from ``swath bench tune`` and are pasted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swath.cache import PagedKeys, PagedKV
from swath.problem import Problem
from swath.target import Target
from swath.window import Window

STORED = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""Names of the 8-bit storage types in kernels; everything else is "wide"."""

FUSED = {"enable_fp_fusion": True}
"""Compiler option of every kernel: scales fold into multiply-adds, which Triton 3.10 will no longer fuse unasked."""


@dataclass(frozen=True)
class Features:
    """What a kernel is compiled for: one constexpr. Lengths, window sizes, batch and bounds are not in it."""

    head_dim: int
    kv_heads: int
    group: int
    causal: bool = True
    window: bool = False
    leading: str = ""  # "", "count" or "tensor"
    softcap: bool = False
    interleaved: bool = False
    page_size: int = 0  # 0: dense keys
    stored: str = "wide"
    pairs: bool = False  # 8-bit rows read as 16-bit units (NVIDIA)
    k_fold: str = "none"
    v_fold: str = "none"
    q_scale: str = ""  # "", "tensor" or "row"
    compute_int8: bool = False
    fp32: bool = False  # float32 queries: IEEE dots
    pdl: bool = False  # the reduce is launched before the splits have ended
    interpret: bool = False

    @property
    def stored_dim(self) -> int:
        """Columns of a stored row in units of the pointer that kernels see."""
        return self.head_dim // 2 if self.pairs else self.head_dim

    @property
    def block_d(self) -> int:
        """Columns of a tile of such rows: the next power of two, at least what a dot takes."""
        return max(16, 1 << (self.stored_dim - 1).bit_length())

    @property
    def padded(self) -> bool:
        """Whether tiles have columns past the row."""
        return self.block_d != self.stored_dim

    @property
    def unit_q(self) -> bool:
        """Whether query rows are divided by their largest magnitude: over 8-bit caches, unless dots are float32."""
        return self.stored != "wide"


def features_of(problem: Problem, target: Target) -> Features:
    """The features of a call on a target."""
    window, keys = problem.window, problem.keys
    leading = ""
    if window.size is not None and not (isinstance(window.global_tokens, int) and window.global_tokens == 0):
        leading = "count" if isinstance(window.global_tokens, int) else "tensor"
    paged = keys.cache if isinstance(keys, PagedKeys) else None
    stored = "wide" if paged is None else STORED.get(paged.k.dtype, "wide")
    fp32 = problem.q.dtype == torch.float32
    int8 = problem.compute == "int8"
    return Features(
        head_dim=problem.head_dim,
        kv_heads=keys.num_kv_heads,
        group=problem.group,
        causal=window.causal,
        window=window.size is not None,
        leading=leading,
        softcap=problem.softcap > 0,
        interleaved=problem.interleaved,
        page_size=0 if paged is None else paged.page_size,
        stored=stored,
        pairs=stored != "wide" and target.has_pairs(stored) and not (fp32 or int8) and _viewable_as_pairs(problem),
        k_fold="none" if paged is None else paged.quant.k,
        v_fold="none" if paged is None else paged.quant.v_granularity,
        q_scale="" if problem.q_scale is None else "row" if problem.q_scale.dim() else "tensor",
        compute_int8=int8,
        fp32=fp32,
        pdl=target.has_pdl,
        interpret=target.interpret,
    )


def cache_features(cache: PagedKV) -> Features:
    """The features of a kernel that only knows a cache: append."""
    return Features(
        head_dim=cache.head_dim,
        kv_heads=cache.num_kv_heads,
        group=1,
        page_size=cache.page_size,
        stored=STORED.get(cache.k.dtype, "wide"),
        k_fold=cache.quant.k,
        v_fold=cache.quant.v_granularity,
    )


def token_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides of a token scale; zeros for the other granularities, whose scales kernels take contiguous."""
    return tuple(scale.stride()) if scale is not None and scale.dim() == 3 else (0, 0, 0)


def kernel_scale(scale: Tensor | None) -> Tensor | None:
    """A scale as kernels take it: token scales with any strides, the small static ones contiguous."""
    return scale if scale is None or scale.dim() == 3 else scale.contiguous()


def kernel_dtype(stored: torch.dtype) -> torch.dtype:
    """What kernels see stored tensors as: fp8 as bytes, which every target can load."""
    return torch.uint8 if stored in STORED and stored != torch.int8 else stored


def _viewable_as_pairs(problem: Problem) -> bool:
    """Rows must start at even elements to be read as 16-bit units."""
    if not isinstance(problem.keys, PagedKeys):
        return False
    k, v = problem.keys.cache.k, problem.keys.cache.v
    return all(s % 2 == 0 for s in k.stride()[:3]) and k.storage_offset() % 2 == 0 and v.storage_offset() % 2 == 0


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
    registers: int | None = None  # a thread's at most (NVIDIA), where the compiler's choice lets fewer programs run

    @property
    def options(self) -> dict[str, int]:
        """As the compiler takes them."""
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if self.registers else {})


UNMEASURED = "unmeasured, compiles"
H200 = "H200, torch 2.11, Triton 3.6, 2026-11-21"


def split_launch(F: Features, target: Target, block_m: int) -> TileLaunch:
    """Decode: keys per tile, warps and pipeline depth for ``block_m`` rows."""
    source = H200 if target.arch == "sm_90" else UNMEASURED
    if F.interpret:
        launch = TileLaunch(32, 1, 1, "interpreter")
    elif F.fp32:
        launch = TileLaunch(16, 4, 1, UNMEASURED)
    elif target.compute_capability == 0 or block_m > 16:
        launch = TileLaunch(32, 8, 2, UNMEASURED) if F.pairs else TileLaunch(64, 4, 2, UNMEASURED)
    elif F.pairs:
        launch = TileLaunch(64, 2, 3, source, resident=4)
    elif F.head_dim <= 64:
        launch = TileLaunch(32, 1, 4, source, resident=8)
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
        block_m, launch = 32, TileLaunch(32, 1, 1, "interpreter")
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


MAX_STEPS = 16
"""Query tokens that a sequence may have to be decoded by splits; longer ones are cut into tiles."""


def tile_slots(problem: Problem, positions: int) -> tuple[int, int]:
    """Query tokens of each sequence (0 in a ragged batch), and the slots of a flat list of tiles of ``positions``."""
    if problem.cu_seqlens_q is not None:
        return 0, problem.q.shape[0] // positions + problem.num_seqs
    return problem.steps, problem.num_seqs * ceil_div(problem.steps, positions)


SCRATCH_BYTES = 512 << 20
"""Most that a call may take to hold dequantised pages."""
DEQUANTISE_ROWS = 512
"""Query rows (tokens x group) from which copying a page once costs less than decoding it in every tile that reads it.
Measured on an H200: 2,048 tokens over 16,384 int8 keys took 8.5 ms (channel) and 13 ms (token) decoding in the tiles,
where 16-bit tiles took 6.1."""


def dequantises(problem: Problem) -> bool:
    """Whether a prefill over an 8-bit cache copies its visible pages into 16-bit scratch first."""
    keys = problem.keys
    if not isinstance(keys, PagedKeys) or keys.cache.k.dtype not in STORED or problem.compute != "float":
        return False
    if problem.q.dtype not in (torch.bfloat16, torch.float16) or problem.split_size is not None:
        return False  # with split_size no bit may depend on how large the batch is
    slots = problem.num_seqs * (min(problem.max_kv_len, keys.capacity) + keys.cache.page_size)
    scratch = slots * keys.num_kv_heads * problem.head_dim * 2 * problem.q.element_size()
    return problem.max_q_len * problem.group >= DEQUANTISE_ROWS and scratch <= SCRATCH_BYTES


SHORT_WINDOW = 512
"""Windows up to this size see so few tiles that small tiles and packed heads pay."""


def is_short(window: Window) -> bool:
    """Whether a window is a few tiles wide."""
    return window.size is not None and window.size <= SHORT_WINDOW


MIN_SPLIT_TILES = 4
"""Key tiles that a slice should have: shorter ones cost more in the reduce than they win."""
MAX_SPLIT_TILES = 256
"""Key tiles that a slice may have at most: in a ragged batch the longest one is what all wait for. Uncut, 128 sequences
of 128 to 65,536 keys took 1.5 times their floor. Slices of this size are a prediction: docs/notes/triton.md."""
LEAST_SPLIT_TILES = 16
"""Key tiles from which short sequences of a ragged batch are not cut further, however long others may be."""
MAX_ROUNDS = 5
"""Rounds of programs beyond which an uneven last one matters little."""
FULL = 0.93
"""Share of the last round's places that must be taken."""


def num_splits_for(owners: int, tiles: int, places: int) -> int:
    """How many slices to cut the visible keys into, for ``owners`` = sequences x kv heads x row tiles.

    ``places``: programs that run at once. Sequences of one length make slices that take about as long, so a round that
    is half empty costs as much as a full one: the fewest slices that fill their rounds, or else those that fill them
    best. Measured: 8 owners want 33 slices of 264 places (64 slices were 8 % slower).
    """
    fewest = ceil_div(tiles, MAX_SPLIT_TILES)
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
    if F.stored != "wide" or programs <= launch.resident * target.num_sms or not 64 < F.head_dim <= 128:
        return launch
    return fitting(replace(launch, stages=launch.stages + 1), F, block_m, target)


def filled(programs: int, places: int) -> float:
    """The share of the places that programs take, over all their rounds."""
    return programs / (places * ceil_div(programs, places))


def pack_heads(F: Features, short: bool, block_m: int) -> int:
    """Heads of a kv head's group packed into a row tile: all of them where a short window makes that pay.

    A tile of M positions with window W visits M + W keys; packed with G heads it visits M / G + W.
    """
    power = F.group & (F.group - 1) == 0
    return F.group if short and power and 1 < F.group <= block_m // 4 else 1


@dataclass(frozen=True)
class HopperLaunch:
    """Tile shape and pipeline of hopper_tiles.py; every row was measured on the machine of ``H200``."""

    block_n: int
    stages: int  # of keys and of values
    q_stages: int
    consumers: int = 2  # warpgroups of 64 rows in a program
    programs: int = 1  # that run at once on a multiprocessor
    consumer_registers: int = 240  # a thread's
    producer_registers: int = 24
    registers: int | None = None  # before they are shared out so, where the compiler's choice lets fewer programs run
    pack: int = 1
    box_rows: int = 0
    uniform: bool = False


LARGEST_BOUND = 1 << 30
FEW_KEYS, FEW_PAGED_KEYS = 1024, 1280
"""Keys that a row tile sees up to which programs of one consumer win: short runs leave the tensor cores idle at their
ends, and two consumers of one program reach theirs together. 32 ragged sequences of up to 1,024 keys took 274 us so and
348 with two consumers; windows of 257 in sequences of up to 4,096 keys 709 and 1,127; a window of 1,024 over pages of
16 332 and 376, over dense keys 1,063 and 976."""
VERY_FEW_KEYS = 256
"""Of rows of 64: a window of 128 took 340 us in four programs with tiles of 32 keys, 406 in three with tiles of 64."""


def hopper_launch(F: Features, problem: Problem) -> HopperLaunch:
    """Prefill on sm_90: as many stages and registers as a multiprocessor has, in one program or several."""
    # With split_size no bit may depend on bounds, so the window alone decides.
    most = problem.max_kv_len if problem.split_size is None else LARGEST_BOUND
    keys = problem.window.visible_bound(128, most)
    few = keys <= (FEW_PAGED_KEYS if F.page_size else FEW_KEYS)
    if F.head_dim > 128:
        launch = HopperLaunch(64, 2, 1)
    elif few and F.head_dim > 64:
        launch = HopperLaunch(
            64, 2, 2, consumers=1, programs=2, consumer_registers=216, producer_registers=40, registers=128
        )
    elif keys <= VERY_FEW_KEYS:
        launch = HopperLaunch(32, 3, 2, consumers=1, programs=4, consumer_registers=104, registers=64)
    elif few:
        launch = HopperLaunch(64, 2, 2, consumers=1, programs=3, consumer_registers=136, registers=80)
    elif F.head_dim > 64:
        launch = HopperLaunch(128, 2, 2)
    else:
        launch = HopperLaunch(128, 4, 2)
    pack = 1 if F.interleaved else pack_heads(F, is_short(problem.window), 64)
    return replace(launch, pack=pack, box_rows=box_rows(F, launch.block_n), uniform=problem.cu_seqlens_q is None)


def box_rows(F: Features, block_n: int) -> int:
    """Keys that are fetched at once: the largest power of two that divides a page, at most a tile."""
    return block_n if F.page_size == 0 else min(block_n, F.page_size & -F.page_size)


@dataclass(frozen=True)
class Tuning:
    """Rows to launch with in place of those above: what ``swath bench tune`` tries, and nothing when serving.

    tile: rows per tile beside the row. A split row still passes ``in_step``, as it would from the table.
    """

    split: TileLaunch | None = None
    split_rows: int | None = None
    num_splits: int | None = None
    tile: tuple[int, TileLaunch] | None = None
    hopper: HopperLaunch | None = None


UNTUNED = Tuning()
"""As the tables and rules say."""
