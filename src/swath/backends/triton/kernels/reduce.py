"""Join the partial states of splits: a program per query row, in ascending order, a bounded chunk at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from swath.backends.device.softmax import FLOOR, add_sink, finish, merge_tile
from swath.backends.triton.kernels.query import q_head_of, row_offsets, states_of, tokens_of


@triton.jit(do_not_specialize=("steps", "num_tokens", "num_splits"))
def reduce_kernel(
    partial, counts, out, lse, sink, cu_q, steps, num_tokens, num_splits,
    out_seq, out_token, out_head,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, row tile, kv head, row): joins its ``counts`` partial states.

    Rows of one slice are finished: split.py has written them. ``CHUNK`` states are joined at a time.
    """
    tile_rows = tl.minimum(steps * F.group, BLOCK_M)
    row_tiles = tl.cdiv(steps * F.group, BLOCK_M)
    row = tl.program_id(0) % tile_rows
    owner = tl.program_id(0) // tile_rows  # the (sequence, row tile, kv head), as in split.py
    kv_head = owner % F.kv_heads
    row_tile = owner // F.kv_heads % row_tiles
    b = owner // F.kv_heads // row_tiles
    r = row_tile * BLOCK_M + row  # query token r // group, member r % group of the group
    if F.pdl:
        gdc_wait()
    count = tl.load(counts + owner)
    if count <= 1:
        return
    q_row, q_len = tokens_of(b, cu_q, steps, num_tokens)
    if r >= q_len * F.group:
        return
    column = tl.arange(0, BLOCK_D)
    live = column < F.v_head_dim
    m = tl.full((), FLOOR, tl.float32)
    l = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    states = states_of(partial, tl.num_programs(0) * num_splits, F)
    for chunk in range(0, count, CHUNK):
        j = chunk + tl.arange(0, CHUNK)
        partial_row = (owner.to(tl.int64) * num_splits + j) * tile_rows + row  # [CHUNK]
        m_part = tl.load(states + 2 * partial_row, mask=j < count, other=FLOOR)
        l_part = tl.load(states + 2 * partial_row + 1, mask=j < count, other=0.0)
        mask = (j < count)[:, None] & live[None, :]
        acc_part = tl.load(partial + partial_row[:, None] * F.v_head_dim + column[None, :], mask=mask, other=0.0)
        m, l, acc = merge_tile(m, l, acc, m_part, l_part, acc_part)
    q_head = q_head_of(kv_head, r % F.group, F)
    q_row += r // F.group
    logit = None
    if sink is not None:
        logit = tl.load(sink + q_head).to(tl.float32)
        m, l, weight = add_sink(m, l, logit)
        acc *= weight
    inverse, log_sum = finish(m, l, logit)
    at = row_offsets(b, r // F.group, q_row, q_head, out_seq, out_token, out_head, cu_q)
    tl.store(out + at + column, (acc * inverse).to(out.dtype.element_ty), mask=live)
    if lse is not None:
        tl.store(lse + q_row * (F.kv_heads * F.group) + q_head, log_sum)
