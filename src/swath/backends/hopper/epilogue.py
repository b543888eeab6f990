"""What a consumer of hopper_tiles.py writes: its rows, normalised, and their LSE.

Rows leave the way their queries came, as boxes of the tensor memory accelerator, from the stage that these were in: a
warp neither waits for them nor finds an address for each. That takes two stages of queries and an output whose strides
suit it, and rows that are all of one sequence; others are stored by the threads.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from swath.backends.device.softmax import finish
from swath.backends.gluon.names import store_box
from swath.backends.gluon.pipeline import (
    BOX_COLUMNS,
    CONSUMER_ROWS,
    Ring,
    at_named_barrier,
    named_barrier_of,
    query_box,
    query_stage,
)
from swath.backends.gluon.scheduler import box_at
from swath.backends.hopper.softmax import of_rows
from swath.backends.triton.kernels.query import q_head_of, row_offsets


class Output(NamedTuple):
    """Where results go, and the sink logits that join them: element strides of ``out`` by sequence, token and head."""

    boxes: gl.tensor | None  # ``out`` in boxes like those of q, if rows leave as such
    queries: Ring  # from whose stages they do
    out: gl.tensor
    lse: gl.tensor
    sink: gl.tensor
    seq: gl.tensor
    token: gl.tensor
    head: gl.tensor


@gluon.jit
def finish_rows(state, n, place, c: gl.constexpr, output, batch, F: gl.constexpr, C: gl.constexpr):
    """Normalise the ``n``-th rows of a consumer and write them."""
    m, l, acc = state
    begin = place.begin + c * (CONSUMER_ROWS // C.pack)
    sink = None
    if output.lse is not None:
        i = gl.arange(0, CONSUMER_ROWS, layout=m.type.layout)
        heads = q_heads(i, place.head, F, C)
        if output.sink is not None:
            sink = gl.load(output.sink + heads).to(gl.float32)
    inverse, log_sum = finish(m, l, sink)
    if output.lse is not None:
        row = begin + i // C.pack
        gl.store(output.lse + (place.token + row) * (F.kv_heads * F.group) + heads, log_sum, mask=row < place.q_len)
    rows = (acc * of_rows(inverse, acc)[:, None]).to(output.out.dtype.element_ty)
    if output.boxes is None:
        store_rows(gl.convert_layout(rows, row_layout(F.head_dim)), begin, place, output, batch, F, C)
    else:
        stage = query_stage(n, c, output.queries, F, C)
        stage.tile.store(rows)
        fence_async_shared()
        # Rows beyond the last one of a uniform batch are out of the tensor's bounds, others are the next sequence's.
        if C.uniform or begin + CONSUMER_ROWS // C.pack <= place.q_len:
            store_boxes(stage.slot, place, c, output, F, C)
        else:
            store_rows(stage.tile.load(row_layout(F.head_dim)), begin, place, output, batch, F, C)


@gluon.jit
def store_boxes(slot, place, c: gl.constexpr, output, F: gl.constexpr, C: gl.constexpr):
    """Ask for the rows in a stage of queries to be written."""
    HALVES: gl.constexpr = F.head_dim // BOX_COLUMNS
    for half in gl.static_range(HALVES):
        box = query_box(slot, c, half, output.queries, output.boxes, F, C)
        store_box(output.boxes, box_at(place, c, half, F, C), box)


@gluon.jit
def release_written(n, C: gl.constexpr):
    """Release the stage that the ``n``-th rows, if n >= 0, left from: by now the memory accelerator has read it.

    Only the thread that asked for that waits, and the barrier for it: ``tma.store_wait`` would let all warps meet.
    """
    if n >= 0:
        at_named_barrier("cp.async.bulk.wait_group.read 0; bar.arrive", named_barrier_of("q", C) + n % C.q_stages, 4, C)


@gluon.jit
def store_rows(rows, begin, place, output, batch, F: gl.constexpr, C: gl.constexpr):
    """Write rows in ``row_layout`` from position ``begin`` on, those of the sequence."""
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, rows.type.layout))
    # A thread has two rows, 8 apart, as is known when this is compiled: one address serves both.
    fixed = i & 8
    own = i - fixed
    column = gl.arange(0, F.head_dim, layout=gl.SliceLayout(0, rows.type.layout))
    row, heads = begin + own // C.pack, q_heads(own, place.head, F, C)
    at = row_offsets(place.b, row, place.token + row, heads, output.seq, output.token, output.head, batch.cu_q)
    at += (fixed // C.pack).to(gl.int64) * output.token + (fixed % C.pack).to(gl.int64) * output.head
    row += fixed // C.pack
    gl.store(output.out + at[:, None] + column[None, :], rows, mask=(row < place.q_len)[:, None])


@gluon.constexpr_function
def row_layout(head_dim):
    """16 bytes a thread along rows, which stay with the four threads that an MMA leaves them in."""
    columns = [[0, 1 << i] for i in range(5, head_dim.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *columns, [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [CONSUMER_ROWS.value, head_dim],
    )  # fmt: skip


@gluon.jit
def q_heads(i, head, F: gl.constexpr, C: gl.constexpr):
    """The query heads of the rows ``i`` of a consumer whose tile has this number of ``heads_of``."""
    if C.pack > 1:
        return q_head_of(head, i % C.pack, F)
    else:
        return q_head_of(head // F.group, i * 0 + head % F.group, F)
