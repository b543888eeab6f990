"""Merge attention states (out, LSE) of the same rows over disjoint keys: a program per row."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.softmax import log_of_shares, share


@triton.jit(do_not_specialize=("num_others",))
def merge_kernel(
    out_a, lse_a, outs, lses, out, lse, num_others, D: tl.constexpr, BLOCK_D: tl.constexpr, BASE2: tl.constexpr
):  # fmt: skip
    """Merge rows of D elements: the first state, and ``num_others`` that lie one after the other in ``outs``.

    A state whose LSE is -inf counts nothing, and beside one of +inf no other does, whatever their ``out`` holds.
    """
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < D
    log_a = tl.load(lse_a + row)
    top = log_a
    for n in range(num_others):
        top = tl.maximum(top, tl.load(lses + n * rows + row))
    total = share(log_a, top, BASE2)
    a = tl.load(out_a + row * D + column, mask=live, other=0.0).to(tl.float32)
    merged = tl.where(counts(log_a, top), a, 0.0) * total
    for n in range(num_others):
        log = tl.load(lses + n * rows + row)
        weight = share(log, top, BASE2)
        x = tl.load(outs + (n * rows + row) * D + column, mask=live, other=0.0).to(tl.float32)
        merged += tl.where(counts(log, top), x, 0.0) * weight
        total += weight
    joined = merged / tl.where(total != 0, total, 1.0)
    tl.store(out + row * D + column, joined.to(out.dtype.element_ty), mask=live)
    tl.store(lse + row, log_of_shares(top, total, BASE2))


@triton.jit
def counts(log, top):
    """Whether a state takes part whose LSE is ``log``, where ``top`` is the largest."""
    return (log != float("-inf")) & ((log == top) | (top != float("inf")))
