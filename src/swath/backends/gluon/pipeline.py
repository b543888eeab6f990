"""Rings in shared memory between the producers of hopper_tiles.py and its consumers, and how they pass places on.

A stage is full when an mbarrier has counted its bytes, and free again when all consumers have arrived at a named
barrier. An mbarrier could count those too, but Triton lets the warps of a consumer meet before each arrival at one.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from swath.backends.gluon.names import reinterpret

CONSUMER_ROWS = gl.constexpr(64)
BOX_COLUMNS = gl.constexpr(64)  # of 16 bits: the widest box with a 128-byte swizzle


class Ring(NamedTuple):
    """Stages in shared memory with the barriers that say "full"."""

    stages: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


class Places(NamedTuple):
    """A ring of row tiles as numbers, of which each has a barrier that says "received" too."""

    stages: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    received: gl.shared_memory_descriptor


class Rings(NamedTuple):
    """What the producers fill and the consumers empty."""

    q: Ring
    k: Ring
    v: Ring
    first_k: Ring | None  # of narrow tiles, beside k and v
    first_v: Ring | None
    places: Places


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
    phase: gl.tensor


class Place(NamedTuple):
    """Which rows a tile number stands for, as the first producer reads it and passes it on."""

    head: gl.tensor  # of heads_of; that many after the last place
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
    return Stage(slot, ring.stages.index(slot), ring.full.index(slot), (n // STAGES) & 1)


@gluon.jit
def query_stage(n, c: gl.constexpr, ring, F: gl.constexpr, C: gl.constexpr):
    """The stage of the ``n``-th query rows, with those of one consumer as its tile."""
    stage = stage_of(ring, n)
    tiles = as_tiles(ring, C.q_stages * C.consumers, CONSUMER_ROWS, F).stages
    return Stage(stage.slot, tiles.index(stage.slot * C.consumers + c), stage.full, stage.phase)


@gluon.jit
def query_box(slot, c: gl.constexpr, half: gl.constexpr, ring, desc, F: gl.constexpr, C: gl.constexpr):
    """Where a stage of query rows has ``half`` of the columns of a consumer's, as the box of a descriptor."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    box = ring.stages.index((slot * C.consumers + c) * HALVES + half)
    return reinterpret(box, desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def as_tiles(ring, tiles: gl.constexpr, rows: gl.constexpr, F: gl.constexpr):
    """The ring as tensor cores read it: boxes of 64 columns, one block of columns after the other, make a tile."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, F.head_dim], ring.stages.dtype)
    stages = reinterpret(ring.stages, ring.stages.dtype, [tiles, rows, F.head_dim], LAYOUT)
    return Ring(stages, ring.full)


@gluon.jit
def new_barriers(stages: gl.constexpr, arrivals: gl.constexpr):
    """A barrier for each stage, which so many arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def new_ring(stages: gl.constexpr, boxes: gl.constexpr, rows: gl.constexpr, DTYPE: gl.constexpr):
    """Shared memory for ``stages`` of ``boxes`` boxes of ``rows`` rows, filled by one producer."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, BOX_COLUMNS], DTYPE)
    memory = gl.allocate_shared_memory(DTYPE, [stages * boxes, rows, BOX_COLUMNS], LAYOUT)
    return Ring(memory, new_barriers(stages, 1))


@gluon.jit
def beside(ring, stages: gl.constexpr, halves: gl.constexpr, keys: gl.constexpr, rows: gl.constexpr):
    """Shared memory for one more tile of ``keys`` in every stage of a ring: filled and freed with the other."""
    BOXES: gl.constexpr = stages * halves * (keys // rows)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, BOX_COLUMNS], ring.stages.dtype)
    more = gl.allocate_shared_memory(ring.stages.dtype, [BOXES, rows, BOX_COLUMNS], LAYOUT)
    return Ring(more, ring.full)


@gluon.jit
def new_places(consumers: gl.constexpr):
    """Shared memory for the places that the first producer passes on, to consumers and to the producer of V."""
    slots = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Places(slots, new_barriers(2, 1), new_barriers(2, consumers + 1))


FIRST_NAMED = gl.constexpr(6)
"""Of the 16 named barriers of a program. Triton takes those before it for the warps of a partition."""


@gluon.constexpr_function
def named_barrier_of(ring, C):
    """The named barrier of the first stage of the ring "k", "v" or "q"; those of its other stages follow."""
    return FIRST_NAMED.value + {"k": 0, "v": C.stages, "q": 2 * C.stages}[ring]


@gluon.constexpr_function
def stages_in(ring, C):
    """How many stages, and named barriers, the ring "k", "v" or "q" has."""
    return C.q_stages if ring == "q" else C.stages


@gluon.jit
def release(RING: gl.constexpr, n, C: gl.constexpr):
    """A consumer: it needs the stage that the ``n``-th tile of a ring is in no more."""
    at_named_barrier("bar.arrive", named_barrier_of(RING, C) + n % stages_in(RING, C), 4, C)


@gluon.jit
def wait_for_room(RING: gl.constexpr, n, C: gl.constexpr):
    """A producer: until the stage for the ``n``-th tile of a ring is free."""
    if n >= stages_in(RING, C):
        at_named_barrier("bar.sync", named_barrier_of(RING, C) + n % stages_in(RING, C), 1, C)


@gluon.jit
def at_named_barrier(HOW: gl.constexpr, number, WARPS: gl.constexpr, C: gl.constexpr):
    """Each thread of a partition of so many warps once: arrive, or wait for all consumers and the producer."""
    each = gl.full((32 * WARPS,), 0, gl.int32, layout=gl.BlockedLayout([1], [32], [WARPS], [0])) + number
    gl.inline_asm_elementwise(with_all(HOW, C), "=r,r", [each], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def with_all(how, C):
    """PTX for the named barrier $1 of the threads of all consumers and a producer."""
    return f"{how} $1, {C.consumers * 128 + 32}; mov.b32 $0, 0;"


@gluon.jit
def pass_on(n, places, place):
    """First producer: tell the others their ``n``-th place."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    value = lane * 0
    for i in gl.static_range(len(place)):
        value = gl.where(lane == i, place[i], value)
    stage = stage_of(places, n)
    mbarrier.wait(places.received.index(stage.slot), stage.phase ^ 1)
    stage.tile.store(value)
    mbarrier.arrive(stage.full, count=1)


@gluon.jit
def receive(n, places, WARPS: gl.constexpr):
    """The ``n``-th place, for a partition of so many warps. It stays there until each of them has forgotten it.

    Numbers come out of an exchange between lanes, which leaves them in registers of a warp: they are needed for long.
    """
    stage = stage_of(places, n)
    mbarrier.wait(stage.full, stage.phase)
    value = stage.tile.load(gl.BlockedLayout([1], [32], [WARPS], [0]))
    return Place(*[nth(value, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)])


@gluon.jit
def recall(n, places, WARPS: gl.constexpr):
    """The ``n``-th place once more, and for the last time: its numbers needed no registers in between."""
    tile = stage_of(places, n).tile
    place = Place(*[number(tile, i, WARPS) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)])
    forget(n, places)
    return place


@gluon.jit
def forget(n, places):
    """Leave the memory of the ``n``-th place to the first producer."""
    mbarrier.arrive(places.received.index(stage_of(places, n).slot), count=1)


@gluon.jit
def number(tile, i: gl.constexpr, WARPS: gl.constexpr):
    """Number ``i`` of a place, loaded by all threads."""
    return gl.max(tile.slice(i, 1).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def nth(x, i):
    """Element ``i`` of a vector of 32."""
    return gl.max(gl.where(gl.arange(0, 32, layout=x.type.layout) == i, x, -2147483648), 0)
