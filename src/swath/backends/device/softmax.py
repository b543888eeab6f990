"""The online softmax in base 2: taking in a tile of scores, merging two states, normalising a row.

The state of a row is (m, l): the maximum of its base-2 scores so far, and the sum of ``exp2(score - m)``. ``m`` starts
at the least float32, so that a row without keys needs no special case: masked scores are -inf and add exactly 0. That
row is known by its l of 0, not by its m, which a score may equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-3.4028234663852886e38)
SLACK = tl.constexpr(8)
"""In base 2, how far a kept maximum may be too small: p is 256 at most, as precise in any 16-bit type as below 1."""


@triton.jit
def online_softmax(s, scale, m, l, BY_ROW: tl.constexpr = False):
    """Take in a tile of scores s [M, N], which times ``scale`` > 0, a number or (``BY_ROW``) [M], are in base 2.

    ``l`` is [M], or [M, C] as sums of every C-th column, which need no exchange between threads that hold whole ones.

    Returns p = exp2(s * scale - m) [M, N], the new m and l, and the factor alpha [M] for what came before. The scale in
    the exponent is one fused multiply-add an element.
    """
    m_new = row_max(s, scale, m)
    p = exp_scores(s, scale, m_new, BY_ROW)
    alpha = tl.exp2(m - m_new)
    if len(l.shape) == 2:
        return p, m_new, l * alpha[:, None] + column_sums(p, l), alpha
    else:
        return p, m_new, l * alpha + tl.sum(p, 1), alpha


@triton.jit
def lazy_softmax(s, scale, m, l, acc, acc_odd, BY_ROW: tl.constexpr = False):
    """``online_softmax`` with an m of up to ``SLACK`` below the maximum, as in FlashAttention-4, and an ``l`` [M, C].

    Maxima are taken only where that is not enough: most tiles then need no exchange by row, and nothing is rescaled.
    Returns p, and m, l and the accumulators, rescaled.
    """
    p = exp_scores(s, scale, m, BY_ROW)
    if any_above(p, SLACK):
        m_new = row_max(s, scale, m)
        m_new = tl.where(m_new > m + SLACK, m_new, m)  # so that rows do not depend on one another
        p = exp_scores(s, scale, m_new, BY_ROW)
        alpha = tl.exp2(m - m_new)[:, None]
        m, l, acc, acc_odd = m_new, l * alpha, acc * alpha, acc_odd * alpha
    return p, m, l + column_sums(p, l), acc, acc_odd


@triton.jit
def any_above(p, EXPONENT: tl.constexpr):
    """Whether an element of p >= 0 is more than ``2**EXPONENT``, or NaN: their bits compare as they do."""
    return tl.max(p.to(tl.int32, bitcast=True)) > (127 + EXPONENT) << 23


@triton.jit
def column_sums(p, l):
    """Sums [M, C] of the columns c, c + C, c + 2 C and so on of p [M, N], for ``l`` [M, C]."""
    return tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // l.shape[1], l.shape[1])), 1)


@triton.jit
def row_max(s, scale, m):
    """The maximum m [M] after a tile of scores s [M, N]."""
    return tl.maximum(m, tl.max(s, 1) * scale)


@triton.jit
def exp_scores(s, scale, m, BY_ROW: tl.constexpr = False):
    """p = exp2(s * scale - m) [M, N]."""
    return tl.exp2(s * (scale[:, None] if BY_ROW else scale) - m[:, None])


@triton.jit
def soft_cap(x, cap_log2):
    """``cap * tanh(x)`` in base-2 units, of scores in units of the cap.

    tanh as x * P(x^2) / Q(x^2), fitted to 4 units in the last place of tanh(x) itself, also where x is small: by way of
    exp(2x) its error would be one of the cap. From 9.01 on tanh is 1 in float32.
    """
    x = tl.maximum(x, -9.01, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 9.01, propagate_nan=tl.PropagateNan.ALL)
    z = x * x
    p = ((1.33193072e-8 * z + 2.05836787e-5) * z + 3.49404779e-3) * z + 0.133797303
    q = ((7.76212346e-7 * z + 3.28311347e-4) * z + 2.58711260e-2) * z + 0.467130452
    return cap_log2 * (x * (p * z + 1.0) / (q * z + 1.0))


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
def share(log, top, BASE2: tl.constexpr):
    """What a state with this LSE weighs beside the largest of all: one of -inf nothing, one of +inf as others of it."""
    difference = log - top if BASE2 else (log - top) / LN_2
    weight = tl.where(log == top, 1.0, tl.exp2(difference))
    return tl.where(log == float("-inf"), 0.0, weight)


@triton.jit
def log_of_shares(top, total, BASE2: tl.constexpr):
    """The LSE of a union whose states weigh ``total`` beside the largest of them, ``top``."""
    more = tl.log2(tl.where(total != 0, total, 1.0))
    return top + tl.where(total != 0, more if BASE2 else more * LN_2, float("-inf"))


@triton.jit
def add_sink(m, l, sink):
    """The state with a sink logit (natural units) in the denominator, and the factor of its accumulator."""
    level, one = state_of_sink(sink)
    m, l, weight, _ = merge(m, l, level, one)
    return m, l, weight


@triton.jit
def state_of_sink(sink):
    """The state (m, l) of a row that has only its sink logit: what ``add_sink`` makes of no key, in fewer instructions
    and registers."""
    return sink_level(sink), tl.where(sink == sink, tl.where(sink == float("-inf"), 0.0, 1.0), sink)


@triton.jit
def sink_level(sink):
    """The maximum that stands for a sink logit: the largest logits are beyond float32 in base 2."""
    return tl.minimum(tl.maximum(sink / LN_2, FLOOR), -FLOOR)


@triton.jit
def finish(m, l, sink):
    """The factor that normalises an accumulator, and the natural-log LSE: 0 and -inf for a row without keys.

    ``sink``: the logits that joined the states, if any did, for an LSE that is exactly one of them. A NaN that a row
    may see stays NaN; a score of +inf makes the row NaN and its LSE +inf.
    """
    seen = l != 0
    total = tl.where(seen, l, 1.0)
    inverse = tl.where(seen, 1.0 / total, 0.0)
    natural = m * LN_2
    if sink is not None:
        natural = tl.where(m == sink_level(sink), sink, natural)
    lse = tl.where(seen, natural + tl.log2(total) * LN_2, float("-inf"))
    return inverse, tl.where(m == float("inf"), m, lse)
