"""Join two attention states: a program per row."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.softmax import FLOOR, LN_2, finish, merge


@triton.jit
def merge_kernel(out_a, lse_a, out_b, lse_b, out, lse, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D elements; a state with LSE -inf counts nothing, whatever its out holds."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < D
    log_a, log_b = tl.load(lse_a + row), tl.load(lse_b + row)
    has_a, has_b = log_a > float("-inf"), log_b > float("-inf")
    m_a = tl.where(has_a, log_a / LN_2, FLOOR)
    m_b = tl.where(has_b, log_b / LN_2, FLOOR)
    m, l, w_a, w_b = merge(m_a, tl.where(has_a, 1.0, 0.0), m_b, tl.where(has_b, 1.0, 0.0))
    a = tl.where(has_a, tl.load(out_a + row * D + column, mask=live, other=0.0).to(tl.float32), 0.0)
    b = tl.where(has_b, tl.load(out_b + row * D + column, mask=live, other=0.0).to(tl.float32), 0.0)
    inverse, log_sum = finish(m, l)
    tl.store(out + row * D + column, ((a * w_a + b * w_b) * inverse).to(out.dtype.element_ty), mask=live)
    tl.store(lse + row, log_sum)
