"""The persistent tile scheduler: which work tiles there are, in which order, and how they reach the warps of a program.

The first load warp of a program is its scheduler. It takes tile numbers, either in turn or from a counter that all
programs share, turns each into a ``WorkTile``, and publishes those that have rows. The others read them from a
pipeline in shared memory. The last one published has no work (``has_work``): then every warp ends.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from swath.backends.device.cache import table_row
from swath.backends.device.window import Sight, bounds_of, sight_of, start_near, view_near
from swath.backends.gluon.pipeline import (
    CONSUMER_ROWS,
    consumer_wait,
    new_barriers,
    pipeline_state,
    producer_commit,
)
from swath.backends.triton.kernels.query import keys_within, lead_of, q_head_of, sequence_of, takes
from swath.backends.triton.kernels.tile import num_m_blocks, sequence_at


class Batch(NamedTuple):
    """The arguments of the call that a tile number is turned into rows and keys with."""

    table: gl.tensor
    table_index: gl.tensor
    lens: gl.tensor
    cu_q: gl.tensor
    q_start: gl.tensor
    lead: gl.tensor
    window: gl.tensor  # its size, or the bounds of rows
    steps: gl.tensor
    claimed: gl.tensor
    num_seqs: gl.tensor
    table_width: gl.tensor
    num_pages: gl.tensor
    table_stride: gl.tensor
    num_tiles: gl.tensor
    v_table: gl.tensor | None  # of V, where that is a copy and K is not: a row for each sequence
    v_table_width: gl.tensor | None


class WorkTile(NamedTuple):
    """Query rows that a program works on at a time: ``positions_of`` query positions of a sequence, for one head.

    Where the heads of a group are packed, ``head`` is a kv head, and the tile has the rows of its whole group.
    """

    sight: gl.tensor  # of rows with bounds what they see together: a Sight; else ()
    head: gl.tensor
    b: gl.tensor  # the sequence
    q_begin: gl.tensor  # its first query position in the tile, counted from 0
    q_len: gl.tensor  # query tokens of the whole sequence
    q_row: gl.tensor  # the row of q with the sequence's first query token
    q_start: gl.tensor  # the position of that token, moved near the keys (``start_near``)
    kv_len: gl.tensor
    kv_row: gl.tensor  # dense keys: the row of the sequence's first key
    lead: gl.tensor


class WorkPipeline(NamedTuple):
    """A pipeline of work tiles as numbers, from the first load warp to all other warps. Both barriers are mbarriers."""

    stages: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    released: gl.shared_memory_descriptor


@gluon.constexpr_function
def positions_of(C):
    """Query positions of a work tile."""
    return C.consumers * CONSUMER_ROWS.value // C.pack


@gluon.constexpr_function
def heads_of(C):
    """Work tiles with the same query positions: one for each head, or for each kv head whose group is packed."""
    return C.F.value.kv_heads * C.F.value.group // C.pack


@gluon.constexpr_function
def loops_over_64(C):
    """Whether this is a loop over key tiles for heads of 64.

    There the order in which ptxas puts instructions counts more than their number, and what saves some elsewhere brings
    a slow order: two sequences of 8,192 tokens took 2,032 us, 2,080 with integer maxima (``kept_max``), and 2,209 with
    numbers of work tiles that all threads load.
    """
    return C.F.value.head_dim == 64 and C.narrow_n == 0


@gluon.jit
def work_tile_of(t, batch, C: gl.constexpr):
    """The ``t``-th work tile, longest first. It may be one without rows: its q_len and kv_len are 0 then."""
    POSITIONS: gl.constexpr = positions_of(C)
    HEADS: gl.constexpr = heads_of(C)
    i = batch.num_tiles - 1 - t
    b, first_block = sequence_at(i // HEADS, batch.cu_q, batch.num_seqs, batch.steps, POSITIONS)
    i -= first_block * HEADS
    owned = i >= 0  # before the first sequence there may be rows that no sequence owns
    seq = sequence_of(b, batch.cu_q, batch.steps, batch.steps, batch.lens, batch.q_start, C.F)
    pages = batch.table_width
    if C.F.page_size > 0:
        _, pages = table_row(batch.table, batch.table_index, b, batch.table_stride, batch.table_width, C.F)
        if batch.v_table is not None:
            pages = gl.minimum(pages, batch.v_table_width)
    kv_len = keys_within(seq, pages, C.F)
    if C.sections:
        m_blocks = num_m_blocks(b, first_block, batch.cu_q, batch.steps, POSITIONS)
        m_block, head = in_section(i, m_blocks, kv_len, HEADS, C.F.kv_heads, C.F.head_dim + C.F.v_head_dim)
    else:
        m_block, head = i // HEADS, HEADS - 1 - i % HEADS
    q_begin = m_block * POSITIONS
    used = owned & (q_begin < seq.q_len) & takes(b, seq.q_len, batch.claimed)
    q_start = q_begin * 0 if C.F.bounds else start_near(seq.q_start, seq.q_len, kv_len, batch.window)
    return WorkTile(
        (), head, b, q_begin, gl.where(used, seq.q_len, 0), seq.q_row, q_start, gl.where(used, kv_len, 0), seq.kv_row,
        lead_of(b, batch.lead, C.F),
    )  # fmt: skip


@gluon.jit
def tile_kv_head(work, C: gl.constexpr):
    """The kv head of a work tile, whose ``head`` is that already where a group is packed."""
    return work.head if C.pack > 1 else work.head // C.F.group


@gluon.jit
def with_sight(work, batch, C: gl.constexpr):
    """The work tile, which has rows, with what their bounds show together."""
    p, last, view = rows_in_tile(work, batch, C)
    sight = sight_of(p, last, work.kv_len, work.lead, view, C.F)
    return WorkTile(sight, *[work[i] for i in (1, 2, 3, 4, 5, 6, 7, 8, 9)])


@gluon.jit
def bounds_of_tile(work, batch, C: gl.constexpr):
    """The bounds low, end of a work tile's rows, as a warp reads them: one of each position."""
    p, last, view = rows_in_tile(work, batch, C)
    return bounds_of(p, last, work.kv_len, view)


