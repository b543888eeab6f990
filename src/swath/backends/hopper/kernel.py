"""Tiles on Hopper: two warps stream K and V through shared memory, one or two warpgroups attend 64 rows each.

The tiles are those of tiles.py; what differs is how the time is filled. Producers (hopper_feed.py) keep rings of
query and key tiles full. A consumer asks for the scores of one key tile and, while the tensor cores still multiply
the last tile's p with its V, runs the softmax of this one: the pipeline of FlashAttention-3. Where two tiles hold all
keys that rows see, it takes both at once, and programs fill one another's gaps (``attend_once``). As many programs as
fit run from the start to the end of the launch and draw row tiles, longest first, so that none waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from swath.backends.device.cache import page_in_sight, pages_in_sight, table_row
from swath.backends.device.softmax import FLOOR, powers, sink_alone
from swath.backends.device.window import interior_of, reach_of
from swath.backends.gluon.pipeline import (
    BOX_COLUMNS,
    CONSUMER_ROWS,
    FIRST_NAMED,
    Rings,
    Sources,
    as_tiles,
    beside,
    forget,
    new_barriers,
    new_places,
    new_ring,
    query_stage,
    recall,
    receive,
    release,
    stage_of,
)
from swath.backends.gluon.scheduler import Batch, first_tile, heads_of, key_tile, masked_tiles, tile_of
from swath.backends.hopper.epilogue import Output, finish_rows, q_heads, release_written
from swath.backends.hopper.load import produce_keys, produce_values
from swath.backends.hopper.mask import masked_scores
from swath.backends.hopper.softmax import highest, of_rows, rescaled, spread, step, sums, total
from swath.backends.triton.kernels.walk import listed


class Query(NamedTuple):
    """The rows of a consumer, their state before any key, whom they see, and how their scores are made.

    All rows see the keys at places ``from_all .. to_all - 1`` of the list; ``clean``: every page in sight lives.
    """

    tile: gl.tensor
    m: gl.tensor
    l: gl.tensor
    reach: gl.tensor
    from_all: gl.tensor
    to_all: gl.tensor
    scale_log2: gl.tensor
    cap_log2: gl.tensor
    clean: gl.tensor


@gluon.jit
def consume(c: gl.constexpr, output, scales, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """A consumer: 64 rows of every tile of this program over all its key tiles."""
    k, v = as_tiles(rings.k, C.stages, C.block_n, F), as_tiles(rings.v, C.stages, C.block_n, F)
    if C.first_n > 0:
        first_k = as_tiles(rings.first_k, C.stages, C.first_n, F)
        first_v = as_tiles(rings.first_v, C.stages, C.first_n, F)
        consume_once(c, output, scales, Rings(rings.q, k, v, first_k, first_v, rings.places), batch, F, C)
    else:
        consume_all(c, output, scales, Rings(rings.q, k, v, None, None, rings.places), batch, F, C)
    if output.boxes is not None:
        tma.store_wait(0)


@gluon.constexpr_function
def recalls(F, C):
    """Whether a consumer reads a place once more when it writes its rows, and keeps none of it meanwhile.

    Where registers are few: loops over heads of 64 have enough, and were 8 % slower so, in the same instructions.
    """
    return C.first_n > 0 or F.head_dim > 128


@gluon.jit
def consume_all(c: gl.constexpr, output, scales, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """Rows over any number of key tiles. The next ones are found while tensor cores multiply the last p of these."""
    rows = 0
    n = 0
    query = next_query(rows, c, output.sink, scales, rings, batch, F, C)
    while query.tile.place.head < heads_of(F, C):
        m, l, values = attend(n, rows, c, query, output, rings, batch, F, C)
        done = query.tile.place
        n += query.tile.walk.total
        rows += 1
        query = next_query(rows, c, output.sink, scales, rings, batch, F, C)
        acc = warpgroup_mma_wait(0, deps=[values])
        release("v", n - 1, C)
        if recalls(F, C):
            done = recall(rows - 1, rings.places, 4)
        finish_rows((m, l, acc), rows - 1, done, c, output, batch, F, C)


@gluon.jit
def consume_once(c: gl.constexpr, output, scales, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """Rows all of whose keys are in one stage. Other programs fill the gaps between them."""
    rows = 0
    query = next_query(rows, c, output.sink, scales, rings, batch, F, C)
    while query.tile.place.head < heads_of(F, C):
        state = attend_once(rows, c, query, output, rings, batch, F, C)
        finish_rows(state, rows, recall(rows, rings.places, 4), c, output, batch, F, C)
        rows += 1
        query = next_query(rows, c, output.sink, scales, rings, batch, F, C)


@gluon.jit
def next_query(rows, c: gl.constexpr, sink, scales, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """The ``rows``-th rows of a consumer."""
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, score_layout(C.block_n, C)))
    place = receive(rows, rings.places, 4)
    if not recalls(F, C):
        forget(rows, rings.places)
    tile = tile_of(place, batch, F, C)
    m, l = nothing_seen(i, tile, sink, F, C)
    view = tile.view
    first = view.start + place.begin + c * POSITIONS
    reach = listed(reach_of(first + i // C.pack, tile.band, view.size, place.leading, F), tile.walk)
    from_all, to_all = interior_of(tile.band, first, first + POSITIONS - 1, view.size, F)
    scale_log2, cap_log2 = scales
    return Query(
        tile, m, l, reach, from_all - tile.walk.gap, to_all - tile.walk.gap, scale_log2, cap_log2,
        all_live(tile, batch, F),
    )  # fmt: skip


@gluon.jit
def attend(n, rows, c: gl.constexpr, query, output, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """The state (m, l, acc) of rows after all key tiles, of which acc still waits for the last product.

    ``n`` key tiles of ``rows`` row tiles were before.
    """
    tile = query.tile
    q, k = query_stage(rows, c, rings.q, F, C), stage_of(rings.k, n)
    start, fresh = key_tile(0, tile, F, C)
    mbarrier.wait(q.full, q.phase)
    mbarrier.wait(k.full, k.phase)
    s = warpgroup_mma_wait(0, deps=[score(q.tile, k.tile, C)])
    release("k", n, C)
    if output.boxes is not None:
        release_written(rows - 1, C)
    s, scale = masked_scores(s, start, fresh, query, batch, True, F, C)
    p, m, l, alpha = step(s, scale, query.m, spread(query.l))
    acc = no_values(F)
    masked = gl.maximum(gl.where(query.clean, masked_tiles(tile), tile.walk.total), 1)
    p, state = overlap(1, masked, n, p, (m, l, acc, alpha), q, query, rings, batch, True, F, C)
    p, state = overlap(masked, tile.walk.total, n, p, state, q, query, rings, batch, False, F, C)
    m, l, acc, alpha = state
    acc = rescaled(acc, alpha)
    if output.boxes is None:
        release("q", rows, C)
    v = stage_of(rings.v, n + tile.walk.total - 1)
    mbarrier.wait(v.full, v.phase)
    return m, total(l, m), warpgroup_mma(operand(p, acc, v.tile.dtype), v.tile, acc, is_async=True)


@gluon.jit
def attend_once(rows, c: gl.constexpr, query, output, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """The state of rows all of whose keys are in a narrow tile and two halves of a wide one: all scores, then all p.

    Nothing is scaled again, and the accumulator does not exist yet while the scores do, so small programs have
    registers enough. ``rows`` counts the tiles of every ring.
    """
    HALF: gl.constexpr = C.block_n // 2
    m, l, tile = query.m, query.l, query.tile
    acc = no_values(F)
    q = query_stage(rows, c, rings.q, F, C)
    k_first, k = stage_of(rings.first_k, rows), stage_of(rings.k, rows)
    v_first, v = stage_of(rings.first_v, rows), stage_of(rings.v, rows)
    mbarrier.wait(q.full, q.phase)
    mbarrier.wait(k.full, k.phase)
    first = score(q.tile, k_first.tile, C)
    near = score(q.tile, k.tile.slice(HALF, HALF), C)
    far = score(q.tile, k.tile.slice(0, HALF), C)
    first, near, far = warpgroup_mma_wait(0, deps=[first, near, far])
    release("k", rows, C)
    if output.boxes is None:
        release("q", rows, C)
    else:
        release_written(rows - 1, C)
    first, scale = masked_scores(first, first_tile(tile, F, C), C.block_n, query, batch, True, F, C)
    near, _ = masked_scores(near, 0, None, query, batch, True, F, C, HALF)
    far, _ = masked_scores(far, 0, None, query, batch, True, F, C)
    m_new = highest((first, near, far), scale, m)
    # In an order in which rounded pairs take the registers that scores leave: in others ptxas spills more.
    DTYPE: gl.constexpr = v.tile.dtype
    near, l_new = rounded(near, scale, m_new, None, acc, DTYPE)
    far, l_new = rounded(far, scale, m_new, l_new, acc, DTYPE)
    first, l_new = rounded(first, scale, m_new, l_new, acc, DTYPE)
    l = l * gl.exp2(m - m_new) + total(l_new, m)
    mbarrier.wait(v.full, v.phase)
    values = warpgroup_mma(first, v_first.tile, acc, use_acc=False, is_async=True)
    values = warpgroup_mma(near, v.tile.slice(HALF, HALF), values, is_async=True)
    values = warpgroup_mma(far, v.tile.slice(0, HALF), values, is_async=True)
    # Passed already: a block boundary, without which ptxas computes addresses of the output while all p are alive.
    mbarrier.wait(v.full, v.phase)
    acc = warpgroup_mma_wait(0, deps=[values])
    release("v", rows, C)
    return m_new, l, acc


@gluon.jit
def rounded(s, scale, m, l, acc, DTYPE: gl.constexpr):
    """p of a tile of scores as the operand of its product with V, and ``sums`` with its own, the first ones if None."""
    p = powers(s, scale, of_rows(m, s))
    l = sums(p) if l is None else l + sums(p)
    return operand(p, acc, DTYPE), l


@gluon.jit
def overlap(first, end, n, p, state, q, query, rings, batch, MASKED: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """Key tiles ``first .. end - 1``. p comes in, and goes out, waiting for the V of the tile before.

    So the product of p with that V runs beside the softmax of the next scores. acc waits for the factor ``alpha``, too.
    """
    m, l, acc, alpha = state
    for j in range(first, end):
        start, fresh = key_tile(j, query.tile, F, C)
        k, v = stage_of(rings.k, n + j), stage_of(rings.v, n + j - 1)
        p16 = operand(p, acc, v.tile.dtype)
        mbarrier.wait(k.full, k.phase)
        scores = score(q.tile, k.tile, C)
        acc = rescaled(acc, alpha)
        mbarrier.wait(v.full, v.phase)
        values = warpgroup_mma(p16, v.tile, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[scores])
        s, scale = masked_scores(s, start, fresh, query, batch, MASKED, F, C)
        p, m, l, alpha = step(s, scale, m, l)
        # A barrier known to have passed makes a block boundary here, and the move keeps p above it: otherwise ptxas
        # hoists the wait for the product with V over the softmax, and nothing overlaps. This loop waits for no other
        # one of q: before a second wait at a barrier Triton lets all warps meet.
        p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [p], dtype=gl.float32, is_pure=False, pack=1)
        mbarrier.wait(q.full, q.phase)
        acc, p, alpha = warpgroup_mma_wait(0, deps=[values, p, alpha])
        release("k", n + j, C)
        release("v", n + j - 1, C)
    return p, (m, l, acc, alpha)


@gluon.constexpr_function
def score_layout(keys, C):
    """The scores of 64 rows with a tile of keys. In programs for one pass an instruction makes 64 columns of them:

    ptxas allows it the registers that a thread has at the start, not those that consumers are given.
    """
    columns = min(keys, 64) if C.first_n else keys
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def score(q, k, C: gl.constexpr):
    """Start the product of query rows with a key tile."""
    KEYS: gl.constexpr = k.shape[0]
    SCORES: gl.constexpr = score_layout(KEYS, C)
    zero = gl.full((CONSUMER_ROWS, KEYS), 0.0, gl.float32, layout=SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def operand(p, acc, DTYPE: gl.constexpr):
    """p as the register operand of the PV product; it stays in the threads that computed it."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True)


