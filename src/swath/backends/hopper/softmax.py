"""The online softmax over scores as wgmma leaves them in registers, in few instructions and short chains of them.

An accumulator of wgmma [64, N] lies in the 128 threads of a warpgroup like this: warp w has the rows 16 w to 16 w + 15,
and thread t of the four that share a row has the columns 2 t, 2 t + 1, then 8 further on (2 t + 8, 2 t + 9), and so on.
Each thread has two rows, 8 apart. Its registers hold both by turns: two columns of one row, two of the other.

Maxima and sums are taken over every eighth column first. This makes two chains of instructions a row, where ``max`` and
``sum`` over a whole row make one, which is what the two warps of a scheduler wait for. A thread keeps sums of its own
columns from one key tile to the next; the four of a row add theirs up at the end, as in FlashAttention-3.

A maximum is kept until scores exceed it by more than ``SLACK``, as in FlashAttention-4: most steps then have nothing to
rescale.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.device.softmax import SLACK, exp_scores
from swath.backends.gluon.pipeline import CONSUMER_ROWS
from swath.backends.gluon.scheduler import loops_over_64

COLUMNS = gl.constexpr(8)
"""Columns after which the same thread has two more."""
THREADS = gl.constexpr(4)
"""That share a row."""
BY_THREAD = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [CONSUMER_ROWS.value, THREADS.value]
    )
)
"""The layout of [M, 4], where column t belongs to thread t of a row's four.

