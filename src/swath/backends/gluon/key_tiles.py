"""The key tiles of a work tile: which keys its rows see, and in which order their tiles are visited.

Load warps and MMA warpgroups each work this out from the same ``WorkTile``, so that they agree without a message. What
bounds of rows show together is in it: one warp reads them for all.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.device.window import Band, band_of, interior_of, rows_of, view_near
from swath.backends.gluon.scheduler import positions_of, tile_kv_head
from swath.backends.triton.kernels.walk import Walk, interior_tiles, plan_walk


class KeyTiles(NamedTuple):
    """The key tiles of a work tile. ``interior .. interior_end - 1`` of the list need no mask for the window."""

    work: gl.tensor  # the WorkTile
    kv_head: gl.tensor
    band: gl.tensor
    walk: gl.tensor
    interior: gl.tensor
    interior_end: gl.tensor


@gluon.jit
def key_tiles_of(work, batch, C: gl.constexpr):
    """The key tiles of a work tile; at least one."""
    POSITIONS: gl.constexpr = positions_of(C)
    kv_head = tile_kv_head(work, C)
    if C.F.bounds:
        band = Band(work.sight.lead, work.sight.left, work.sight.right)
    else:
        first = work.q_start + work.q_begin
        last = work.q_start + gl.minimum(work.q_begin + POSITIONS, work.q_len) - 1
        view = view_near(work.q_start, work.q_row, batch.window, C.F)
        rows = rows_of(first, last, first, view, work.kv_len, C.F)
        band = band_of(rows, work.kv_len, work.lead, C.F)
    KEYS: gl.constexpr = C.block_n + C.narrow_n
    walk = plan_walk(band, C.box_rows, key_align(C), KEYS)
    # Rows that see no key get one tile of zeros, which saves a branch for them.
    walk = Walk(walk.lead, walk.gap, gl.maximum(walk.total, 1))
    if C.F.bounds:
        full_from, full_to = work.sight.full_from, work.sight.full_to
    else:
        full_from, full_to = interior_of(band, rows, C.F)
    interior, interior_end = interior_tiles(full_from, full_to, walk, KEYS)
    return KeyTiles(work, kv_head, band, walk, interior, interior_end)


@gluon.jit
def num_masked(key_tiles):
    """How many key tiles need a mask; they are visited first."""
    return key_tiles.walk.total - (key_tiles.interior_end - key_tiles.interior)


@gluon.constexpr_function
def key_align(C):
    """What the band's first key in the list is a multiple of: a TMA box of a paged cache may not cross a page."""
    return C.box_rows if C.F.value.page_size > 0 else 1


@gluon.jit
def key_tile(j, key_tiles, C: gl.constexpr):
    """The ``j``-th key tile to visit: where in the list of keys it begins, and from where on its keys count.

    Tiles with a mask come first: those above the interior, from the last one down, then those below it. Then comes the
    interior, also from its last tile down.

    The last tile of the list is moved back until it ends with the band (or with a TMA box), so that no row of it is a
    key that no query may see. It then overlaps the tile before it. The keys of both count in that one.
    """
    walk = key_tiles.walk
    above = walk.total - key_tiles.interior_end
    i = gl.where(j < above, walk.total - 1 - j, key_tiles.interior - 1 - (j - above))
    i = gl.where(j < num_masked(key_tiles), i, key_tiles.interior_end - 1 - (j - num_masked(key_tiles)))
    x = i * C.block_n
    moved = gl.maximum(gl.minimum(x, list_end(key_tiles, C) - C.block_n), walk.lead)
    return gl.where(x < walk.lead, x, moved), x


@gluon.jit
def list_end(key_tiles, C: gl.constexpr):
    """Where the list of keys ends: with the band, or with a TMA box of a page."""
    ALIGN: gl.constexpr = key_align(C)
    return (key_tiles.band.right + ALIGN - 1) // ALIGN * ALIGN - key_tiles.walk.gap


@gluon.jit
def narrow_tile(key_tiles, C: gl.constexpr):
    """Where in the list the narrow tile of a single pass begins: it ends with the list.

    The wide tile has the first ``C.block_n`` keys of the list, so that of the narrow tile only those after them count.
    It begins early enough that no row of it is a key that no query may see.
    """
    return gl.maximum(list_end(key_tiles, C) - C.narrow_n, 0)
