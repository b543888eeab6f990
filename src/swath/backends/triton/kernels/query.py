"""Query rows: which sequence they are of, from memory to dot operands, and from accumulators back to memory."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from swath.backends.device.cache import load_int32
from swath.backends.device.quant import (
    SMALLEST_FACTOR,
    channel_scale,
    decode_e4m3,
    head_scale,
    scale_values,
    score_factor,
    unit_rows,
)
from swath.backends.device.softmax import add_sink, finish
from swath.backends.triton.kernels.walk import Query, TokenScales


class Sequence(NamedTuple):
    """The query tokens and the keys of one sequence."""

    q_row: tl.tensor  # the row of q with its first query token
    q_len: tl.tensor
    q_start: tl.tensor  # the position of its first query token
    kv_len: tl.tensor
    kv_row: tl.tensor  # dense keys: the row of its first key


@triton.jit
def first_token(b, cu_q, num_tokens, mask=None):
    """Where the query tokens of sequence ``b`` begin, and those of the one before it end: within those that exist."""
    return tl.minimum(tl.maximum(load_int32(cu_q + b, mask), 0), num_tokens)


@triton.jit
def tokens_of(b, cu_q, steps, num_tokens):
    """The row of the first query token of sequence ``b``, and how many it has; a negative number counts as 0."""
    if cu_q is None:
        return b * steps, steps
    else:
        q_row = first_token(b, cu_q, num_tokens)
        return q_row, tl.maximum(first_token(b + 1, cu_q, num_tokens) - q_row, 0)


LENGTHS_AT_ONCE = tl.constexpr(256)
"""Sequences whose lengths are looked at together."""


@triton.jit
def ranked_sequence(rank, cu_q, num_tokens, num_seqs, claimed):
    """The ``rank``-th sequence, from 0 on, of more than ``claimed`` query tokens; ``num_seqs`` where there is none.

    Without ``cu_q`` all sequences have more.
    """
    if cu_q is None:
        return rank
    else:
        found, before = rank * 0, rank * 0
        for first in range(0, num_seqs, LENGTHS_AT_ONCE):
            b = first + tl.arange(0, LENGTHS_AT_ONCE)
            inside = b < num_seqs
            q_len = first_token(b + 1, cu_q, num_tokens, inside) - first_token(b, cu_q, num_tokens, inside)
            longer = (inside & (q_len > claimed)).to(tl.int32)
            found += tl.sum((inside & (before + tl.cumsum(longer, 0) <= rank)).to(tl.int32), 0)
            before += tl.sum(longer, 0)
        return found


@triton.jit
def store_claim(claim, claimed, first, end):
    """Write the tensor of three numbers that ``takes`` reads as its ``claimed``."""
    tl.store(claim, claimed)
    tl.store(claim + 1, first)
    tl.store(claim + 2, end)


@triton.jit
def takes(b, q_len, claimed):
    """Whether a launch of tiles takes sequence ``b``: those of at most ``claimed`` query tokens belong to the splits.

    Where two launches of tiles share the others, ``claimed`` is a tensor of three: that number, the first sequence of
    this launch, and the end of its sequences.
    """
    if claimed.dtype.is_ptr():
        inside = (b >= tl.load(claimed + 1)) & (b < tl.load(claimed + 2))
        return inside & (q_len > tl.load(claimed))
    else:
        return q_len > claimed


@triton.jit
def sequence_of(b, cu_q, steps, num_tokens, lens, q_start, F: tl.constexpr):
    """Read the lengths of sequence ``b``; negative ones count as 0."""
    q_row, q_len = tokens_of(b, cu_q, steps, num_tokens)
    kv_row = b * 0
    if F.page_size == 0:
        kv_row = tl.maximum(load_int32(lens + b), 0)
        kv_len = tl.maximum(load_int32(lens + b + 1), kv_row) - kv_row
    else:
        kv_len = tl.maximum(load_int32(lens + b), 0)
    start = kv_len - q_len if q_start is None else load_int32(q_start + b)
    return Sequence(q_row, q_len, start, kv_len, kv_row)


@triton.jit
def keys_within(seq, pages, F: tl.constexpr):
    """How many of a sequence's keys exist: in its ``pages``, or of dense keys, of which there are ``pages`` in all."""
    if F.page_size > 0:
        return tl.minimum(seq.kv_len, pages * F.page_size)
    else:
        return tl.minimum(seq.kv_len, tl.maximum(pages - seq.kv_row, 0))


