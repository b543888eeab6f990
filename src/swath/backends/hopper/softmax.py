"""The softmax step of softmax.py over scores as tensor cores leave them, in fewer instructions and shorter chains.

A thread has two columns of every eight, of two rows. Maxima and sums are taken by column first: two chains a row where
``max`` and ``sum`` over a whole row make one, which is what the two warps of a scheduler wait for. Threads keep sums of
their own from one key tile to the next, and exchange them at the end, as in FlashAttention-3.

A maximum is kept until it is too small by ``SLACK``, as in FlashAttention-4: most steps then have nothing to rescale.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.device.softmax import SLACK, powers
from swath.backends.gluon.pipeline import CONSUMER_ROWS

COLUMNS = gl.constexpr(8)
THREADS = gl.constexpr(4)
"""That share a row."""
BY_THREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [CONSUMER_ROWS.value, THREADS.value]
    )
)
"""One value of each of a row's threads, of the rows as an MMA has them."""


@gluon.jit
def step(s, scale, m, l):
    """``softmax.step`` with ``l`` [M, 4] as ``spread`` makes it, and an m of up to ``SLACK`` below the maximum."""
    m_new = highest((s,), scale, m)
    m_new = gl.where(m_new > m + SLACK, m_new, m)
    p = powers(s, scale, m_new)
    alpha = gl.exp2(m - m_new)
    return p, m_new, l * of_rows(alpha, l)[:, None] + sums(p), alpha


@gluon.jit
def rescaled(acc, alpha):
    """The accumulator by the factor of a step; a warp whose factors are all 1 skips the multiplications."""
    VALUES: gl.constexpr = acc.shape[0] * acc.shape[1] // 128  # of a thread, those of its two rows by turns in pairs
    return gl.inline_asm_elementwise(
        rescaling(VALUES), in_place(VALUES, "f"),
        [acc, of_rows(alpha, acc)[:, None]], dtype=gl.float32, is_pure=False, pack=VALUES,
    )  # fmt: skip


@gluon.constexpr_function
def in_place(values, others):
    """Constraints of so many values that change where they are, and of as many operands of each of the other types."""
    return ",".join(["=f"] * values + [str(i) for i in range(values)] + [t for t in others for _ in range(values)])


@gluon.constexpr_function
def rescaling(values):
    """PTX that multiplies so many values, $0 and on, by their factors, unless all of the warp are 1."""
    first, second = 2 * values, 2 * values + 2
    products = "".join(f"mul.rn.f32 ${i}, ${i}, ${2 * values + i}; " for i in range(values))
    return (
        f"{{ .reg .pred any; setp.neu.f32 any, ${first}, 0f3F800000; setp.neu.or.f32 any, ${second}, 0f3F800000, any; "
        f"vote.sync.any.pred any, any, 0xffffffff; @!any bra same; {products}same: }}"
    )


@gluon.jit
def highest(tiles, scale, m):
    """``softmax.highest`` of all scores in ``tiles``."""
    columns = gl.max(by_column(tiles[0]), 1)
    for i in gl.static_range(1, len(tiles)):
        more = gl.max(by_column(tiles[i]), 1)
        columns = gl.maximum(gl.convert_layout(columns, more.type.layout), more)
    return gl.maximum(m, gl.convert_layout(gl.max(columns, 1), m.type.layout) * scale)


@gluon.jit
def sums(p):
    """Sums [M, 4] of what each thread has of the rows of p."""
    columns = gl.sum(by_column(p), 1).reshape((p.shape[0], THREADS, COLUMNS // THREADS))
    return gl.convert_layout(gl.sum(columns, 2), BY_THREAD, assert_trivial=True)


@gluon.jit
def spread(l):
    """Sums [M, 4] whose total is ``l`` [M]."""
    none = gl.zeros((l.shape[0], THREADS), gl.float32, layout=BY_THREAD)
    return none + of_rows(l / THREADS, none)[:, None]


@gluon.jit
def total(l, m):
    """The sum of a row, in the layout of its maximum."""
    return gl.convert_layout(gl.sum(l, 1), m.type.layout)


@gluon.jit
def by_column(x):
    """[M, N] as [M, N / 8, 8]."""
    return x.reshape((x.shape[0], x.shape[1] // COLUMNS, COLUMNS))


@gluon.jit
def of_rows(x, tile):
    """A value a row in the layout of the rows of ``tile``."""
    return gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout))
