"""Merge attention states (out, LSE) of the same rows over disjoint keys: a program has some rows."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.softmax import log_of_shares, share


@triton.jit(do_not_specialize=("num_others", "num_rows"))
def merge_kernel(
    out_a, lse_a, outs, lses, out, lse, num_others, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BASE2: tl.constexpr,
):  # fmt: skip
    """Merge rows of D elements: the first state, and ``num_others`` that lie one after the other in ``outs``.

    A state whose LSE is -inf counts nothing, and beside one of +inf no other does, whatever their ``out`` holds.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid, rows = row < num_rows, num_rows.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    at = row[:, None] * D + column[None, :]
    live = valid[:, None] & (column < D)[None, :]
    log_a = tl.load(lse_a + row, mask=valid, other=0.0)
    top = log_a
    for n in range(num_others):
        top = tl.maximum(top, tl.load(lses + n * rows + row, mask=valid, other=0.0))
    total = share(log_a, top, BASE2)
    a = tl.load(out_a + at, mask=live, other=0.0).to(tl.float32)
    merged = tl.where(counts(log_a, top)[:, None], a, 0.0) * total[:, None]
    for n in range(num_others):
        log = tl.load(lses + n * rows + row, mask=valid, other=0.0)
        weight = share(log, top, BASE2)
        x = tl.load(outs + n * rows * D + at, mask=live, other=0.0).to(tl.float32)
        merged += tl.where(counts(log, top)[:, None], x, 0.0) * weight[:, None]
        total += weight
    joined = merged / tl.where(total != 0, total, 1.0)[:, None]
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=live)
    tl.store(lse + row, log_of_shares(top, total, BASE2), mask=valid)


@triton.jit
def counts(log, top):
    """Whether a state takes part whose LSE is ``log``, where ``top`` is the largest."""
    return (log != float("-inf")) & ((log == top) | (top != float("inf")))