A thread's two registers are 8 rows apart. Among the 32 lanes of a warp the lowest two bits count columns 0 to 3, the
others rows 0 to 7. Warps are 16 rows apart.
"""


@gluon.jit
def fragment_softmax(s, scale, m, l, C: gl.constexpr):
    """Take in a tile of scores [M, N] whose product with ``scale`` is in base 2: p [M, N], m, l and the factor alpha.

    ``scale`` is a number, or (``F.row_scales``) without a soft cap one a row [M]. Else as in
    ``device.softmax.online_softmax``, but ``l`` [M, 4] is a sum for each thread, and m [M] may be up to ``SLACK`` below
    the maximum. For a p of e4m3 m is ``P_LOG2`` less, so that p and l are that much more.

    Integer scores, products of int8, become floats after their maximum, for sm_90 has one of three integers: 8,192
    tokens of 32 heads of 128 took 664 us so and 693 as floats, of 16 heads of 256 542 and 545.
    """
    if loops_over_64(C) or s.dtype == gl.int32:
        m_new = fragment_max((s,), scale, m)
    else:
        m_new = kept_max(s, scale, m, P_LOG2 if C.F.v_e4m3 else 0)
    m_new = gl.where(m_new > m + (E4M3_SLACK if C.F.v_e4m3 else SLACK), m_new, m)
    p = exp_scores(s.to(gl.float32), scale, m_new, C.F.row_scales and not C.F.softcap)
    alpha = gl.exp2(m - m_new)
    return p, m_new, l * of_rows(alpha, l)[:, None] + thread_sums(p), alpha


@gluon.jit
def rescale_acc(acc, alpha):
    """acc [M, Dv] times the factors alpha [M] of a step. A warp whose factors are all 1 skips the multiplications."""
    VALUES: gl.constexpr = acc.shape[0] * acc.shape[1] // 128  # of a thread
    return gl.inline_asm_elementwise(
        rescale_ptx(VALUES), in_place(VALUES, "f"),
        [acc, of_rows(alpha, acc)[:, None]], dtype=gl.float32, is_pure=False, pack=VALUES,
    )  # fmt: skip


@gluon.constexpr_function
def in_place(values, others):
    """Constraints of inline PTX that changes ``values`` float registers in place.

    ``others``: a letter for the type of each further operand, which has as many values.
    """
    return ",".join(["=f"] * values + [str(i) for i in range(values)] + [t for t in others for _ in range(values)])


@gluon.constexpr_function
def rescale_ptx(values):
    """PTX that multiplies ``values`` registers, $0 and on, by their factors, unless all factors of the warp are 1.

    A thread's values are those of its two rows by turns in pairs, so that the factors of both are the first and third.
    """
    first, second = 2 * values, 2 * values + 2
    products = "".join(f"mul.rn.f32 ${i}, ${i}, ${2 * values + i}; " for i in range(values))
    return (
        f"{{ .reg .pred any; setp.neu.f32 any, ${first}, 0f3F800000; setp.neu.or.f32 any, ${second}, 0f3F800000, any; "
        f"vote.sync.any.pred any, any, 0xffffffff; @!any bra same; {products}same: }}"
    )


@gluon.jit
def fragment_max(tiles, scale, m):
    """The maximum m [M] after all scores in ``tiles``, each [M, N] with an N of its own."""
    columns = gl.max(every_eighth(tiles[0]), 1)  # [M, 8]
    for i in gl.static_range(1, len(tiles)):
        more = gl.max(every_eighth(tiles[i]), 1)
        columns = gl.maximum(gl.convert_layout(columns, more.type.layout), more)
    return gl.maximum(m, gl.convert_layout(gl.max(columns, 1), m.type.layout) * scale)


@gluon.jit
def kept_max(s, scale, m, LESS: gl.constexpr):
    """``fragment_max`` of one tile for an m that is kept until scores exceed it by ``SLACK``, in fewer instructions.
    Scores count ``LESS`` less.

    It may be too small where that does not matter: see ``thread_max_ptx``.
    """
    VALUES: gl.constexpr = s.shape[0] * s.shape[1] // 128  # of a thread
    own = gl.inline_asm_elementwise(
        thread_max_ptx(VALUES, LESS), of_two(VALUES), [s, of_rows(m, s)[:, None]], dtype=gl.float32, is_pure=True,
        pack=VALUES,
    )  # fmt: skip
    # Each value of a thread is now the maximum of its row: one is kept, without an instruction.
    columns = gl.reduce(every_eighth(own), 1, first).reshape((s.shape[0], THREADS, COLUMNS // THREADS))  # [M, 4, 2]
    own = gl.convert_layout(gl.reduce(columns, 2, first), BY_THREAD, assert_trivial=True)  # [M, 4]
    return gl.maximum(m, gl.convert_layout(gl.max(own, 1), m.type.layout) * scale - LESS)


LOWEST = gl.constexpr(-15)
"""In base 2, the least m that scores below 0 need not be compared with: p is 2^15 at most, and float16 ends at 2^16."""
P_LOG2, E4M3_SLACK, E4M3_LOWEST = gl.constexpr(8), gl.constexpr(0.75), gl.constexpr(-8.75)
"""Of a p in e4m3, which ends at 448: it is 2^8 where others are 1, so that few are among its last steps, and 2^8.75 at
most."""


@gluon.constexpr_function
def thread_max_ptx(values, less=0):
    """PTX of the maxima of a thread's two rows of scores, which become all values of their row.

    sm_90 has a maximum of three integers, and none of three floats. The bits of floats from 0 on compare as integers
    do, and are larger than those of floats below 0, among which the order is reversed. So the largest integer is the
    maximum, unless it is below 0. Then it is some score, and all are below 0: no p is too large for an m of ``LOWEST``
    or more, which stays or becomes that score. In a warp with a lower m the smallest integer is taken instead, which is
    the maximum then.
    """
    rows, bound = (2 * values, 2 * values + 2), f"{float((E4M3_LOWEST if less else LOWEST).value)}"
    return (
        "{ .reg .pred low; .reg .b32 high0, high1, low0, low1; "
        f"setp.lt.f32 low, ${rows[0]}, {bound}; setp.lt.or.f32 low, ${rows[1]}, {bound}, low; "
        f"vote.sync.any.pred low, low, 0xffffffff; {over_rows('max', 'high', values)} @!low bra done; "
        f"{over_rows('min', 'low', values)}"
        "setp.lt.s32 low, high0, 0; selp.b32 high0, low0, high0, low; "
        "setp.lt.s32 low, high1, 0; selp.b32 high1, low1, high1, low; "
        "done: " + "".join(f"mov.b32 ${i}, high{i // 2 % 2}; " for i in range(values)) + "}"
    )


@gluon.constexpr_function
def over_rows(how, name, values):
    """PTX of the integer maxima or minima of a thread's two rows, whose scores are the registers from ``values`` on."""
    rows = [[values + i for i in range(values) if i // 2 % 2 == row] for row in (0, 1)]
    text = "".join(f"mov.b32 {name}{row}, ${rows[row][0]}; " for row in (0, 1))
    pairs = zip(rows[0][1:], rows[1][1:], strict=True)
    return text + "".join(f"{how}.s32 {name}0, {name}0, ${i}; {how}.s32 {name}1, {name}1, ${j}; " for i, j in pairs)


@gluon.constexpr_function
def of_two(values):
    """Constraints of inline PTX that makes ``values`` float registers of two operands with as many each."""
    return ",".join(["=f"] * values + ["f"] * (2 * values))


@gluon.jit
def first(a, _b):
    """The first of two values that are the same."""
    return a


@gluon.jit
def thread_sums(p):
    """Sums [M, 4] of p [M, N]: each thread's own columns, 2 t, 2 t + 1, 2 t + 8, 2 t + 9 and so on."""
    columns = gl.sum(every_eighth(p), 1).reshape((p.shape[0], THREADS, COLUMNS // THREADS))  # [M, 4, 2]
    return gl.convert_layout(gl.sum(columns, 2), BY_THREAD, assert_trivial=True)


@gluon.jit
def to_thread_sums(l):
    """Sums [M, 4] that add up to ``l`` [M]: a quarter for each thread."""
    none = gl.zeros((l.shape[0], THREADS), gl.float32, layout=BY_THREAD)
    return none + of_rows(l / THREADS, none)[:, None]


@gluon.jit
def sum_of_threads(l, m):
    """The sum [M] of ``l`` [M, 4], in the layout of m."""
    return gl.convert_layout(gl.sum(l, 1), m.type.layout)


@gluon.jit
def every_eighth(x):
    """[M, N] as [M, N / 8, 8]: the columns c, c + 8, c + 16 and so on along the middle axis."""
    return x.reshape((x.shape[0], x.shape[1] // COLUMNS, COLUMNS))


@gluon.jit
def of_rows(x, tile):
    """A value a row [M], in the layout of the rows of ``tile``."""
    return gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout))
