"""Tiles on Hopper: a producer warp streams K and V through shared memory, one or two warpgroups attend 64 rows each.

The tiles are those of tiles.py; what differs is how the time is filled. The producer (hopper_feed.py) keeps rings of
query and key tiles full. A consumer asks for the scores of one key tile and, while the tensor cores still multiply the
last tile's p with its V, runs the softmax of this one: the pipeline of FlashAttention-3. As many programs as fit run
from the start to the end of the launch and draw row tiles, longest first, so that none waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from swath.device.cache import table_row
from swath.device.softmax import FLOOR, add_sink, finish, soft_cap, step
from swath.device.window import reach_of
from swath.schedules.hopper_feed import (
    BOX_COLUMNS,
    CONSUMER_ROWS,
    Batch,
    Rings,
    as_tiles,
    box_pages,
    key_tile,
    masked_tiles,
    new_places,
    new_ring,
    produce,
    receive,
    tile_of,
)
from swath.schedules.query import q_head_of, row_offsets
from swath.schedules.walk import listed

NOWHERE = gl.constexpr(1 << 30)
"""A place in the list of keys that no row sees."""


class Output(NamedTuple):
    """Where results go, and the sink logits that join them: element strides of ``out`` by sequence, token and head."""

    out: gl.tensor
    lse: gl.tensor
    sink: gl.tensor
    seq: gl.tensor
    token: gl.tensor
    head: gl.tensor


class Query(NamedTuple):
    """The query rows of a consumer, whom they see, how their scores are made, and whether every page in sight lives."""

    q: gl.shared_memory_descriptor
    reach: gl.tensor
    scale_log2: gl.tensor
    cap_log2: gl.tensor
    clean: gl.tensor


@gluon.jit
def consume(c: gl.constexpr, output, scale_log2, cap_log2, rings, batch, F: gl.constexpr, C: gl.constexpr):
    """A consumer: 64 rows of every tile of this program over all its key tiles."""
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_n, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.head_dim, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_ring = as_tiles(rings.q, C.q_stages * C.consumers, CONSUMER_ROWS, F)
    k_ring = as_tiles(rings.k, C.stages, C.block_n, F)
    v_ring = as_tiles(rings.v, C.stages, C.block_n, F)
    i = gl.arange(0, CONSUMER_ROWS, layout=ROW)
    passed = 0
    rows = 0
    n = 0
    place = receive(passed, rings.places)
    while place.t < batch.num_tiles:
        tile = tile_of(place, batch, F, C)
        begin = place.begin + c * POSITIONS
        m = gl.full((CONSUMER_ROWS,), FLOOR, gl.float32, layout=ROW)
        l = gl.full((CONSUMER_ROWS,), 0.0, gl.float32, layout=ROW)
        acc = gl.full((CONSUMER_ROWS, F.head_dim), 0.0, gl.float32, layout=VALUES)
        if tile.walk.total > 0:
            slot = rows % C.q_stages
            reach = reach_of(place.start + begin + i // C.pack, tile.band, batch.size, place.leading, F)
            reach = listed(reach, tile.walk)
            query = Query(
                q_ring.stages.index(slot * C.consumers + c), reach, scale_log2, cap_log2, all_live(tile, batch, F)
            )
            mbarrier.wait(q_ring.full.index(slot), (rows // C.q_stages) & 1)
            m, l, acc = attend(n, (m, l, acc), query, q_ring.empty.index(slot), k_ring, v_ring, tile, batch, F, C)
            n += tile.walk.total
            rows += 1
        finish_rows((m, l, acc), tile, begin, output, batch, F, C)
        passed += 1
        place = receive(passed, rings.places)


@gluon.jit
def attend(n, state, query, q_empty, k_ring, v_ring, tile, batch, F: gl.constexpr, C: gl.constexpr):
    """The state (m, l, acc) of rows after all key tiles of a row tile; ``n`` key tiles were in the ring before."""
    m, l, acc = state
    slot = n % C.stages
    mbarrier.wait(k_ring.full.index(slot), (n // C.stages) & 1)
    s = warpgroup_mma_wait(0, deps=[score(query.q, k_ring.stages.index(slot), C)])
    mbarrier.arrive(k_ring.empty.index(slot), count=1)
    s, scale = masked_scores(s, 0, query, tile, batch, True, F, C)
    p, m, l, _ = step(s, scale, m, l)
    masked = gl.maximum(gl.where(query.clean, masked_tiles(tile), tile.walk.total), 1)
    p, m, l, acc = overlap(1, masked, n, p, (m, l, acc), query, k_ring, v_ring, tile, batch, True, F, C)
    p, m, l, acc = overlap(masked, tile.walk.total, n, p, (m, l, acc), query, k_ring, v_ring, tile, batch, False, F, C)
    mbarrier.arrive(q_empty, count=1)
    last = n + tile.walk.total - 1
    slot = last % C.stages
    mbarrier.wait(v_ring.full.index(slot), (last // C.stages) & 1)
    values = warpgroup_mma(operand(p, acc, v_ring.stages.dtype), v_ring.stages.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[values])
    mbarrier.arrive(v_ring.empty.index(slot), count=1)
    return m, l, acc


@gluon.jit
def overlap(
    first, end, n, p, state, query, k_ring, v_ring, tile, batch, MASKED: gl.constexpr, F: gl.constexpr, C: gl.constexpr
):
    """Key tiles ``first .. end - 1``. p comes in, and goes out, waiting for the V of the tile before.

    So the product of p with that V runs beside the softmax of the next scores.
    """
    m, l, acc = state
    OUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    for j in range(first, end):
        slot = (n + j) % C.stages
        before = (n + j - 1) % C.stages
        phase = ((n + j - 1) // C.stages) & 1
        p16 = operand(p, acc, v_ring.stages.dtype)
        mbarrier.wait(k_ring.full.index(slot), ((n + j) // C.stages) & 1)
        scores = score(query.q, k_ring.stages.index(slot), C)
        mbarrier.wait(v_ring.full.index(before), phase)
        values = warpgroup_mma(p16, v_ring.stages.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[scores])
        s, scale = masked_scores(s, j, query, tile, batch, MASKED, F, C)
        p, m, l, alpha = step(s, scale, m, l)
        # A barrier known to have passed makes a block boundary here, and the move keeps p above it: otherwise ptxas
        # hoists the wait for the product with V over the softmax, and nothing overlaps.
        p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [p], dtype=gl.float32, is_pure=False, pack=1)
        mbarrier.wait(v_ring.full.index(before), phase)
        acc, p, alpha = warpgroup_mma_wait(0, deps=[values, p, alpha])
        mbarrier.arrive(k_ring.empty.index(slot), count=1)
        mbarrier.arrive(v_ring.empty.index(before), count=1)
        acc *= gl.convert_layout(alpha, OUT)[:, None]
    return p, m, l, acc


@gluon.jit
def score(q, k, C: gl.constexpr):
    """Start the product of query rows with a key tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_n, 16])
    zero = gl.full((CONSUMER_ROWS, C.block_n), 0.0, gl.float32, layout=SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def operand(p, acc, DTYPE: gl.constexpr):
    """p as the register operand of the PV product; it stays in the threads that computed it."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True)


@gluon.jit
def masked_scores(s, j, query, tile, batch, MASKED: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """Scores of the ``j``-th key tile, capped and masked, and the scale that makes them base-2."""
    scale = query.scale_log2
    if F.softcap:
        s = soft_cap(s * scale, query.cap_log2)
        scale = 1.0
    if MASKED:
        reach = query.reach
        start, fresh = key_tile(j, tile, F, C)
        column = gl.arange(0, C.block_n, layout=gl.SliceLayout(0, s.type.layout))
        x, low = start + column, reach.low
        if F.leading == "":
            low = gl.maximum(low, fresh)
        else:  # leading keys are seen below ``low``
            x |= ((x - fresh) >> 31) & NOWHERE  # where x < fresh; as a choice it would take predicates from ``hide``
        s = hide(s, x, low, reach.end, reach.lead, F)
        if F.page_size > 0:
            if not query.clean:
                live = (live_boxes(start, tile, batch, F, C) >> (column // C.box_rows)) & 1
                s = gl.where((live != 0)[None, :], s, float("-inf"))
    return s, scale


WITHIN = "{ .reg .pred seen; setp.lt.s32 seen, $2, $4; setp.ge.and.s32 seen, $2, $3, seen; "
HIDE = gl.constexpr(WITHIN + "selp.f32 $0, $1, 0fFF800000, seen; }")
HIDE_BUT_LEADING = gl.constexpr(WITHIN + "setp.lt.or.s32 seen, $2, $5, seen; selp.f32 $0, $1, 0fFF800000, seen; }")


@gluon.jit
def hide(s, x, low, end, lead, F: gl.constexpr):
    """Scores with -inf where a row does not see a key: ``visible`` as comparisons that pass one predicate on.

    The compiler keeps the results of all comparisons in registers, and spills.
    """
    zero = gl.zeros_like(s).to(gl.int32)
    x, low, end, lead = zero + x[None, :], zero + low[:, None], zero + end[:, None], zero + lead[:, None]
    CODE: gl.constexpr = HIDE_BUT_LEADING if F.leading != "" else HIDE
    return gl.inline_asm_elementwise(
        CODE, "=f,f,r,r,r,r", [s, x, low, end, lead], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def live_boxes(start, tile, batch, F: gl.constexpr, C: gl.constexpr):
    """Which boxes of a key tile are in a page of the pool, one bit each."""
    page = box_pages(start, tile, 4, batch, F, C)
    lane = gl.arange(0, 32, layout=page.type.layout)
    return gl.sum(gl.where((page >= 0) & (page < batch.num_pages), 1 << lane, 0), 0)


@gluon.jit
def q_heads(i, tile, F: gl.constexpr, C: gl.constexpr):
    """The query heads of the rows ``i`` of a consumer."""
    member = i % C.pack if C.pack > 1 else i * 0 + tile.head % F.group
    return q_head_of(tile.kv_head, member, F)


@gluon.jit
def finish_rows(state, tile, begin, output, batch, F: gl.constexpr, C: gl.constexpr):
    """Normalise the rows of a consumer, the first of which is query token ``begin``, and write them."""
    m, l, acc = state
    VALUES: gl.constexpr = acc.type.layout
    WIDE: gl.constexpr = row_layout(F.head_dim)
    place, out = tile.place, output.out
    i = gl.arange(0, CONSUMER_ROWS, layout=m.type.layout)
    valid = begin + i // C.pack < place.q_len
    q_head = q_heads(i, tile, F, C)
    if output.sink is not None:
        sink = gl.load(output.sink + q_head, mask=valid, other=0.0).to(gl.float32)
        m, l, weight = add_sink(m, l, sink)
        acc *= gl.convert_layout(weight, gl.SliceLayout(1, VALUES))[:, None]
    inverse, log_sum = finish(m, l)
    if output.lse is not None:
        token = place.token + begin + i // C.pack
        gl.store(output.lse + token * (F.kv_heads * F.group) + q_head, log_sum, mask=valid)
    acc *= gl.convert_layout(inverse, gl.SliceLayout(1, VALUES))[:, None]
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, WIDE))
    column = gl.arange(0, F.head_dim, layout=gl.SliceLayout(0, WIDE))
    row = begin + i // C.pack
    heads = q_heads(i, tile, F, C)
    at = row_offsets(place.b, row, place.token + row, heads, output.seq, output.token, output.head, batch.cu_q)
    value = gl.convert_layout(acc.to(out.dtype.element_ty), WIDE)
    gl.store(out + at[:, None] + column[None, :], value, mask=(row < place.q_len)[:, None])


@gluon.constexpr_function
def row_layout(head_dim):
    """16 bytes a thread along rows of ``head_dim`` 16-bit values, four warps one below the other."""
    return gl.BlockedLayout([1, 8], [32 // (head_dim // 8), head_dim // 8], [4, 1], [1, 0])


@gluon.jit
def all_live(tile, batch, F: gl.constexpr):
    """Whether every table entry of the keys in sight names a page of the pool."""
    if F.page_size == 0:
        return tile.head == tile.head
    else:
        lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
        first = tile.band.left // F.page_size
        end = (tile.band.right + F.page_size - 1) // F.page_size
        lead = (tile.band.lead + F.page_size - 1) // F.page_size
        entries, _ = table_row(batch.table, batch.indptr, tile.place.b, batch.table_stride, batch.max_pages)
        dead = lane * 0
        for i in range(gl.cdiv(lead + end - first, 128)):
            at = i * 128 + lane
            page = gl.where(at < lead, at, at - lead + first)
            entry = gl.load(entries + page, mask=at < lead + end - first, other=0)
            dead = dead | gl.where((entry < 0) | (entry >= batch.num_pages), 1, 0)
        return gl.max(dead, 0) == 0


RUN_TIME = ("leading", "size", "steps", "claimed", "num_seqs", "max_pages", "num_pages", "table_stride", "num_tiles")


@gluon.jit(do_not_specialize=RUN_TIME)
def hopper_tile_kernel(
    q_desc, k_desc, v_desc, counter, out, lse, sink, table, indptr, lens, cu_q, q_start, leading,
    scale_log2, cap_log2, size, steps, claimed, num_seqs, max_pages, num_pages, table_stride, num_tiles,
    out_seq, out_token, out_head, F: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """As many programs as multiprocessors share the flat list of tiles."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    q_ring = new_ring(C.q_stages, C.consumers * HALVES, CONSUMER_ROWS, C.consumers, q_desc.dtype)
    BOXES: gl.constexpr = C.block_n // C.box_rows
    k_ring = new_ring(C.stages, HALVES * BOXES, C.box_rows, C.consumers, q_desc.dtype)
    v_ring = new_ring(C.stages, HALVES * BOXES, C.box_rows, C.consumers, q_desc.dtype)
    rings = Rings(q_ring, k_ring, v_ring, new_places(C.consumers))
    cut_loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(cut_loaded, count=1)
    fence_async_shared()
    batch = Batch(
        table, indptr, lens, cu_q, q_start, leading, size, steps, claimed, num_seqs, max_pages, num_pages, table_stride,
        num_tiles,
    )  # fmt: skip
    output = Output(out, lse, sink, out_seq, out_token, out_head)
    producer: gl.constexpr = C.producer_registers
    consumer: gl.constexpr = C.consumer_registers
    if C.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), output, scale_log2, cap_log2, rings, batch, F, C)),
                (consume, (gl.constexpr(1), output, scale_log2, cap_log2, rings, batch, F, C)),
                (produce, (q_desc, k_desc, v_desc, counter, cut_loaded, rings, batch, F, C)),
            ],
            [4, 1],
            [consumer, producer],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), output, scale_log2, cap_log2, rings, batch, F, C)),
                (produce, (q_desc, k_desc, v_desc, counter, cut_loaded, rings, batch, F, C)),
            ],
            [1],
            [producer],
        )