@triton.jit
def lead_of(b, lead, F: tl.constexpr):
    """How many leading tokens sequence ``b`` keeps: its ``global_tokens``, which kernels call ``lead``."""
    if F.lead == "tensor":
        return tl.maximum(load_int32(lead + b), 0)  # less would overflow where columns are taken from it
    else:
        return lead


@triton.jit
def q_head_of(kv_head, member, F: tl.constexpr):
    """The query head that is ``member`` of a kv head's group."""
    if F.interleaved:
        return member * F.kv_heads + kv_head
    else:
        return kv_head * F.group + member


@triton.jit
def kv_head_of(q_head, F: tl.constexpr):
    """The kv head of a query head."""
    if F.interleaved:
        return q_head % F.kv_heads
    else:
        return q_head // F.group


@triton.jit
def row_offsets(b, q_index, q_row, q_head, seq_stride, token_stride, head_stride, cu_q):
    """Element offsets (int64) of rows in q or out: [B, S, Hq, D], or [T, Hq, D] where there is a ``cu_q``.

    ``q_index`` counts query tokens in their sequence, ``q_row`` in the whole batch.
    """
    if cu_q is None:
        row = b.to(tl.int64) * seq_stride + q_index.to(tl.int64) * token_stride
    else:
        row = q_row.to(tl.int64) * token_stride
    return row + q_head.to(tl.int64) * head_stride


@triton.jit
def query_scale(q_scale, row, valid, F: tl.constexpr):
    """The scale of fp8 query rows: one for all rows, one a row, or 1."""
    if F.q_scale == "row":
        return tl.load(q_scale + row, mask=valid, other=0.0)
    elif F.q_scale == "tensor":
        return tl.load(q_scale)
    else:
        return 1.0


@triton.jit
def token_scales(k_scale, v_scale, kv_head, ks_page, ks_head, ks_token, vs_page, vs_head, vs_token, F: tl.constexpr):
    """The token scales of one kv head; for other granularities a number that is not read."""
    k = k_scale + kv_head.to(tl.int64) * ks_head if F.k_fold == "token" else kv_head
    v = v_scale + kv_head.to(tl.int64) * vs_head if F.v_fold == "token" else kv_head
    return TokenScales(k, v, ks_page, ks_token, vs_page, vs_token)


@triton.jit
def load_columns(q, offset, valid, column, k_scale, kv_head, F: tl.constexpr):
    """Query elements [M, N] in float32 at the ``column`` indices, K's channel scale folded in."""
    live = column < F.head_dim
    x = tl.load(q + offset[:, None] + column[None, :], mask=valid[:, None] & live[None, :], other=0)
    if q.dtype.element_ty == tl.uint8:
        x = decode_e4m3(x)
    x = x.to(tl.float32)
    if F.k_fold == "channel":
        x *= channel_scale(k_scale, kv_head, column, F.head_dim, live)[None, :]
    return x


