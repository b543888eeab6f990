"""The load warps: one finds work tiles and loads q and K, the other loads V.

They are two because the warp that issues the TMA loads of small pages is a bound, and two warps have two schedulers.

A TMA box brings whole rows, and zeros for what is outside the tensor: a dead page, or a box that no row sees. Where an
edge of the visible keys runs through a box, the rows of V that no query sees are set to zero after the load: whatever
is there, NaN too, would be multiplied by a p of 0.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from swath.backends.device.cache import load_entries, pages_of, slot_of, table_row
from swath.backends.device.quant import key_of_column
from swath.backends.device.window import seen_bits
from swath.backends.gluon.compat import reinterpret, tma_load
from swath.backends.gluon.key_tiles import key_tile, key_tiles_of, narrow_tile
from swath.backends.gluon.pipeline import (
    CONSUMER_ROWS,
    Pipeline,
    blocks_of,
    box_columns,
    box_keys,
    bytes_of,
    columns_of,
    keys_of,
    pipeline_state,
    producer_acquire,
    producer_commit,
    query_box,
)
from swath.backends.gluon.scheduler import (
    bounds_of_tile,
    element,
    fetch_number,
    get_work,
    has_work,
    next_number,
    no_work,
    publish_work,
    q_coordinates,
    release_work,
    with_sight,
    work_tile_of,
)
from swath.backends.triton.kernels.walk import key_at, seen_by_any


@gluon.jit
def load_qk_warp(descriptors, counter, pipes, batch, C: gl.constexpr):
    """The first load warp: the scheduler of the program, and the producer of q and K."""
    if C.F.bounds:
        load_qk_of_bounds(descriptors, counter, pipes, batch, C)
    else:
        load_qk(descriptors, counter, pipes, batch, C)


@gluon.jit
def load_qk(descriptors, counter, pipes, batch, C: gl.constexpr):
    """Find a work tile, load its q and K, and so on."""
    work_count = 0
    kv_count = 0
    cuts = 0  # and stays 0: nothing of K is set to zero
    t = gl.program_id(0)
    while t < batch.num_tiles:
        work = work_tile_of(t, batch, C)
        if C.narrow_n > 0:  # a work tile is one stage, whose loads hide the counter's answer
            fetched = fetch_number(counter)
        if work.q_len > 0:
            publish_work(work_count, pipes.work, work)
            key_tiles = key_tiles_of(work, batch, C)
            load_q(work_count, work, descriptors.q, pipes.q, C)
            cuts = load_keys(kv_count, cuts, key_tiles, descriptors, None, pipes, batch, C)
            work_count += 1
            kv_count += key_tiles.walk.total
        if C.narrow_n == 0:
            fetched = fetch_number(counter)
        t = next_number(t, counter, fetched)
    publish_work(work_count, pipes.work, no_work(C))


@gluon.jit
def load_qk_of_bounds(descriptors, counter, pipes, batch, C: gl.constexpr):
    """The same where bounds of rows must be read to know the keys of a work tile.

    That takes as long as a key tile. So the next work tile is published before the last key tile of this one is loaded,
    for which there is no room yet, and then read as the other warps read it.
    """
    gl.static_assert(counter is not None, "work tiles with bounds are drawn from a counter")
    work_count = 0
    kv_count = 0
    cuts = 0
    publish_next(work_count, gl.program_id(0), counter, pipes, batch, C)
    work = get_work(work_count, pipes.work, 1, C)
    while has_work(work, C):
        key_tiles = key_tiles_of(work, batch, C)
        load_q(work_count, work, descriptors.q, pipes.q, C)
        cuts = load_keys(kv_count, cuts, key_tiles, descriptors, None, pipes, batch, C, ahead=(work_count + 1, counter))
        work_count += 1
        kv_count += key_tiles.walk.total
        work = get_work(work_count, pipes.work, 1, C)


@gluon.jit
def publish_next(count, t, counter, pipes, batch, C: gl.constexpr):
    """Publish the work tile ``t``, or if it has no rows the next one that this program gets, as the ``count``-th."""
    searching = 1
    while (t < batch.num_tiles) & (searching == 1):
        work = work_tile_of(t, batch, C)
        if work.q_len > 0:
            publish_work(count, pipes.work, with_sight(work, batch, C))
            searching = 0
        else:
            t = next_number(t, counter, fetch_number(counter))
    if searching == 1:
        publish_work(count, pipes.work, no_work(C))


@gluon.jit
def load_v_warp(descriptors, cut_loaded, pipes, batch, C: gl.constexpr):
    """The second load warp: the producer of V."""
    work_count = 0
    kv_count = 0
    cuts = 0
    work = get_work(work_count, pipes.work, 1, C)
    release_work(work_count, pipes.work)
    while has_work(work, C):
        key_tiles = key_tiles_of(work, batch, C)
        if C.F.bounds and work.sight.apart != 0:
            cuts = load_keys(kv_count, cuts, key_tiles, descriptors, cut_loaded, pipes, batch, C, APART=True)
        else:
            cuts = load_keys(kv_count, cuts, key_tiles, descriptors, cut_loaded, pipes, batch, C)
        kv_count += key_tiles.walk.total
        work_count += 1
        work = get_work(work_count, pipes.work, 1, C)
        release_work(work_count, pipes.work)


class TileLoad(NamedTuple):
    """A key tile to load: its place in the list of keys, the page of each TMA box, and from where to where."""

    start: gl.tensor
    page: gl.tensor
    desc: gl.tensor
    pipe: Pipeline


@gluon.jit
def load_keys(
    kv_count, cuts, key_tiles, descriptors, cut_loaded, pipes, batch, C: gl.constexpr, APART: gl.constexpr = False,
    ahead=None,
):  # fmt: skip
    """Load K, or with the mbarrier ``cut_loaded`` V, of all key tiles of a work tile.

    ``kv_count`` key tiles were loaded before this work tile. Returns ``cuts`` plus the stages of V in which an edge
    cuts a box. ``APART``: its rows, which have bounds, may leave out keys between theirs, so that any box may be cut.
    ``ahead``, with bounds: the next work tile's count, and the counter that it is drawn from (decode, which may have
    none, takes no bounds). It is published before the last key tile of this one is loaded.
    """
    OF_V: gl.constexpr = cut_loaded is not None
    desc, pipe, narrow_desc, narrow_pipe = descriptors.k, pipes.k, descriptors.narrow_k, pipes.narrow_k
    if OF_V:
        desc, pipe, narrow_desc, narrow_pipe = descriptors.v, pipes.v, descriptors.narrow_v, pipes.narrow_v
    if C.narrow_n > 0:
        start = narrow_tile(key_tiles, C)
        narrow = TileLoad(start, box_pages(start, key_tiles, C.narrow_n, 1, OF_V, batch, C), narrow_desc, narrow_pipe)
        wide = TileLoad(0, box_pages(0, key_tiles, C.block_n, 1, OF_V, batch, C), desc, pipe)
        cuts = load_stage(kv_count, cuts, (narrow, wide), key_tiles, cut_loaded, batch, C, APART)
    else:
        start, _ = key_tile(0, key_tiles, C)
        page = box_pages(start, key_tiles, C.block_n, 1, OF_V, batch, C)
        for j in range(key_tiles.walk.total):
            if ahead is not None:
                if j == key_tiles.walk.total - 1:
                    count, counter = ahead
                    t = next_number(0, counter, fetch_number(counter))
                    publish_next(count, t, counter, pipes, batch, C)
            next_start, _ = key_tile(gl.minimum(j + 1, key_tiles.walk.total - 1), key_tiles, C)
            next_page = box_pages(next_start, key_tiles, C.block_n, 1, OF_V, batch, C)
            loads = (TileLoad(start, page, desc, pipe),)
            cuts = load_stage(kv_count + j, cuts, loads, key_tiles, cut_loaded, batch, C, APART)
            start = next_start
            page = next_page
    return cuts


@gluon.jit
def load_stage(count, cuts, loads, key_tiles, cut_loaded, batch, C: gl.constexpr, APART: gl.constexpr):
    """Load the key tiles that share a stage. A stage of V that an edge cuts is loaded, cleaned and then committed."""
    state = pipeline_state(loads[0].pipe, count)
    producer_acquire("k" if cut_loaded is None else "v", count, C)
    if cut_loaded is None:
        start_loads("k", state.index, loads, key_tiles, state.full, C)
    else:
        cut = edge_cuts_a_box(loads[0].start, key_tiles, loads[0].pipe, C)
        for i in gl.static_range(1, len(loads)):
            cut |= edge_cuts_a_box(loads[i].start, key_tiles, loads[i].pipe, C)
        if APART or cut:
            start_loads("v", state.index, loads, key_tiles, cut_loaded, C)
            mbarrier.wait(cut_loaded, cuts & 1)
            cuts += 1
            for i in gl.static_range(len(loads)):
                if C.F.v_e4m3:
                    zero_unseen_columns(state.index, loads[i].start, key_tiles, loads[i].pipe, C)
                else:
                    zero_unseen(state.index, loads[i].start, key_tiles, loads[i].pipe, batch, C, APART)
            producer_commit(state)
        else:
            start_loads("v", state.index, loads, key_tiles, state.full, C)
    return cuts


@gluon.jit
def load_q(count, work, q_desc, pipe, C: gl.constexpr):
    """Load the query rows of all MMA warpgroups."""
    BLOCKS: gl.constexpr = blocks_of("q", C)
    COLUMNS: gl.constexpr = box_columns("q", C)
    state = pipeline_state(pipe, count)
    producer_acquire("q", count, C)
    mbarrier.expect(state.full, C.consumers * CONSUMER_ROWS * columns_of("q", C) * bytes_of("q", C))
    CONSUMERS: gl.constexpr = C.consumers
    for wg in gl.static_range(CONSUMERS):
        for block in gl.static_range(BLOCKS):
            box = query_box(state.index, wg, block, pipe, q_desc, C)
            tma_load(q_desc, q_coordinates(work, wg, block * COLUMNS, C), state.full, box)


@gluon.jit
def box_pages(start, key_tiles, KEYS: gl.constexpr, WARPS: gl.constexpr, OF_V: gl.constexpr, batch, C: gl.constexpr):
    """The page of each TMA box of a tile of ``KEYS`` keys, one a lane (the same in each warp). Dense keys are page 0.

    It is -1, which is loaded as zeros, where no row sees the box. A copy of V alone has a table of its own, as wide as
    any sequence is long.
    """
    if C.F.page_size == 0:
        return 0
    else:
        lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        pos = key_at(start + lane * C.box_rows, key_tiles.walk, C.F)
        wanted = some_seen(pos, pos + C.box_rows, key_tiles.band) & (lane < KEYS // C.box_rows)
        if OF_V and batch.v_table is not None:
            entries = batch.v_table + key_tiles.work.b.to(gl.int64) * batch.v_table_width
            return gl.load(entries + pos // C.F.page_size, mask=wanted, other=-1)
        else:
            entries, _ = table_row(
                batch.table, batch.table_index, key_tiles.work.b, batch.table_stride, batch.table_width, C.F
            )
            return pages_of(load_entries(entries, pos // C.F.page_size, wanted, -1, C.F), C.F)


@gluon.jit
def start_loads(PIPE: gl.constexpr, index, loads, key_tiles, full, C: gl.constexpr):
    """Start to load the key tiles of the stage ``index``; the mbarrier ``full`` counts their bytes."""
    mbarrier.expect(full, (C.block_n + C.narrow_n) * columns_of(PIPE, C) * bytes_of(PIPE, C))
    for i in gl.static_range(len(loads)):
        start_boxes(PIPE, index, loads[i], key_tiles, full, C)


@gluon.jit
def start_boxes(PIPE: gl.constexpr, index, load, key_tiles, full, C: gl.constexpr):
    """Start to load the TMA boxes of one key tile."""
    start, page, desc, pipe = load
    BLOCKS: gl.constexpr = blocks_of(PIPE, C)
    COLUMNS: gl.constexpr = pipe.stages.shape[2]
    ROWS: gl.constexpr = box_keys(PIPE, pipe.stages.shape, C)
    BOXES: gl.constexpr = keys_of(PIPE, pipe.stages.shape, pipe.full.shape, C) // ROWS
    BY_COLUMN: gl.constexpr = PIPE == "v" and C.F.v_e4m3
    # Not static: what does not depend on i is then found once before it is unrolled, a fifth fewer instructions.
    for i in range(BOXES):
        pos = key_at(start + i * ROWS, key_tiles.walk, C.F)
        if C.F.page_size > 0:
            row = slot_of(pos, C.F)
        else:
            row = key_tiles.work.kv_row + pos
        if C.F.page_size == 0:
            entry = gl.where(some_seen(pos, pos + ROWS, key_tiles.band), page, -1)
        else:
            entry = element(page, i)
        for block in gl.static_range(BLOCKS):
            box = pipe.stages.index((index * BLOCKS + block) * BOXES + i)
            box = reinterpret(box, desc.dtype, desc.block_type.shape, desc.layout)
            if BY_COLUMN:
                tma_load(desc, [entry, key_tiles.kv_head, 0, row], full, box)
            else:
                tma_load(desc, [entry, key_tiles.kv_head, row, block * COLUMNS], full, box)


@gluon.jit
def zero_unseen(index, start, key_tiles, pipe, batch, C: gl.constexpr, APART: gl.constexpr):
    """Set the rows of a loaded V tile that no query sees to zero."""
    BLOCKS: gl.constexpr = blocks_of("v", C)
    ROWS: gl.constexpr = 8
    CHUNKS: gl.constexpr = keys_of("v", pipe.stages.shape, pipe.full.shape, C) // ROWS
    STAGES: gl.constexpr = pipe.full.shape[0]
    # A chunk is [8, 64]. A lane has 8 neighbouring columns of a row, in one register each: 0 to 7, 8 to 15, ... for
    # the 8 lanes of a row. The 4 rows of a warp's first pass are 0 to 3, then come 4 to 7.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    chunks = reinterpret(
        pipe.stages, pipe.stages.dtype, [STAGES * BLOCKS * CHUNKS, ROWS, pipe.stages.shape[2]], pipe.stages.layout
    )
    for i in range(CHUNKS):
        pos = key_at(start + i * ROWS, key_tiles.walk, C.F)
        if APART or not all_seen(pos, pos + ROWS, key_tiles.band):
            row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            seen = seen_by_any(pos + row, key_tiles.band)
            if APART:
                low, end = bounds_of_tile(key_tiles.work, batch, C)
                seen &= ((seen_bits(pos, ROWS, low, end, key_tiles.work.lead) >> row) & 1) != 0
            for block in gl.static_range(BLOCKS):
                chunk = chunks.index((index * BLOCKS + block) * CHUNKS + i)
                chunk.store(gl.where(seen[:, None], chunk.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def zero_unseen_columns(index, start, key_tiles, pipe, C: gl.constexpr):
    """The same for V in e4m3, whose keys are columns of a box, in the order of ``key_of_column``. No row has bounds."""
    KEYS: gl.constexpr = pipe.stages.shape[2]
    ROWS: gl.constexpr = 8
    CHUNKS: gl.constexpr = pipe.stages.shape[1] // ROWS
    BOXES: gl.constexpr = keys_of("v", pipe.stages.shape, pipe.full.shape, C) // KEYS
    STAGES: gl.constexpr = pipe.full.shape[0]
    # A chunk is [8, 64] bytes: a lane has 16 neighbouring ones of a row, and the 4 lanes of a row have all.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [1, 1], [1, 0])
    BYTES: gl.constexpr = gl.NVMMASharedLayout(KEYS, 8, 2)
    chunks = reinterpret(pipe.stages, gl.uint8, [STAGES * BOXES * CHUNKS, ROWS, KEYS], BYTES)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
    for i in range(BOXES):
        pos = key_at(start + i * KEYS, key_tiles.walk, C.F)
        if not all_seen(pos, pos + KEYS, key_tiles.band):
            seen = seen_by_any(pos + key_of_column(column), key_tiles.band)
            for row in range(CHUNKS):
                chunk = chunks.index((index * BOXES + i) * CHUNKS + row)
                chunk.store(gl.where(seen[None, :], chunk.load(LAYOUT), 0))
    fence_async_shared()


@gluon.jit
def edge_cuts_a_box(start, key_tiles, pipe, C: gl.constexpr):
    """Whether an edge of the visible keys runs through a TMA box of a tile, not only between its boxes."""
    ROWS: gl.constexpr = box_keys("v", pipe.stages.shape, C)
    BOXES: gl.constexpr = keys_of("v", pipe.stages.shape, pipe.full.shape, C) // ROWS
    if BOXES <= 2:
        return edge_cuts(start, key_tiles, ROWS, C) | edge_cuts(start + (BOXES - 1) * ROWS, key_tiles, ROWS, C)
    else:  # a box a lane
        lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
        cut = edge_cuts(start + lane * ROWS, key_tiles, ROWS, C) & (lane < BOXES)
        return gl.max(cut.to(gl.int32), 0) != 0


@gluon.jit
def edge_cuts(start, key_tiles, ROWS: gl.constexpr, C: gl.constexpr):
    """Whether some keys of the TMA box at place ``start`` of the list are seen, and some are not."""
    pos = key_at(start, key_tiles.walk, C.F)
    return some_seen(pos, pos + ROWS, key_tiles.band) & (all_seen(pos, pos + ROWS, key_tiles.band) == 0)


@gluon.jit
def some_seen(start, end, band):
    """Whether any of the keys ``start .. end - 1`` is seen by some row."""
    return (start < band.lead) | ((end > band.left) & (start < band.right))


@gluon.jit
def all_seen(start, end, band):
    """Whether each of the keys ``start .. end - 1`` is seen by some row."""
    return (end <= band.lead) | ((start >= band.left) & (end <= band.right))
