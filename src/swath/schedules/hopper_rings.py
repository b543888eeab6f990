"""Rings in shared memory between the producers of hopper_tiles.py and its consumers, and how they pass places on."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from swath.schedules.gluon_names import reinterpret

CONSUMER_ROWS = gl.constexpr(64)
BOX_COLUMNS = gl.constexpr(64)  # of 16 bits: the widest box with a 128-byte swizzle


class Ring(NamedTuple):
    """Stages in shared memory with the barriers that say "full" and "empty"."""

    stages: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Rings(NamedTuple):
    """What the producers fill and the consumers empty."""

    q: Ring
    k: Ring
    v: Ring
    first_k: Ring | None  # of narrow tiles, beside k and v
    first_v: Ring | None
    places: Ring


class Sources(NamedTuple):
    """What the producers fill rings from: global memory in boxes of their rows."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    first_k: gl.tensor | None
    first_v: gl.tensor | None


class Stage(NamedTuple):
    """A stage of a ring for what it holds next, and the phase of ``full`` that says so."""

    slot: gl.tensor
    tile: gl.shared_memory_descriptor  # of a ring with one tile a stage
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    phase: gl.tensor


class Place(NamedTuple):
    """Which rows a tile number stands for, as the first producer reads it and passes it on."""

    t: gl.tensor
    b: gl.tensor
    begin: gl.tensor  # the first query token, of q_len
    q_len: gl.tensor
    token: gl.tensor  # the row of the sequence's first query token
    start: gl.tensor  # its position
    kv_len: gl.tensor
    key_row: gl.tensor
    leading: gl.tensor


@gluon.constexpr_function
def keys_of(boxes, barriers, F):
    """The keys of a tile in a ring whose ``stages`` and ``full`` have these shapes."""
    return boxes[0] * boxes[1] * boxes[2] // (barriers[0] * F.head_dim)


@gluon.jit
def stage_of(ring, n):
    """The stage of a ring whose turn is the ``n``-th."""
    STAGES: gl.constexpr = ring.full.shape[0]
    slot = n % STAGES
    return Stage(slot, ring.stages.index(slot), ring.full.index(slot), ring.empty.index(slot), (n // STAGES) & 1)


@gluon.jit
def as_tiles(ring, tiles: gl.constexpr, rows: gl.constexpr, F: gl.constexpr):
    """The ring as tensor cores read it: boxes of 64 columns, one block of columns after the other, make a tile."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, F.head_dim], ring.stages.dtype)
    stages = reinterpret(ring.stages, ring.stages.dtype, [tiles, rows, F.head_dim], LAYOUT)
    return Ring(stages, ring.full, ring.empty)


@gluon.jit
def new_barriers(stages: gl.constexpr, arrivals: gl.constexpr):
    """A barrier for each stage, which so many arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def new_ring(
    stages: gl.constexpr, boxes: gl.constexpr, rows: gl.constexpr, consumers: gl.constexpr, DTYPE: gl.constexpr
):
    """Shared memory for ``stages`` of ``boxes`` boxes of ``rows`` rows, filled by one producer."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, BOX_COLUMNS], DTYPE)
    memory = gl.allocate_shared_memory(DTYPE, [stages * boxes, rows, BOX_COLUMNS], LAYOUT)
    return Ring(memory, new_barriers(stages, 1), new_barriers(stages, consumers))


@gluon.jit
def beside(ring, stages: gl.constexpr, halves: gl.constexpr, keys: gl.constexpr, rows: gl.constexpr):
    """Shared memory for one more tile of ``keys`` in every stage of a ring: filled and emptied with the other."""
    BOXES: gl.constexpr = stages * halves * (keys // rows)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, BOX_COLUMNS], ring.stages.dtype)
    more = gl.allocate_shared_memory(ring.stages.dtype, [BOXES, rows, BOX_COLUMNS], LAYOUT)
    return Ring(more, ring.full, ring.empty)


@gluon.jit
def new_places(consumers: gl.constexpr):
    """Shared memory for the places that the first producer passes on, to consumers and to the producer of V."""
    slots = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Ring(slots, new_barriers(2, 1), new_barriers(2, consumers + 1))


@gluon.jit
def pass_on(n, places, place):
    """First producer: tell the others their ``n``-th place."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    value = lane * 0
    for i in gl.static_range(len(place)):
        value = gl.where(lane == i, place[i], value)
    stage = stage_of(places, n)
    mbarrier.wait(stage.empty, stage.phase ^ 1)
    stage.tile.store(value)
    mbarrier.arrive(stage.full, count=1)


@gluon.jit
def receive(n, places, WARPS: gl.constexpr):
    """The ``n``-th place, for a partition of so many warps."""
    stage = stage_of(places, n)
    mbarrier.wait(stage.full, stage.phase)
    value = stage.tile.load(gl.BlockedLayout([1], [32], [WARPS], [0]))
    mbarrier.arrive(stage.empty, count=1)
    return Place(
        nth(value, 0), nth(value, 1), nth(value, 2), nth(value, 3), nth(value, 4), nth(value, 5), nth(value, 6),
        nth(value, 7), nth(value, 8),
    )  # fmt: skip


@gluon.jit
def nth(x, i):
    """Element ``i`` of a vector of 32."""
    return gl.max(gl.where(gl.arange(0, 32, layout=x.type.layout) == i, x, -2147483648), 0)
