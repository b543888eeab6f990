"""Pipelines in shared memory between a load warp (the producer) and the MMA warpgroups (the consumers).

A pipeline is a circular buffer of stages. The ``count``-th tile is in stage ``count % stages``. In CUTLASS's words:

    producer_acquire    wait until the consumers have released the stage
    (TMA loads)         fill it; the stage's mbarrier ``full`` counts their bytes
    producer_commit     arrive at ``full``, where the producer itself wrote to the stage
    consumer_wait       wait until ``full`` is complete
    consumer_release    give the stage back

A stage is given back through a named barrier, at which all consumers arrive and the producer waits. An mbarrier could
count arrivals as well, but Triton makes all warps of a consumer meet before each arrival at an mbarrier.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from swath.backends.gluon.compat import reinterpret

CONSUMER_ROWS = gl.constexpr(64)
"""Query rows of an MMA warpgroup: what one wgmma instruction takes."""
BOX_COLUMNS = gl.constexpr(64)
"""Columns of a TMA box: 128 bytes of 16-bit values, the widest box that the 128-byte swizzle allows."""


class NamedBarriers:
    """Whose the named barriers of a program are (``bar`` 0 to 15 in PTX).

    Triton takes those below ``OURS``: one for the whole program and some for the warps of each partition. From ``OURS``
    on each stage of the pipelines of K, V and q has one, in this order: see ``named_barrier``.
    """

    COUNT = 16
    OURS = 6


@gluon.constexpr_function
def stages_of(PIPE, C):
    """The stages of the pipeline "k", "v" or "q"."""
    return C.q_stages if PIPE == "q" else C.stages


@gluon.constexpr_function
def columns_of(PIPE, C):
    """The columns of a row in the pipeline "k", "v" or "q"."""
    return C.F.value.v_head_dim if PIPE == "v" else C.F.value.head_dim


@gluon.constexpr_function
def blocks_of(PIPE, C):
    """TMA boxes side by side in a row of the pipeline "k", "v" or "q"."""
    return columns_of(PIPE, C) // BOX_COLUMNS.value


@gluon.constexpr_function
def named_barrier(PIPE, C):
    """The named barrier of the first stage of the pipeline "k", "v" or "q"; its other stages follow."""
    return NamedBarriers.OURS + {"k": 0, "v": C.stages, "q": 2 * C.stages}[PIPE]


@gluon.constexpr_function
def barriers_suffice(C):
    """Whether a program has a named barrier for each stage."""
    return named_barrier("q", C) + C.q_stages <= NamedBarriers.COUNT


class Pipeline(NamedTuple):
    """A pipeline in shared memory, with an element type and a number of columns of its own (``columns_of``)."""

    stages: gl.shared_memory_descriptor  # the buffers: TMA boxes, or by ``as_tiles`` whole tiles
    full: gl.shared_memory_descriptor  # an mbarrier a stage


class Pipelines(NamedTuple):
    """All pipelines of a program."""

    q: Pipeline
    k: Pipeline
    v: Pipeline
    narrow_k: Pipeline | None  # a second, narrow tile in each stage of k
    narrow_v: Pipeline | None
    work: gl.tensor  # a WorkPipeline


class Descriptors(NamedTuple):
    """The TMA descriptors that the pipelines are filled through."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    narrow_k: gl.tensor | None
    narrow_v: gl.tensor | None


class PipelineState(NamedTuple):
    """Where a pipeline has its ``count``-th tile, and the phase of ``full`` that says that it is there."""

    index: gl.tensor  # of the stage
    phase: gl.tensor
    tile: gl.shared_memory_descriptor  # where a stage is one tile; of q and K a tuple of its blocks of columns
    full: gl.shared_memory_descriptor


