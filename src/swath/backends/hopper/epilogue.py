"""The epilogue of an MMA warpgroup: it normalises its rows and stores them and their LSE.

Rows are stored by TMA where they can be, from the stage of the q pipeline that their queries came in: then no warp
waits for them, nor computes an address for each. This takes two stages of q, an output whose strides suit TMA, and rows
that are all of one sequence. Other rows are stored by the threads.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from swath.backends.device.quant import scale_values
from swath.backends.device.softmax import finish
from swath.backends.gluon.compat import tma_store
from swath.backends.gluon.pipeline import (
    CONSUMER_ROWS,
    Pipeline,
    as_tiles,
    at_named_barrier,
    blocks_of,
    box_columns,
    named_barrier,
    pipeline_state,
    query_box,
    stages_of,
)
from swath.backends.gluon.scheduler import q_coordinates, tile_kv_head
from swath.backends.hopper.softmax import of_rows
from swath.backends.triton.kernels.query import q_head_of, row_offsets


class Output(NamedTuple):
    """Where results go, and what joins them: sink logits and the scale of V."""

    desc: gl.tensor | None  # the TMA descriptor of ``out``, if rows are stored by TMA
    q_pipe: Pipeline  # from whose stages they are stored
    out: gl.tensor
    lse: gl.tensor
    sink: gl.tensor
    v_scale: gl.tensor  # of 8-bit values that were copied without it
    seq_stride: gl.tensor  # of ``out``, in elements
    token_stride: gl.tensor
    head_stride: gl.tensor


@gluon.jit
def epilogue(state, count, work, WG: gl.constexpr, output, batch, C: gl.constexpr):
    """Normalise and store the rows of an MMA warpgroup in the ``count``-th work tile: O = acc / l, LSE = m + log l."""
    m, l, acc = state  # [M], [M], [M, Dv]
    q_begin = work.q_begin + WG * (CONSUMER_ROWS // C.pack)
    sink = None
    if output.lse is not None:
        i = gl.arange(0, CONSUMER_ROWS, layout=m.type.layout)
        heads = q_heads(i, work.head, C)
        if output.sink is not None:
            sink = gl.load(output.sink + heads).to(gl.float32)
    inverse, log_sum = finish(m, l, sink)
    if output.lse is not None:
        q_index = q_begin + i // C.pack
        at = (work.q_row + q_index) * (C.F.kv_heads * C.F.group) + heads
        gl.store(output.lse + at, log_sum, mask=q_index < work.q_len)
    column = gl.arange(0, C.F.v_head_dim, layout=gl.SliceLayout(0, acc.type.layout))
    kv_head = tile_kv_head(work, C)
    o = scale_values(acc * of_rows(inverse, acc)[:, None], output.v_scale, kv_head, column, C.F)  # [M, Dv]
    o = o.to(output.out.dtype.element_ty)
    if output.desc is None:
        if C.F.head_dim <= 256:  # beyond, an exchange between threads finds no shared memory
            o = gl.convert_layout(o, store_layout(C.F.v_head_dim))
        store_by_threads(o, q_begin, work, output, batch, C)
    else:
        index = pipeline_state(output.q_pipe, count).index
        tile = output_tile(index, WG, output.q_pipe, C)
        tile.store(o)
        fence_async_shared()
        # Rows past the last one of a uniform batch are out of the tensor's bounds, others are the next sequence's.
        if C.uniform or q_begin + CONSUMER_ROWS // C.pack <= work.q_len:
            store_by_tma(index, work, WG, output, C)
        else:
            store_by_threads(tile.load(store_layout(C.F.v_head_dim)), q_begin, work, output, batch, C)


@gluon.jit
def output_tile(index, WG: gl.constexpr, q_pipe, C: gl.constexpr):
    """Where an MMA warpgroup leaves its rows [M, Dv] for TMA: the first columns of its part of a stage of q."""
    tiles = as_tiles(q_pipe, CONSUMER_ROWS, C.F.v_head_dim, q_pipe.stages.dtype).stages
    EACH: gl.constexpr = tiles.shape[0] // (C.q_stages * C.consumers)
    return tiles.index((index * C.consumers + WG) * EACH)


@gluon.jit
def store_by_tma(index, work, WG: gl.constexpr, output, C: gl.constexpr):
    """Start to store the rows in the stage ``index`` of the q pipeline."""
    BLOCKS: gl.constexpr = blocks_of("out", C)
    COLUMNS: gl.constexpr = box_columns("out", C)
    for block in gl.static_range(BLOCKS):
        box = query_box(index, WG, block, output.q_pipe, output.desc, C)
        tma_store(output.desc, q_coordinates(work, WG, block * COLUMNS, C), box)


@gluon.jit
def release_stored_rows(count, C: gl.constexpr):
    """Give back the stage of the ``count``-th query rows, if count >= 0, once TMA has read the results from it.

    ``consumer_release`` after a wait of only the thread that started the store: ``tma.store_wait`` would let all warps
    meet.
    """
    if count >= 0:
        barrier = named_barrier("q", C) + count % stages_of("q", C)
        at_named_barrier("cp.async.bulk.wait_group.read 0; bar.arrive", barrier, 4, C)


@gluon.jit
def store_by_threads(o, q_begin, work, output, batch, C: gl.constexpr):
    """Store rows o [M, Dv] in ``store_layout``, from query position ``q_begin`` on, those that the sequence has."""
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, o.type.layout))
    # A thread has two rows, 8 apart, as is known at compile time: one address serves both.
    fixed = i & 8
    own = i - fixed
    column = gl.arange(0, C.F.v_head_dim, layout=gl.SliceLayout(0, o.type.layout))
    q_index, heads = q_begin + own // C.pack, q_heads(own, work.head, C)
    at = row_offsets(
        work.b, q_index, work.q_row + q_index, heads, output.seq_stride, output.token_stride, output.head_stride,
        batch.cu_q,
    )  # fmt: skip
    at += (fixed // C.pack).to(gl.int64) * output.token_stride + (fixed % C.pack).to(gl.int64) * output.head_stride
    q_index += fixed // C.pack
    gl.store(output.out + at[:, None] + column[None, :], o, mask=(q_index < work.q_len)[:, None])


@gluon.constexpr_function
def store_layout(columns):
    """Rows [64, columns] with 16 bytes in a run for each thread, in the warps that wgmma leaves them in.

    Thread t of the four of a row has the columns 8 t to 8 t + 7, and again each 32 columns further on. Registers count
    those columns, then the row 8 further down; lanes count the four threads, then rows 0 to 7; warps are 16 rows apart.
    """
    further = [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *further, [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [CONSUMER_ROWS.value, columns],
    )  # fmt: skip


@gluon.jit
def q_heads(i, head, C: gl.constexpr):
    """The query heads of the rows ``i`` of an MMA warpgroup whose work tile has this ``head``."""
    if C.pack > 1:
        return q_head_of(head, i % C.pack, C.F)
    else:
        return q_head_of(head // C.F.group, i * 0 + head % C.F.group, C.F)
