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

from swath.device.cache import slot_of, table_row
from swath.device.window import band_of
from swath.schedules.gluon_names import load_box, reinterpret
from swath.schedules.hopper_rings import (
    BOX_COLUMNS,
    CONSUMER_ROWS,
    Place,
    Ring,
    keys_of,
    nth,
    pass_on,
    receive,
    stage_of,
)
from swath.schedules.query import leading_of, q_head_of, sequence_of, takes
from swath.schedules.tiles import sequence_at
from swath.schedules.walk import Walk, interior_tiles, key_at, plan_walk, seen_by_any


class Batch(NamedTuple):
    """What a tile number is turned into rows and keys with: lengths, tables and the window."""

    table: gl.tensor
    indptr: gl.tensor
    lens: gl.tensor
    cu_q: gl.tensor
    q_start: gl.tensor
    leading: gl.tensor
    size: gl.tensor
    steps: gl.tensor
    claimed: gl.tensor
    num_seqs: gl.tensor
    max_pages: gl.tensor
    num_pages: gl.tensor
    table_stride: gl.tensor
    num_tiles: gl.tensor


class Tile(NamedTuple):
    """The rows of a tile and the key tiles they see."""

    place: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    band: gl.tensor
    walk: gl.tensor
    interior: gl.tensor
    interior_end: gl.tensor


@gluon.jit
def place_of(t, batch, F: gl.constexpr, C: gl.constexpr):
    """Find tile ``t`` of the flat list, longest first. Not every one has rows: then q_len and kv_len are 0."""
    POSITIONS: gl.constexpr = C.consumers * CONSUMER_ROWS // C.pack
    slot = (batch.num_tiles - 1 - t) // (F.kv_heads * F.group // C.pack)
    b, first_slot = sequence_at(slot, batch.cu_q, batch.num_seqs, batch.steps, POSITIONS)
    seq = sequence_of(b, batch.cu_q, batch.steps, batch.lens, batch.q_start, F)
    begin = (slot - first_slot) * POSITIONS
    used = (begin < seq.q_len) & takes(b, seq.q_len, batch.claimed)
    kv_len = seq.kv_len
    if F.page_size > 0:
        _, pages = table_row(batch.table, batch.indptr, b, batch.table_stride, batch.max_pages)
        kv_len = gl.minimum(kv_len, pages * F.page_size)
    return Place(
        t, b, begin, gl.where(used, seq.q_len, 0), seq.token, seq.start, gl.where(used, kv_len, 0), seq.key_row,
        leading_of(b, batch.leading, F),
    )  # fmt: skip