@gluon.jit
def nothing_seen(i, tile, sink, F: gl.constexpr, C: gl.constexpr):
    """The state (m, l) of the rows ``i`` before any key: their sink logits, if there are any, joined it."""
    m = gl.full((CONSUMER_ROWS,), FLOOR, gl.float32, layout=i.type.layout)
    l = gl.full((CONSUMER_ROWS,), 0.0, gl.float32, layout=i.type.layout)
    if sink is not None:
        m, l = sink_alone(gl.load(sink + q_heads(i, tile.place.head, F, C)).to(gl.float32))
    return m, l


@gluon.jit
def no_values(F: gl.constexpr):
    """The accumulator of rows before any key."""
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.head_dim, 16])
    return gl.full((CONSUMER_ROWS, F.head_dim), 0.0, gl.float32, layout=VALUES)


@gluon.jit
def all_live(tile, batch, F: gl.constexpr):
    """Whether every table entry of the keys in sight names a page of the pool."""
    if F.page_size == 0:
        return tile.place.head == tile.place.head
    else:
        lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
        entries, _ = table_row(batch.table, batch.indptr, tile.place.b, batch.table_stride, batch.max_pages)
        dead = lane * 0
        for i in range(gl.cdiv(pages_in_sight(tile.band, F.page_size), 128)):
            page, seen = page_in_sight(i * 128 + lane, tile.band, F.page_size)
            entry = gl.load(entries + page, mask=seen, other=0)
            dead = dead | gl.where((entry < 0) | (entry >= batch.num_pages), 1, 0)
        return gl.max(dead, 0) == 0


