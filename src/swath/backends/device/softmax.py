"""The online softmax in base 2: one step over a tile of scores, merging two states, finishing a row.

A state is (m, l): the running maximum of the base-2 scores and the sum of ``exp2(score - m)``. ``m`` starts at a finite
floor, so a row that has seen nothing needs no special case: masked scores are -inf and add exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1.0e30)
SLACK = tl.constexpr(8)
"""In base 2, what a kept maximum may be too small by: p is 256 at most, as precise in any 16-bit type as below 1."""


@triton.jit
def step(s, scale, m, l, BY_ROW: tl.constexpr = False):
    """Take in a tile of scores [M, N] whose product with ``scale`` > 0, a number or (``BY_ROW``) [M], is in base 2.

    ``l`` may be [M, C]: sums of every C-th column, whose sum is l. Where a thread holds those, they need no exchange.

    Returns p [M, N], the new m and l, and the factor for what came before. Scaling inside the exponent is one fused
    multiply-add an element.
    """
    m_new = highest(s, scale, m)
    p = powers(s, scale, m_new, BY_ROW)
    alpha = tl.exp2(m - m_new)
    if len(l.shape) == 2:
        return p, m_new, l * alpha[:, None] + column_sums(p, l), alpha
    else:
        return p, m_new, l * alpha + tl.sum(p, 1), alpha


@triton.jit
def lazy_step(s, scale, m, l, acc, acc_odd, BY_ROW: tl.constexpr = False):
    """``step`` with an m of up to ``SLACK`` below the maximum, as in FlashAttention-4, and an ``l`` [M, C].

    Maxima are taken where that is not enough: most tiles then have no exchange by row, and nothing to rescale.
    Returns p, and m, l and the accumulators, rescaled.
    """
    p = powers(s, scale, m, BY_ROW)
    if exceed(p, SLACK):
        m_new = highest(s, scale, m)
        m_new = tl.where(m_new > m + SLACK, m_new, m)  # so that rows do not depend on one another
        p = powers(s, scale, m_new, BY_ROW)
        alpha = tl.exp2(m - m_new)[:, None]
        m, l, acc, acc_odd = m_new, l * alpha, acc * alpha, acc_odd * alpha
    return p, m, l + column_sums(p, l), acc, acc_odd


@triton.jit
def exceed(p, EXPONENT: tl.constexpr):
    """Whether an element of p >= 0 is more than ``2**EXPONENT``, or NaN: their bits compare as they do."""
    return tl.max(p.to(tl.int32, bitcast=True)) > (127 + EXPONENT) << 23


@triton.jit
def column_sums(p, l):
    """Sums of every C-th column of p, for ``l`` [M, C]."""
    return tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // l.shape[1], l.shape[1])), 1)


@triton.jit
def highest(s, scale, m):
    """The maximum m after a tile of scores."""
    return tl.maximum(m, tl.max(s, 1) * scale)


@triton.jit
def powers(s, scale, m, BY_ROW: tl.constexpr = False):
    """p of a tile of scores against the maximum m."""
    return tl.exp2(s * (scale[:, None] if BY_ROW else scale) - m[:, None])


@triton.jit
def soft_cap(s, cap_log2):
    """``cap * tanh(s / cap)`` in base-2 units; tanh(x) = 1 - 2 / (1 + exp(2x)) for want of a portable one."""
    return cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / (cap_log2 * LN_2)))))


@triton.jit
def merge(m_a, l_a, m_b, l_b):
    """The state of the union of two disjoint key sets, and the factors of the two accumulators."""
    m = tl.maximum(m_a, m_b)
    w_a = tl.exp2(m_a - m)
    w_b = tl.exp2(m_b - m)
    return m, l_a * w_a + l_b * w_b, w_a, w_b


@triton.jit
def merge_tile(m, l, acc, m_part, l_part, acc_part):
    """Take N partial states m_part, l_part [N], acc_part [N, D] into the state (m, l, acc [D]) of one row."""
    m_new = tl.maximum(m, tl.max(m_part, 0))
    weight = tl.exp2(m_part - m_new)
    alpha = tl.exp2(m - m_new)
    return m_new, l * alpha + tl.sum(weight * l_part, 0), acc * alpha + tl.sum(weight[:, None] * acc_part, 0)


@triton.jit
def add_sink(m, l, sink):
    """The state with a sink logit (natural units) in the denominator, and the factor of its accumulator."""
    m, l, weight, _ = merge(m, l, sink / LN_2, 1.0)
    return m, l, weight


@triton.jit
def sink_alone(sink):
    """The state (m, l) of a row that has seen nothing but its sink logit: what ``add_sink`` makes of none, in fewer
    instructions and registers."""
    m = tl.maximum(sink / LN_2, FLOOR)
    return m, tl.exp2(sink / LN_2 - m)


@triton.jit
def finish(m, l):
    """The factor that normalises an accumulator, and the natural-log LSE: 0 and -inf for a row that saw nothing.

    A NaN that a row may see stays NaN.
    """
    seen = l != 0
    inverse = tl.where(seen, 1.0 / tl.where(seen, l, 1.0), 0.0)
    lse = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * LN_2, float("-inf"))
    return inverse, lse
