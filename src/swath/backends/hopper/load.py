"""The producers of hopper_tiles.py: warps that find tiles and keep rings in shared memory full of what they need.

One loads queries and K, the other V: the warp that asks for the boxes of small pages is a bound, and two are run by two
schedulers. Boxes of the tensor memory accelerator bring whole rows, and zeros for what is out of a tensor's bounds: a
dead page, or a box that no row sees. Where the edge of the visible keys cuts a box, the hidden rows of V are cleared:
what stands there, NaN too, must not meet a p of 0.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from swath.backends.device.cache import load_entries, pages_of, slot_of, table_row
from swath.backends.gluon.names import load_box, reinterpret
from swath.backends.gluon.pipeline import (
    BOX_COLUMNS,
    CONSUMER_ROWS,
    Place,
    Ring,
    forget,
    keys_of,
    nth,
    pass_on,
    query_box,
    receive,
    stage_of,
    wait_for_room,
)
from swath.backends.gluon.scheduler import box_at, first_tile, heads_of, key_tile, place_of, tile_of
from swath.backends.triton.kernels.walk import key_at, seen_by_any


@gluon.jit
def produce_keys(sources, counter, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """The first producer: draws tiles and passes those with rows on, with their query rows and K as room allows.

    Without a ``counter`` programs take tiles in turn.
    """
    passed = 0
    n = 0
    cuts = 0  # and stays 0: of K nothing is cleared
    t = gl.program_id(0)
    while t < batch.num_tiles:
        place = place_of(t, batch, F, C)
        if counter is not None:
            drawn = draw(counter)
        if place.q_len > 0:
            pass_on(passed, rings.places, place)
            tile = tile_of(place, batch, F, C)
            load_queries(passed, place, sources.q, rings.q, F, C)
            cuts = load_keys(n, cuts, tile, sources, None, rings, batch, F, C)
            passed += 1
            n += tile.walk.total
        if counter is None:
            t += gl.num_programs(0)
        else:
            t = gl.max(drawn, 0) + gl.num_programs(0)
    pass_on(passed, rings.places, Place(heads_of(F, C), 0, 0, 0, 0, 0, 0, 0, 0))


@gluon.jit
def produce_values(sources, cut_loaded, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """The second producer: V of the tiles that the first one passes on."""
    passed = 0
    n = 0
    cuts = 0
    place = receive(passed, rings.places, 1)
    forget(passed, rings.places)
    while place.head < heads_of(F, C):
        tile = tile_of(place, batch, F, C)
        cuts = load_keys(n, cuts, tile, sources, cut_loaded, rings, batch, F, C)
        n += tile.walk.total
        passed += 1
        place = receive(passed, rings.places, 1)
        forget(passed, rings.places)


class Part(NamedTuple):
    """A tile to load: where in the list it begins, the page of each box, its source, and the ring that takes it."""

    start: gl.tensor
    page: gl.tensor
    desc: gl.tensor
    ring: Ring


@gluon.jit
def load_keys(n, cuts, tile, sources, cut_loaded, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """Ask for K, or with ``cut_loaded`` for V, of all key tiles of a row tile.

    ``n`` key tiles were before; counts those of V that an edge cuts.
    """
    desc, ring, first_desc, first_ring = sources.k, rings.k, sources.first_k, rings.first_k
    if cut_loaded is not None:
        desc, ring, first_desc, first_ring = sources.v, rings.v, sources.first_v, rings.first_v
    if C.first_n > 0:
        start = first_tile(tile, F, C)
        first = Part(start, box_pages(start, tile, C.first_n, 1, batch, F, C), first_desc, first_ring)
        wide = Part(0, box_pages(0, tile, C.block_n, 1, batch, F, C), desc, ring)
        cuts = load_stage(n, cuts, (first, wide), tile, cut_loaded, F, C)
    else:
        start, _ = key_tile(0, tile, F, C)
        page = box_pages(start, tile, C.block_n, 1, batch, F, C)
        for j in range(tile.walk.total):
            next_start, _ = key_tile(gl.minimum(j + 1, tile.walk.total - 1), tile, F, C)
            ahead = box_pages(next_start, tile, C.block_n, 1, batch, F, C)
            cuts = load_stage(n + j, cuts, (Part(start, page, desc, ring),), tile, cut_loaded, F, C)
            start = next_start
            page = ahead
    return cuts


@gluon.jit
def load_stage(n, cuts, parts, tile, cut_loaded, F: gl.constexpr, C: gl.constexpr):
    """Ask for the key tiles that share the ``n``-th stage; counts the times that an edge cuts those of V."""
    stage = stage_of(parts[0].ring, n)
    wait_for_room("k" if cut_loaded is None else "v", n, C)
    if cut_loaded is None:
        load_tiles(stage.slot, parts, tile, stage.full, F, C)
    else:
        cut = cuts_a_box(parts[0].start, tile, parts[0].ring, F)
        for i in gl.static_range(1, len(parts)):
            cut |= cuts_a_box(parts[i].start, tile, parts[i].ring, F)
        if cut:
            load_tiles(stage.slot, parts, tile, cut_loaded, F, C)
            mbarrier.wait(cut_loaded, cuts & 1)
            cuts += 1
            for i in gl.static_range(len(parts)):
                clear_hidden(stage.slot, parts[i].start, tile, parts[i].ring, F)
            mbarrier.arrive(stage.full, count=1)
        else:
            load_tiles(stage.slot, parts, tile, stage.full, F, C)
    return cuts


@gluon.jit
def load_queries(n, place, q_desc, ring, F: gl.constexpr, C: gl.constexpr):
    """Ask for the query rows of all consumers."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    stage = stage_of(ring, n)
    wait_for_room("q", n, C)
    mbarrier.expect(stage.full, C.consumers * CONSUMER_ROWS * F.head_dim * 2)
    CONSUMERS: gl.constexpr = C.consumers
    for c in gl.static_range(CONSUMERS):
        for half in gl.static_range(HALVES):
            box = query_box(stage.slot, c, half, ring, q_desc, F, C)
            load_box(q_desc, box_at(place, c, half, F, C), stage.full, box)