@gluon.jit
def rows_in_tile(work, batch, C: gl.constexpr):
    """The positions of a work tile's rows, with bounds, for a warp, the last one there is, and their view."""
    i = gl.arange(0, positions_of(C), layout=gl.BlockedLayout([1], [32], [1], [0]))
    return work.q_begin + i, work.q_len - 1, view_near(work.q_start, work.q_row, batch.window, C.F)


SECTION_BYTES = tl.constexpr(16 << 20)
"""Keys and values that the work tiles of all programs share at a time. 32 heads over 2 x 16,384 keys, whose keys are
67 MB a sequence, took 5,978 us in sections of 16 MiB, 6,006 in sections of 32, and 6,091 with all heads at once."""


@triton.jit
def in_section(i, m_blocks, kv_len, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """The m-block and the head of the ``i``-th tile of a sequence that has ``m_blocks`` of each head.

    ``COLUMNS``: of a row of K and of V together.

    Heads are taken in sections. A section's keys stay in the L2 cache while all m-blocks of its heads are worked on;
    FlashAttention-3 has this order too. Tiles past those of the sequence get m-blocks past its own.
    """
    kv_heads = SECTION_BYTES // (2 * COLUMNS) // tl.maximum(kv_len, 1)
    width = tl.minimum(tl.maximum(kv_heads, 1), KV_HEADS) * (HEADS // KV_HEADS)
    first = tl.minimum(i // (m_blocks * width), (HEADS - 1) // width) * width
    i -= first * m_blocks
    width = tl.minimum(width, HEADS - first)
    return i // width, first + i % width


@gluon.jit
def has_work(work, C: gl.constexpr):
    """Whether there is a work tile: False after the last one."""
    return work.head < heads_of(C)


@gluon.jit
def no_work(C: gl.constexpr):
    """What is published after the last work tile."""
    return WorkTile((), heads_of(C), 0, 0, 0, 0, 0, 0, 0, 0)


FETCH_ADD = gl.constexpr(
    "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.b32 $0, 0; "
    "@first atom.global.add.u32 $0, [$1], 1; }"
)


@gluon.jit
def fetch_number(counter):
    """Ask the launch's counter for a number, if there is one. ``next_number`` waits for the answer, in lane 0.

    ``gl.atomic_add`` lost tiles in a prototype.
    """
    address = gl.full((32,), 0, gl.int64, layout=gl.BlockedLayout([1], [32], [1], [0]))
    if counter is None:
        return address.to(gl.int32)
    else:
        address += counter.to(gl.int64)
        return gl.inline_asm_elementwise(FETCH_ADD, "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def next_number(t, counter, fetched):
    """The number of the tile after ``t`` of this program: what was ``fetched``, or without a counter tiles in turn.

    A loop over key tiles asks for it when they are all loaded, or with bounds when the last one is next. Asked for
    sooner, a program with a long tile keeps the next one from those that are done: 2,048 tokens of 32 heads of 128 took
    110 us where it was drawn a tile ahead, and take 87, 8,192 of 16 heads of 256 733 and 691.
    """
    if counter is None:
        return t + gl.num_programs(0)
    else:
        return gl.max(fetched, 0) + gl.num_programs(0)


@gluon.jit
def new_work_pipeline(consumers: gl.constexpr):
    """Two stages, which the MMA warpgroups and the second load warp read."""
    stages = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return WorkPipeline(stages, new_barriers(2, 1), new_barriers(2, consumers + 1))


@gluon.jit
def publish_work(count, pipe, work):
    """First load warp: write the ``count``-th work tile for the other warps, as soon as its stage is free."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    value = lane * 0
    NUMBERS: gl.constexpr = len(work) - 1
    for i in gl.static_range(NUMBERS):
        value = gl.where(lane == i, work[1 + i], value)
    for i in gl.static_range(len(work.sight)):
        value = gl.where(lane == NUMBERS + i, work.sight[i], value)
    state = pipeline_state(pipe, count)
    mbarrier.wait(pipe.released.index(state.index), state.phase ^ 1)
    state.tile.store(value)
    producer_commit(state)


@gluon.jit
def get_work(count, pipe, WARPS: gl.constexpr, C: gl.constexpr):
    """Wait for the ``count``-th work tile and read it. It stays there until every reader has released it.

    Its numbers are left in registers of a warp, for they are needed for long. An exchange between lanes does that too,
    but the comparisons of lane numbers that it needs are computed once, and spilled.
    """
    state = pipeline_state(pipe, count)
    consumer_wait(state)
    sight = get_sight(state.tile, WARPS, C)
    if loops_over_64(C):
        value = state.tile.load(gl.BlockedLayout([1], [32], [WARPS], [0]))
        return WorkTile(sight, *[element(value, i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)])
    else:
        return WorkTile(sight, *[uniform(loaded_element(state.tile, i, WARPS)) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)])


@gluon.jit
def get_sight(tile, WARPS: gl.constexpr, C: gl.constexpr):
    """What a published work tile's rows see together, if they have bounds."""
    if C.F.bounds:
        return Sight(*[uniform(loaded_element(tile, i, WARPS)) for i in (9, 10, 11, 12, 13, 14)])
    else:
        return ()


@gluon.jit
def reread_work(count, pipe, WARPS: gl.constexpr):
    """Read the ``count``-th work tile again, but what its rows see, and release it: its numbers took no registers in
    between."""
    tile = pipeline_state(pipe, count).tile
    work = WorkTile((), *[loaded_element(tile, i, WARPS) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)])
    release_work(count, pipe)
    return work


@gluon.jit
def release_work(count, pipe):
    """Give the stage of the ``count``-th work tile back to the first load warp."""
    mbarrier.arrive(pipe.released.index(pipeline_state(pipe, count).index), count=1)


@gluon.jit
def loaded_element(tile, i: gl.constexpr, WARPS: gl.constexpr):
    """Element ``i`` of a vector in shared memory, loaded by all threads."""
    return gl.max(tile.slice(i, 1).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def uniform(x):
    """A number that is the same in all lanes, in a register of the warp."""
    return gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def element(x, i):
    """Element ``i`` of a vector of 32."""
    return gl.max(gl.where(gl.arange(0, 32, layout=x.type.layout) == i, x, -2147483648), 0)


@gluon.jit
def q_coordinates(work, WG: gl.constexpr, column: gl.constexpr, C: gl.constexpr):
    """Where in q and out the TMA box of an MMA warpgroup's rows begins that has their columns from ``column`` on."""
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    kv_head, member = (work.head, 0) if C.pack > 1 else (work.head // C.F.group, work.head % C.F.group)
    seq = work.b if C.uniform else 0
    row = work.q_begin if C.uniform else work.q_row + work.q_begin
    return [seq, row + WG * POSITIONS, q_head_of(kv_head, member, C.F), column]