@triton.jit
def load_query(q, offset, valid, row_scale, k_scale, kv_head, scale_log2, reach, F: tl.constexpr):
    """Query rows as dot operands with their score factors, K's scales folded in (all but a token scale).

    A float32 row takes the factor itself: scores and their maximum are then the same numbers, however large, where the
    multiply-add that scales others may be off by a rounding of the maximum.
    """
    if F.unit_q:
        even, odd, factor = load_unit_rows(q, offset, valid, row_scale, k_scale, kv_head, scale_log2, F)
        return Query(even, odd, factor, reach)
    elif F.fp32:
        x = load_columns(q, offset, valid, tl.arange(0, F.block_d), k_scale, kv_head, F)
        x *= scale_log2 * head_scale(k_scale, kv_head, False, F)
        return Query(x, x, 1.0, reach)
    else:
        column = tl.arange(0, F.block_d)
        padded: tl.constexpr = F.block_d != F.head_dim
        mask = valid[:, None] & (column < F.head_dim)[None, :] if padded else valid[:, None]
        x = tl.load(q + offset[:, None] + column[None, :], mask=mask, other=0.0)
        return Query(x, x, score_factor(scale_log2, k_scale, kv_head, F), reach)


@triton.jit
def load_unit_rows(q, offset, valid, row_scale, k_scale, kv_head, scale_log2, F: tl.constexpr):
    """Query rows for an 8-bit cache, their even and odd columns or all twice, divided by their largest magnitude, and
    score factors that it joins.

    Rows with a NaN or an infinity, or under such a scale, have only scores of NaN.
    """
    column = tl.arange(0, F.block_d)
    even = 2 * column if F.pairs else column
    x_even = load_columns(q, offset, valid, even, k_scale, kv_head, F)
    x_odd = load_columns(q, offset, valid, even + 1, k_scale, kv_head, F) if F.pairs else x_even
    if F.compute_int8:  # in which a row has no NaN, but may have the scores 0 x inf
        largest = largest_or_inf(x_even) if not F.pairs else tl.maximum(largest_or_inf(x_even), largest_or_inf(x_odd))
    else:
        largest = tl.max(tl.maximum(tl.abs(x_even), tl.abs(x_odd)), 1)
    factor = largest * row_scale * (scale_log2 * head_scale(k_scale, kv_head, False, F))
    if F.compute_int8:
        factor *= 1.0 / 127.0
    # Masked scores are -inf and must stay so: signs, zeros and NaN go into the rows, and a factor is above 0.
    divisor = tl.where(factor == 0, float("inf"), tl.where(factor < 0, -largest, largest))
    divisor = tl.where(factor == factor, divisor, float("nan"))
    factor = tl.where(factor == factor, tl.maximum(tl.abs(factor), SMALLEST_FACTOR), float("inf"))
    return unit_rows(x_even, divisor, F), unit_rows(x_odd, divisor, F), factor


@triton.jit
def largest_or_inf(x):
    """The largest magnitude [M] of rows [M, N], or infinity where there is a NaN, whose bits are above all numbers' as
    integers."""
    largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    return tl.where(largest == largest, largest, float("inf"))


@triton.jit
def states_of(partial, rows, F: tl.constexpr):
    """Where the m and l of splits are: behind the accumulators of all their ``rows``."""
    return partial + rows.to(tl.int64) * F.v_head_dim


@triton.jit
def join_columns(acc, acc_odd, v_scale, kv_head, F: tl.constexpr):
    """The accumulator [M, Dv padded] with V's scale folded in (all but a token scale), and its column indices."""
    if F.pairs:
        acc = tl.interleave(acc, acc_odd)
    column = tl.arange(0, F.unit * F.block_dv)
    return scale_values(acc, v_scale, kv_head, column, F), column


@triton.jit
def store_output(out, lse, sink, at, q_row, q_head, valid, m, l, acc, column, F: tl.constexpr):
    """The epilogue: join the sink, normalise rows, and store them at the offsets ``at``, and the LSE at [T, Hq]."""
    logit = None
    if sink is not None:
        logit = tl.load(sink + q_head, mask=valid, other=0.0).to(tl.float32)
        m, l, weight = add_sink(m, l, logit)
        acc *= weight[:, None]
    inverse, log_sum = finish(m, l, logit)
    mask = valid[:, None] & (column < F.v_head_dim)[None, :]
    tl.store(out + at[:, None] + column[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + q_row * (F.kv_heads * F.group) + q_head, log_sum, mask=valid)
