"""Merge two attention states (out, LSE) of the same rows over disjoint keys: a program per row."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.softmax import shares


@triton.jit
def merge_kernel(out_a, lse_a, out_b, lse_b, out, lse, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Merge rows of D elements. A state whose LSE is -inf counts nothing, whatever its ``out`` holds."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < D
    log_a, log_b = tl.load(lse_a + row), tl.load(lse_b + row)
    w_a, w_b, total, log_sum = shares(log_a, log_b)
    a = tl.load(out_a + row * D + column, mask=live, other=0.0).to(tl.float32)
    b = tl.load(out_b + row * D + column, mask=live, other=0.0).to(tl.float32)
    a = tl.where(log_a != float("-inf"), a, 0.0)
    b = tl.where(log_b != float("-inf"), b, 0.0)
    joined = (a * w_a + b * w_b) / tl.where(total != 0, total, 1.0)
    tl.store(out + row * D + column, joined.to(out.dtype.element_ty), mask=live)
    tl.store(lse + row, log_sum)
