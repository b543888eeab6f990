"""Which rows and keys a tile number of hopper_tiles.py stands for: the same in producers and consumers."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.device.cache import table_row
from swath.backends.device.window import band_of, view_of
from swath.backends.gluon.pipeline import BOX_COLUMNS, CONSUMER_ROWS, Place
from swath.backends.triton.kernels.query import keys_within, leading_of, q_head_of, sequence_of, takes
from swath.backends.triton.kernels.tile import sequence_at, slots_of
from swath.backends.triton.kernels.walk import Walk, interior_tiles, plan_walk


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
    view: gl.tensor
    kv_head: gl.tensor
    band: gl.tensor
    walk: gl.tensor
    interior: gl.tensor
    interior_end: gl.tensor


@gluon.jit
def place_of(t, batch, F: gl.constexpr, C: gl.constexpr):
    """Find tile ``t`` of the flat list, longest first. Not every one has rows: then q_len and kv_len are 0."""
    POSITIONS: gl.constexpr = C.consumers * CONSUMER_ROWS // C.pack
    HEADS: gl.constexpr = heads_of(F, C)
    i = batch.num_tiles - 1 - t
    b, first_slot = sequence_at(i // HEADS, batch.cu_q, batch.num_seqs, batch.steps, POSITIONS)
    i -= first_slot * HEADS
    seq = sequence_of(b, batch.cu_q, batch.steps, batch.steps, batch.lens, batch.q_start, F)
    pages = batch.max_pages
    if F.page_size > 0:
        _, pages = table_row(batch.table, batch.indptr, b, batch.table_stride, batch.max_pages)
    kv_len = keys_within(seq, pages, F)
    if F.window:
        slot, head = i // HEADS, HEADS - 1 - i % HEADS
    else:
        slots = slots_of(b, first_slot, batch.cu_q, batch.steps, POSITIONS)
        slot, head = in_section(i, slots, kv_len, HEADS, F.kv_heads, F.head_dim)
    begin = slot * POSITIONS
    used = (i >= 0) & (begin < seq.q_len) & takes(b, seq.q_len, batch.claimed)
    return Place(
        head, b, begin, gl.where(used, seq.q_len, 0), seq.token, seq.start, gl.where(used, kv_len, 0), seq.key_row,
        leading_of(b, batch.leading, F),
    )  # fmt: skip


SECTION_BYTES = tl.constexpr(16 << 20)
"""Of keys and values that row tiles at work share. 32 heads over 2 x 16,384 keys, whose keys are 67 MB a sequence, took
5,978 us in sections of 16 MiB, 6,006 of 32, and 6,091 all heads at once."""


@triton.jit
def in_section(i, slots, kv_len, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The slot and head of the ``i``-th tile of a sequence, of which each section of heads has all slots in turn.

    The keys of a section stay in the L2 cache while it lasts; FlashAttention-3 has this order too. Tiles beyond those
    of the sequence get slots beyond its own.
    """
    kv_heads = SECTION_BYTES // (4 * HEAD_DIM) // tl.maximum(kv_len, 1)
    width = tl.minimum(tl.maximum(kv_heads, 1), KV_HEADS) * (HEADS // KV_HEADS)
    first = tl.minimum(i // (slots * width), (HEADS - 1) // width) * width
    i -= first * slots
    width = tl.minimum(width, HEADS - first)
    return i // width, first + i % width


@gluon.constexpr_function
def heads_of(F, C):
    """Row tiles that share a slot: one for each head, or for each kv head whose heads are packed."""
    return F.kv_heads * F.group // C.pack


@gluon.jit
def box_at(place, c: gl.constexpr, half: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """Where in q and in the output the box of ``half`` of the columns of a consumer's rows begins."""
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    kv_head, member = (place.head, 0) if C.pack > 1 else (place.head // F.group, place.head % F.group)
    seq = place.b if C.uniform else 0
    token = place.begin if C.uniform else place.token + place.begin
    return [seq, token + c * POSITIONS, q_head_of(kv_head, member, F), half * BOX_COLUMNS]


@gluon.jit
def tile_of(place, batch, F: gl.constexpr, C: gl.constexpr):
    """Lay out the key tiles of a place."""
    POSITIONS: gl.constexpr = C.consumers * CONSUMER_ROWS // C.pack
    kv_head = place.head if C.pack > 1 else place.head // F.group
    view = view_of(place.start, place.q_len, place.kv_len, batch.size)
    first = view.start + place.begin
    last = view.start + gl.minimum(place.begin + POSITIONS, place.q_len) - 1
    band = band_of(first, last, place.kv_len, view.size, place.leading, F)
    KEYS: gl.constexpr = C.block_n + C.first_n
    walk = plan_walk(band, C.box_rows, key_align(F, C), KEYS)
    # A row tile without keys gets zeros to see, and no branch of its own.
    walk = Walk(walk.lead, walk.gap, gl.maximum(walk.total, 1))
    interior, interior_end = interior_tiles(band, walk, first, last, view.size, F, KEYS)
    return Tile(place, view, kv_head, band, walk, interior, interior_end)


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