@gluon.jit
def box_pages(start, tile, KEYS: gl.constexpr, WARPS: gl.constexpr, batch, F: gl.constexpr, C: gl.constexpr):
    """The page of each box of a tile of ``KEYS`` keys, one a lane (the same in each warp). Dense keys are page 0.

    It is -1, which reads as zeros, where no row sees the box.
    """
    if F.page_size == 0:
        return 0
    else:
        lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        pos = key_at(start + lane * C.box_rows, tile.walk, F)
        wanted = some_seen(pos, pos + C.box_rows, tile.band) & (lane < KEYS // C.box_rows)
        b = tile.place.b
        entries, _ = table_row(batch.table, batch.table_index, b, batch.table_stride, batch.table_width, F)
        return pages_of(load_entries(entries, pos // F.page_size, wanted, -1, F), F)


@gluon.jit
def load_tiles(slot, parts, tile, full, F: gl.constexpr, C: gl.constexpr):
    """Ask for the key tiles of the empty stage ``slot``, box by box; ``full`` then counts their bytes."""
    mbarrier.expect(full, (C.block_n + C.first_n) * F.head_dim * 2)
    for i in gl.static_range(len(parts)):
        load_boxes(slot, parts[i], tile, full, F)


@gluon.jit
def load_boxes(slot, part, tile, full, F: gl.constexpr):
    """Ask for the boxes of one key tile."""
    start, page, desc, ring = part
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    ROWS: gl.constexpr = ring.stages.shape[1]
    BOXES: gl.constexpr = keys_of(ring.stages.shape, ring.full.shape, F) // ROWS
    # Not static: what does not depend on i is then found once before it is unrolled, a fifth fewer instructions.
    for i in range(BOXES):
        pos = key_at(start + i * ROWS, tile.walk, F)
        if F.page_size > 0:
            row = slot_of(pos, F)
        else:
            row = tile.place.key_row + pos
        if F.page_size == 0:
            entry = gl.where(some_seen(pos, pos + ROWS, tile.band), page, -1)
        else:
            entry = nth(page, i)
        for half in gl.static_range(HALVES):
            box = ring.stages.index((slot * HALVES + half) * BOXES + i)
            box = reinterpret(box, desc.dtype, desc.block_type.shape, desc.layout)
            load_box(desc, [entry, tile.kv_head, row, half * BOX_COLUMNS], full, box)


@gluon.jit
def clear_hidden(slot, start, tile, ring, F: gl.constexpr):
    """Zero the rows of a loaded V tile that no row sees: what stands there, NaN too, must not meet a p of 0."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    ROWS: gl.constexpr = 8
    CHUNKS: gl.constexpr = keys_of(ring.stages.shape, ring.full.shape, F) // ROWS
    STAGES: gl.constexpr = ring.full.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    chunks = reinterpret(
        ring.stages, ring.stages.dtype, [STAGES * HALVES * CHUNKS, ROWS, BOX_COLUMNS], ring.stages.layout
    )
    for i in range(CHUNKS):
        pos = key_at(start + i * ROWS, tile.walk, F)
        if not all_seen(pos, pos + ROWS, tile.band):
            seen = seen_by_any(pos + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), tile.band)
            for half in gl.static_range(HALVES):
                chunk = chunks.index((slot * HALVES + half) * CHUNKS + i)
                chunk.store(gl.where(seen[:, None], chunk.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def cuts_a_box(start, tile, ring, F: gl.constexpr):
    """Whether an edge of the visible keys runs through a box of a tile, not only between its boxes."""
    ROWS: gl.constexpr = ring.stages.shape[1]
    BOXES: gl.constexpr = keys_of(ring.stages.shape, ring.full.shape, F) // ROWS
    if BOXES <= 2:
        return box_is_cut(start, tile, ROWS, F) | box_is_cut(start + (BOXES - 1) * ROWS, tile, ROWS, F)
    else:  # a box a lane
        lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
        cut = box_is_cut(start + lane * ROWS, tile, ROWS, F) & (lane < BOXES)
        return gl.max(cut.to(gl.int32), 0) != 0


@gluon.jit
def box_is_cut(start, tile, ROWS: gl.constexpr, F: gl.constexpr):
    """Whether of the box at place ``start`` of the list of keys some rows are seen, and some not."""
    pos = key_at(start, tile.walk, F)
    return some_seen(pos, pos + ROWS, tile.band) & (all_seen(pos, pos + ROWS, tile.band) == 0)


@gluon.jit
def some_seen(start, end, band):
    """Whether any of the keys ``start .. end - 1`` is seen by some row."""
    return (start < band.lead) | ((end > band.left) & (start < band.right))


@gluon.jit
def all_seen(start, end, band):
    """Whether each of the keys ``start .. end - 1`` is seen by some row."""
    return (end <= band.lead) | ((start >= band.left) & (end <= band.right))


DRAW = gl.constexpr(
    "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.b32 $0, 0; "
    "@first atom.global.add.u32 $0, [$1], 1; }"
)


@gluon.jit
def draw(counter):
    """The launch's next number in lane 0 of the warp that draws, zeros in the others. Who reads it first waits for it.

    ``gl.atomic_add`` lost tiles in a prototype, and an exchange between the lanes would wait here.
    """
    address = gl.full((32,), 0, gl.int64, layout=gl.BlockedLayout([1], [32], [1], [0])) + counter.to(gl.int64)
    return gl.inline_asm_elementwise(DRAW, "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1)