RUN_TIME = ("leading", "size", "steps", "claimed", "num_seqs", "max_pages", "num_pages", "table_stride", "num_tiles")


@gluon.jit(do_not_specialize=RUN_TIME)
def hopper_tile_kernel(
    q_desc, k_desc, v_desc, first_k_desc, first_v_desc, out_desc, counter, out, lse, sink,
    table, indptr, lens, cu_q, q_start, leading, scale_log2, cap_log2, size,
    steps, claimed, num_seqs, max_pages, num_pages, table_stride, num_tiles,
    out_seq, out_token, out_head, F: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """As many programs as multiprocessors share the flat list of tiles."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    gl.static_assert(FIRST_NAMED + 2 * C.stages + C.q_stages <= 16, "a program has 16 named barriers")
    q_ring = new_ring(C.q_stages, C.consumers * HALVES, CONSUMER_ROWS, q_desc.dtype)
    BOXES: gl.constexpr = C.block_n // C.box_rows
    k_ring = new_ring(C.stages, HALVES * BOXES, C.box_rows, q_desc.dtype)
    v_ring = new_ring(C.stages, HALVES * BOXES, C.box_rows, q_desc.dtype)
    first_k, first_v = None, None
    if C.first_n > 0:
        first_k = beside(k_ring, C.stages, HALVES, C.first_n, C.first_rows)
        first_v = beside(v_ring, C.stages, HALVES, C.first_n, C.first_rows)
    rings = Rings(q_ring, k_ring, v_ring, first_k, first_v, new_places(C.consumers))
    sources = Sources(q_desc, k_desc, v_desc, first_k_desc, first_v_desc)
    cut_loaded = new_barriers(1, 1).index(0)
    fence_async_shared()
    batch = Batch(
        table, indptr, lens, cu_q, q_start, leading, size, steps, claimed, num_seqs, max_pages, num_pages, table_stride,
        num_tiles,
    )  # fmt: skip
    output = Output(out_desc, q_ring, out, lse, sink, out_seq, out_token, out_head)
    producer: gl.constexpr = C.producer_registers
    consumer: gl.constexpr = C.consumer_registers
    if C.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), output, (scale_log2, cap_log2), rings, batch, F, C)),
                (consume, (gl.constexpr(1), output, (scale_log2, cap_log2), rings, batch, F, C)),
                (produce_keys, (sources, counter, rings, batch, F, C)),
                (produce_values, (sources, cut_loaded, rings, batch, F, C)),
            ],
            [4, 1, 1],
            [consumer, producer, producer],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), output, (scale_log2, cap_log2), rings, batch, F, C)),
                (produce_keys, (sources, counter, rings, batch, F, C)),
                (produce_values, (sources, cut_loaded, rings, batch, F, C)),
            ],
            [1, 1],
            [producer, producer],
        )
