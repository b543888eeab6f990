"""What a consumer of hopper_tiles.py writes: its rows, normalised, and their LSE."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.device.softmax import finish
from swath.schedules.hopper_rings import CONSUMER_ROWS
from swath.schedules.hopper_softmax import of_rows
from swath.schedules.query import q_head_of, row_offsets


class Output(NamedTuple):
    """Where results go, and the sink logits that join them: element strides of ``out`` by sequence, token and head.

    ``rows``: the numbers of rows, to be loaded after each row tile, or None. What is computed of them cannot be
    computed before the loop, as compilers do otherwise, only to spill it and read it from the L2 cache.
    """

    out: gl.tensor
    lse: gl.tensor
    sink: gl.tensor
    seq: gl.tensor
    token: gl.tensor
    head: gl.tensor
    rows: gl.shared_memory_descriptor | None


@gluon.jit
def row_numbers():
    """``Output.rows`` in shared memory."""
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    return gl.allocate_shared_memory(gl.int32, [CONSUMER_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]), i)


@gluon.jit
def finish_rows(state, place, c: gl.constexpr, output, batch, F: gl.constexpr, C: gl.constexpr):
    """Normalise the rows of a consumer and write them."""
    m, l, acc = state
    WIDE: gl.constexpr = row_layout(F.head_dim)
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    begin, out = place.begin + c * POSITIONS, output.out
    inverse, log_sum = finish(m, l)
    if output.lse is not None:
        i = gl.arange(0, CONSUMER_ROWS, layout=m.type.layout)
        row = begin + i // C.pack
        at = (place.token + row) * (F.kv_heads * F.group) + q_heads(i, place.head, F, C)
        gl.store(output.lse + at, log_sum, mask=row < place.q_len)
    acc *= of_rows(inverse, acc)[:, None]
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, WIDE))
    if output.rows is not None:
        i = output.rows.load(i.type.layout)
    # Rows that a thread has 16 apart are whole positions apart, whatever ``pack`` is, so one address serves them all.
    above = i % 16 if among_warps(F.head_dim) else i
    column = gl.arange(0, F.head_dim, layout=gl.SliceLayout(0, WIDE))
    row, heads = begin + above // C.pack, q_heads(above, place.head, F, C)
    at = row_offsets(place.b, row, place.token + row, heads, output.seq, output.token, output.head, batch.cu_q)
    at += ((i - above) // C.pack).to(gl.int64) * output.token
    row = begin + i // C.pack
    value = gl.convert_layout(acc.to(out.dtype.element_ty), WIDE)
    gl.store(out + at[:, None] + column[None, :], value, mask=(row < place.q_len)[:, None])


@gluon.constexpr_function
def among_warps(head_dim):
    """Whether rows of so many columns are exchanged among all four warps, to be stored whole, one by 16 threads.

    For 128 columns that is 3 % faster under a window of 128. Within a warp it takes less shared memory, and rows of 256
    columns 5 % less time.
    """
    return head_dim == 128


@gluon.constexpr_function
def row_layout(head_dim):
    """16 bytes a thread along rows, which stay with the four threads that an MMA leaves them in, or ``among_warps``."""
    if among_warps(head_dim):
        return gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
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
