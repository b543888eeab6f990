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
    """Where results go, and the sink logits that join them: element strides of ``out`` by sequence, token and head."""

    out: gl.tensor
    lse: gl.tensor
    sink: gl.tensor
    seq: gl.tensor
    token: gl.tensor
    head: gl.tensor


@gluon.jit
def finish_rows(state, query, output, batch, F: gl.constexpr, C: gl.constexpr):
    """Normalise the rows of a consumer and write them."""
    m, l, acc = state
    tile, begin = query.tile, query.begin
    WIDE: gl.constexpr = row_layout(F.head_dim)
    place, out = tile.place, output.out
    inverse, log_sum = finish(m, l)
    if output.lse is not None:
        i = gl.arange(0, CONSUMER_ROWS, layout=m.type.layout)
        row = begin + i // C.pack
        at = (place.token + row) * (F.kv_heads * F.group) + q_heads(i, tile, F, C)
        gl.store(output.lse + at, log_sum, mask=row < place.q_len)
    acc *= of_rows(inverse, acc)[:, None]
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, WIDE))
    column = gl.arange(0, F.head_dim, layout=gl.SliceLayout(0, WIDE))
    # A thread's rows are 16 apart: whole positions, whatever ``pack`` is, so one address serves them all.
    above = i % 16
    row, heads = begin + above // C.pack, q_heads(above, tile, F, C)
    at = row_offsets(place.b, row, place.token + row, heads, output.seq, output.token, output.head, batch.cu_q)
    at += ((i - above) // C.pack).to(gl.int64) * output.token
    row = begin + i // C.pack
    value = gl.convert_layout(acc.to(out.dtype.element_ty), WIDE)
    gl.store(out + at[:, None] + column[None, :], value, mask=(row < place.q_len)[:, None])


@gluon.constexpr_function
def row_layout(head_dim):
    """16 bytes a thread along rows of ``head_dim`` 16-bit values, four warps one below the other."""
    return gl.BlockedLayout([1, 8], [32 // (head_dim // 8), head_dim // 8], [4, 1], [1, 0])


@gluon.jit
def q_heads(i, tile, F: gl.constexpr, C: gl.constexpr):
    """The query heads of the rows ``i`` of a consumer."""
    member = i % C.pack if C.pack > 1 else i * 0 + tile.place.head % F.group
    return q_head_of(tile.kv_head, member, F)