@gluon.jit
def pipeline_state(pipe, count):
    """The state of a pipeline for its ``count``-th tile."""
    STAGES: gl.constexpr = pipe.full.shape[0]
    index = count % STAGES
    tile, full = pipe.stages.index(index), pipe.full.index(index)
    return PipelineState(index, (count // STAGES) & 1, tile, full)


@gluon.jit
def key_state(pipe, count, C: gl.constexpr):
    """The state of the pipeline of K for its ``count``-th tile, in blocks of columns."""
    index = count % C.stages
    blocks, full = blocks_at(pipe, index, C), pipe.full.index(index)
    return PipelineState(index, (count // C.stages) & 1, blocks, full)


@gluon.jit
def blocks_at(pipe, index, C: gl.constexpr):
    """The tile ``index`` of q or K as a tuple of its blocks of columns, each [rows, columns]."""
    BLOCKS: gl.constexpr = C.F.head_dim // pipe.stages.shape[2]
    blocks = gl.tuple((pipe.stages.index(index * BLOCKS),))
    for i in gl.static_range(1, BLOCKS):
        blocks += (pipe.stages.index(index * BLOCKS + i),)
    return blocks


@gluon.jit
def producer_acquire(PIPE: gl.constexpr, count, C: gl.constexpr):
    """Wait until the stage for the ``count``-th tile of the pipeline "k", "v" or "q" is free: at once in round one."""
    if count >= stages_of(PIPE, C):
        at_named_barrier("bar.sync", named_barrier(PIPE, C) + count % stages_of(PIPE, C), 1, C)


@gluon.jit
def producer_commit(state):
    """Say that a stage which the producer itself has written to is full."""
    mbarrier.arrive(state.full, count=1)


@gluon.jit
def consumer_wait(state):
    """Wait until a stage is full."""
    mbarrier.wait(state.full, state.phase)


@gluon.jit
def consumer_release(PIPE: gl.constexpr, count, C: gl.constexpr):
    """Give back the stage of the ``count``-th tile of the pipeline "k", "v" or "q"."""
    at_named_barrier("bar.arrive", named_barrier(PIPE, C) + count % stages_of(PIPE, C), 4, C)


@gluon.jit
def at_named_barrier(HOW: gl.constexpr, barrier, WARPS: gl.constexpr, C: gl.constexpr):
    """Run ``HOW``, PTX that ends with the instruction "bar.arrive" or "bar.sync", in each thread of ``WARPS`` warps."""
    each = gl.full((32 * WARPS,), 0, gl.int32, layout=gl.BlockedLayout([1], [32], [WARPS], [0])) + barrier
    gl.inline_asm_elementwise(barrier_ptx(HOW, C), "=r,r", [each], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def barrier_ptx(how, C):
    """``how`` for the named barrier $1 of all MMA warpgroups and one load warp."""
    return f"{how} $1, {C.consumers * 128 + 32}; mov.b32 $0, 0;"


@gluon.jit
def new_barriers(stages: gl.constexpr, arrivals: gl.constexpr):
    """An mbarrier a stage, each complete after ``arrivals`` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def new_pipeline(stages: gl.constexpr, boxes: gl.constexpr, rows: gl.constexpr, DTYPE: gl.constexpr):
    """A pipeline whose stages have ``boxes`` TMA boxes of ``rows`` rows each, filled by one producer."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, BOX_COLUMNS], DTYPE)
    memory = gl.allocate_shared_memory(DTYPE, [stages * boxes, rows, BOX_COLUMNS], LAYOUT)
    return Pipeline(memory, new_barriers(stages, 1))


@gluon.jit
def with_narrow_tile(pipe, blocks: gl.constexpr, keys: gl.constexpr, rows: gl.constexpr):
    """Shared memory for one more tile of ``keys`` keys in every stage: filled and released together with the other.

    The tile has ``blocks`` blocks of 64 columns, in TMA boxes of ``rows`` rows.
    """
    BOXES: gl.constexpr = pipe.full.shape[0] * blocks * (keys // rows)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, BOX_COLUMNS], pipe.stages.dtype)
    memory = gl.allocate_shared_memory(pipe.stages.dtype, [BOXES, rows, BOX_COLUMNS], LAYOUT)
    return Pipeline(memory, pipe.full)


@gluon.jit
def as_tiles(pipe, tiles: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr):
    """The same pipeline as wgmma reads it, [tiles, rows, columns].

    A tile in shared memory is its columns 0 to 63 of all rows, then its columns 64 to 127 of all rows, and so on. Each
    such block of columns is a run of TMA boxes. Where the columns are no power of two, blocks are tiles of their own.
    """
    WIDTH: gl.constexpr = columns if columns & (columns - 1) == 0 else BOX_COLUMNS
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, WIDTH], pipe.stages.dtype)
    stages = reinterpret(pipe.stages, pipe.stages.dtype, [tiles * (columns // WIDTH), rows, WIDTH], LAYOUT)
    return Pipeline(stages, pipe.full)


@gluon.constexpr_function
def keys_of(boxes, barriers, blocks):
    """The keys of a tile in a pipeline whose ``stages`` and ``full`` have these shapes."""
    return boxes[0] * boxes[1] // (barriers[0] * blocks)


@gluon.jit
def query_state(pipe, count, WG: gl.constexpr, C: gl.constexpr):
    """The state of the q pipeline for the ``count``-th work tile; ``tile``: the rows of one MMA warpgroup."""
    state = pipeline_state(pipe, count)
    tiles = as_tiles(pipe, C.q_stages * C.consumers, CONSUMER_ROWS, C.F.head_dim)
    return PipelineState(state.index, state.phase, blocks_at(tiles, state.index * C.consumers + WG, C), state.full)


@gluon.jit
def query_box(index, WG: gl.constexpr, block: gl.constexpr, pipe, desc, C: gl.constexpr):
    """The TMA box with a block of 64 columns of an MMA warpgroup's rows in a stage of the q pipeline."""
    BLOCKS: gl.constexpr = blocks_of("q", C)
    box = pipe.stages.index((index * C.consumers + WG) * BLOCKS + block)
    return reinterpret(box, desc.dtype, desc.block_type.shape, desc.layout)