@gluon.jit
def tile_of(place, batch, F: gl.constexpr, C: gl.constexpr):
    """Lay out the key tiles of a place."""
    POSITIONS: gl.constexpr = C.consumers * CONSUMER_ROWS // C.pack
    head = place.t % (F.kv_heads * F.group // C.pack)
    kv_head = head if C.pack > 1 else head // F.group
    first = place.start + place.begin
    last = place.start + gl.minimum(place.begin + POSITIONS, place.q_len) - 1
    band = band_of(first, last, place.kv_len, batch.size, place.leading, F)
    KEYS: gl.constexpr = C.block_n + C.first_n
    walk = plan_walk(band, C.box_rows, key_align(F, C), KEYS)
    # A row tile without keys gets zeros to see, and no branch of its own.
    walk = Walk(walk.lead, walk.gap, gl.maximum(walk.total, 1))
    interior, interior_end = interior_tiles(band, walk, first, last, batch.size, F, KEYS)
    return Tile(place, head, kv_head, band, walk, interior, interior_end)


@gluon.jit
def masked_tiles(tile):
    """How many key tiles of a row tile need a mask; they come first."""
    return tile.walk.total - (tile.interior_end - tile.interior)


@gluon.constexpr_function
def key_align(F, C):
    """What a band's first key is a multiple of: boxes may not cross a page, and stand anywhere in dense keys."""
    return C.box_rows if F.page_size > 0 else 1


@gluon.jit
def key_tile(j, tile, F: gl.constexpr, C: gl.constexpr):
    """Where in the list of keys the ``j``-th key tile begins, and from where on its keys are new.

    Masked tiles come first, all downwards. The last tile of the band is moved back until it ends with the band (or at
    the end of a box), so that none of its rows is one that nobody may see; the keys that it shares with its neighbour
    count there.
    """
    walk = tile.walk
    above = walk.total - tile.interior_end
    i = gl.where(j < above, walk.total - 1 - j, tile.interior - 1 - (j - above))
    i = gl.where(j < masked_tiles(tile), i, tile.interior_end - 1 - (j - masked_tiles(tile)))
    x = i * C.block_n
    moved = gl.maximum(gl.minimum(x, list_end(tile, F, C) - C.block_n), walk.lead)
    return gl.where(x < walk.lead, x, moved), x


@gluon.jit
def list_end(tile, F: gl.constexpr, C: gl.constexpr):
    """Where the list of keys ends: with the band, or with a box of a page."""
    ALIGN: gl.constexpr = key_align(F, C)
    return (tile.band.right + ALIGN - 1) // ALIGN * ALIGN - tile.walk.gap


@gluon.jit
def first_tile(tile, F: gl.constexpr, C: gl.constexpr):
    """Where the narrow tile of a row tile in one pass begins: it ends with the list of keys.

    The other tile is the places before ``C.block_n``. Those from there on are new in the narrow one, which begins as
    early as it does so that no row of it is one that nobody may see.
    """
    return gl.maximum(list_end(tile, F, C) - C.first_n, 0)


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
            load_queries(passed, tile, sources.q, rings.q, F, C)
            cuts = load_keys(n, cuts, tile, sources, None, rings, batch, F, C)
            passed += 1
            n += tile.walk.total
        if counter is None:
            t += gl.num_programs(0)
        else:
            t = gl.max(drawn, 0) + gl.num_programs(0)
    pass_on(passed, rings.places, Place(t, 0, 0, 0, 0, 0, 0, 0, 0))


@gluon.jit
def produce_values(sources, cut_loaded, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """The second producer: V of the tiles that the first one passes on."""
    passed = 0
    n = 0
    cuts = 0
    place = receive(passed, rings.places, 1)
    while place.t < batch.num_tiles:
        tile = tile_of(place, batch, F, C)
        cuts = load_keys(n, cuts, tile, sources, cut_loaded, rings, batch, F, C)
        n += tile.walk.total
        passed += 1
        place = receive(passed, rings.places, 1)


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
    mbarrier.wait(stage.empty, stage.phase ^ 1)
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
def load_queries(n, tile, q_desc, ring, F: gl.constexpr, C: gl.constexpr):
    """Ask for the query rows of all consumers."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    stage = stage_of(ring, n)
    mbarrier.wait(stage.empty, stage.phase ^ 1)
    mbarrier.expect(stage.full, C.consumers * CONSUMER_ROWS * F.head_dim * 2)
    q_head = q_head_of(tile.kv_head, 0 if C.pack > 1 else tile.head % F.group, F)
    place = tile.place
    seq = place.b if C.uniform else 0
    token = place.begin if C.uniform else place.token + place.begin
    CONSUMERS: gl.constexpr = C.consumers
    for c in gl.static_range(CONSUMERS):
        for half in gl.static_range(HALVES):
            box = ring.stages.index((stage.slot * C.consumers + c) * HALVES + half)
            box = reinterpret(box, q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
            at = [seq, token + c * POSITIONS, q_head, half * BOX_COLUMNS]
            load_box(q_desc, at, stage.full, box)


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
        entries, _ = table_row(batch.table, batch.indptr, tile.place.b, batch.table_stride, batch.max_pages)
        return gl.load(entries + pos // F.page_size, mask=wanted, other=-1)


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
