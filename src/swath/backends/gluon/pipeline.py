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
BOX_BYTES = gl.constexpr(128)
"""Bytes of a row of a TMA box: as wide as the 128-byte swizzle allows. Rows of fewer bytes are boxes of their own."""


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
    """The columns of a row in the pipeline "k", "v" or "q", or of results, "out"."""
    return C.F.value.v_head_dim if PIPE in ("v", "out") else C.F.value.head_dim


@gluon.constexpr_function
def bytes_of(PIPE, C):
    """Bytes of an element in the pipeline "k", "v" or "q", or of results, "out"."""
    if PIPE == "out":
        return 2
    return 1 if (C.F.value.v_e4m3 if PIPE == "v" else C.F.value.dots) else 2


@gluon.constexpr_function
def query_type(wide, C):
    """The type of queries, which is ``wide`` where they have 16 bits."""
    return {"": wide, "int8": gl.int8, "e4m3": gl.float8e4nv}[C.F.value.dots]


@gluon.constexpr_function
def box_columns(PIPE, C):
    """Columns of a TMA box of the pipeline "k", "v" or "q", or of results, "out"."""
    return min(columns_of(PIPE, C), BOX_BYTES.value // bytes_of(PIPE, C))


@gluon.constexpr_function
def blocks_of(PIPE, C):
    """TMA boxes side by side in a row of the pipeline "k", "v" or "q", or of results, "out"."""
    return 1 if PIPE == "v" and C.F.value.v_e4m3 else columns_of(PIPE, C) // box_columns(PIPE, C)


@gluon.constexpr_function
def value_box(C):
    """Rows and columns of a TMA box of V: keys and columns, or of V in e4m3, which wgmma takes with its keys side by
    side, columns and keys."""
    return (C.F.value.v_head_dim, C.box_rows) if C.F.value.v_e4m3 else (C.box_rows, box_columns("v", C))


@gluon.constexpr_function
def box_keys(PIPE, shape, C):
    """Keys of a TMA box of the pipeline "k" or "v", whose memory has this shape."""
    return shape[2] if PIPE == "v" and C.F.value.v_e4m3 else shape[1]


@gluon.constexpr_function
def query_boxes(C):
    """Boxes of 64 rows of 128 bytes that an MMA warpgroup has in a stage of q: as many as its queries take, or if q has
    two stages, as whole tiles of its results, which are stored from there."""
    boxes = -(-columns_of("q", C) * bytes_of("q", C) // BOX_BYTES.value)
    tile = blocks_of("out", C) if C.q_stages > 1 else 1
    return -(-boxes // tile) * tile


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
    blocks, full = blocks_at(pipe, index, C.stages, C), pipe.full.index(index)
    return PipelineState(index, (count // C.stages) & 1, blocks, full)


@gluon.jit
def blocks_at(pipe, part, PARTS: gl.constexpr, C: gl.constexpr):
    """The tile of q or K at the begin of a part of the memory, as a tuple of its blocks of columns: [rows, columns]."""
    EACH: gl.constexpr = pipe.stages.shape[0] // PARTS
    BLOCKS: gl.constexpr = C.F.head_dim // pipe.stages.shape[2]
    blocks = gl.tuple((pipe.stages.index(part * EACH),))
    for i in gl.static_range(1, BLOCKS):
        blocks += (pipe.stages.index(part * EACH + i),)
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
def new_pipeline(
    stages: gl.constexpr, boxes: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr, DTYPE: gl.constexpr
):  # fmt: skip
    """A pipeline whose stages have ``boxes`` TMA boxes [rows, columns] each, filled by one producer."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPE)
    memory = gl.allocate_shared_memory(DTYPE, [stages * boxes, rows, columns], LAYOUT)
    return Pipeline(memory, new_barriers(stages, 1))


@gluon.jit
def with_narrow_tile(pipe, blocks: gl.constexpr, keys: gl.constexpr, rows: gl.constexpr):
    """Shared memory for one more tile of ``keys`` keys in every stage: filled and released together with the other.

    The tile has ``blocks`` blocks of columns, as wide as those of the other, in TMA boxes of ``rows`` rows.
    """
    BOXES: gl.constexpr = pipe.full.shape[0] * blocks * (keys // rows)
    COLUMNS: gl.constexpr = pipe.stages.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, COLUMNS], pipe.stages.dtype)
    memory = gl.allocate_shared_memory(pipe.stages.dtype, [BOXES, rows, COLUMNS], LAYOUT)
    return Pipeline(memory, pipe.full)


@gluon.jit
def as_tiles(pipe, rows: gl.constexpr, columns: gl.constexpr, DTYPE: gl.constexpr):
    """The same pipeline as wgmma reads it, [tiles, rows, columns] of ``DTYPE``.

    A tile in shared memory is the first 128 bytes of all rows, then the next 128 of all rows, and so on. Each such
    block of columns is a run of TMA boxes. Where the columns are no power of two, blocks are tiles of their own.
    """
    WIDTH: gl.constexpr = columns if columns & (columns - 1) == 0 else pipe.stages.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, WIDTH], DTYPE)
    TILES: gl.constexpr = tiles_in(pipe.stages.shape, pipe.stages.dtype, rows * WIDTH, DTYPE)
    return Pipeline(reinterpret(pipe.stages, DTYPE, [TILES, rows, WIDTH], LAYOUT), pipe.full)


@gluon.jit
def as_columns(pipe, columns: gl.constexpr, keys: gl.constexpr):
    """The pipeline of V in e4m3 as tiles [columns, keys]: a run of TMA boxes, side by side."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(pipe.stages.shape[2], 8, 2)
    DTYPE: gl.constexpr = pipe.stages.dtype
    TILES: gl.constexpr = tiles_in(pipe.stages.shape, DTYPE, columns * keys, DTYPE)
    return Pipeline(reinterpret(pipe.stages, DTYPE, [TILES, columns, keys], LAYOUT), pipe.full)


@gluon.constexpr_function
def tiles_in(shape, dtype, elements, tile_dtype):
    """Tiles of ``elements`` in memory of a shape."""
    bits = shape[0] * shape[1] * shape[2] * dtype.primitive_bitwidth
    return bits // (elements * tile_dtype.primitive_bitwidth)


@gluon.constexpr_function
def keys_of(PIPE, boxes, barriers, C):
    """The keys of a tile in the pipeline "k" or "v", whose ``stages`` and ``full`` have these shapes."""
    return boxes[0] * box_keys(PIPE, boxes, C) // (barriers[0] * blocks_of(PIPE, C))


@gluon.jit
def query_state(pipe, count, WG: gl.constexpr, C: gl.constexpr):
    """The state of the q pipeline for the ``count``-th work tile; ``tile``: the rows of one MMA warpgroup."""
    state = pipeline_state(pipe, count)
    tiles = as_tiles(pipe, CONSUMER_ROWS, C.F.head_dim, query_type(pipe.stages.dtype, C))
    blocks = blocks_at(tiles, state.index * C.consumers + WG, C.q_stages * C.consumers, C)
    return PipelineState(state.index, state.phase, blocks, state.full)


@gluon.jit
def query_box(index, WG: gl.constexpr, block: gl.constexpr, pipe, desc, C: gl.constexpr):
    """The TMA box with a block of columns of an MMA warpgroup's rows, or results, in a stage of the q pipeline."""
    boxes = as_tiles(pipe, CONSUMER_ROWS, desc.block_type.shape[3], desc.dtype).stages
    EACH: gl.constexpr = boxes.shape[0] // (C.q_stages * C.consumers)
    box = boxes.index((index * C.consumers + WG) * EACH + block)
    return reinterpret(box, desc.dtype, desc.block_type.shape, desc.layout)
