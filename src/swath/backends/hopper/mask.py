"""Masks over a tile of scores in registers: the window, leading tokens, and keys of dead pages.

``hopper/softmax.py`` says which columns of the scores a thread has. A column number is the thread's own part (2 t for
thread t of a row's four) plus one of 0, 1, 8, 9, 16, 17, ..., known at compile time. So the bounds of a row are
taken relative to the own part once, and then compared with constants.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.device.softmax import soft_cap
from swath.backends.hopper.load import box_pages
from swath.backends.hopper.softmax import in_place, of_rows


@gluon.jit
def masked_scores(
    s, start, new_from, rows, batch, MASKED: gl.constexpr, C: gl.constexpr, FIRST: gl.constexpr = 0
):  # fmt: skip
    """Scores s [M, N] with the soft cap, -inf where a row does not see the key, and the scale that makes them base-2.

    They belong to the key tile at place ``start`` of the list, from its column ``FIRST`` on. Keys before ``new_from``
    are in another tile as well, and count there; None where there are none. Products of int8 that nothing changes stay
    integers, for ``fragment_softmax``.
    """
    if MASKED or C.F.softcap:
        s = s.to(gl.float32)
    s, scale = capped(s, rows, C)
    if MASKED:
        if C.F.lead == "":
            s = hide_outside_window(s, start, FIRST, new_from, rows)
        else:
            s = hide_outside_window_and_lead(s, start + FIRST, new_from, rows, C)
        s = hide_dead_pages(s, start + FIRST, rows, batch, C)
    return s, scale


@gluon.jit
def hide_outside_window(s, start, FIRST: gl.constexpr, new_from, rows):
    """Scores with -inf outside the window. Its two edges are apart: few tiles are cut by both, some by none."""
    low = rows.reach.low
    if new_from is not None:
        low = gl.maximum(low, new_from)
    if len(rows.full) > 0:
        full_from, full_to = rows.full
        if new_from is not None:
            full_from = gl.maximum(full_from, new_from)
    else:
        full_from, full_to = over_warp(low, "max"), over_warp(rows.reach.end, "min")
    s = hide_side(s, True, start, FIRST, low, full_from)
    return hide_side(s, False, start, FIRST, rows.reach.end, full_to)


@gluon.jit
def over_warp(x, HOW: gl.constexpr):
    """The maximum or minimum of x [M], integers, over the rows of a warp, of which each thread has two: [M]."""
    return gl.inline_asm_elementwise(
        "{ " + HOW + ".s32 $0, $2, $3; redux.sync." + HOW + ".s32 $0, $0, 0xffffffff; mov.b32 $1, $0; }",
        "=r,=r,r,r", [x], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def hide_side(s, BELOW: gl.constexpr, start, FIRST: gl.constexpr, bound, full):
    """Scores with -inf for keys below ``bound`` [M] of their row, or from it on.

    All rows see the keys from ``full`` on, or those before it; as [M] it is a number for the rows of each warp. So only
    the columns up to ``full`` are looked at.
    """
    VALUES: gl.constexpr = s.shape[0] * s.shape[1] // 128
    bounds = less_own(bound, own_columns(s) + start, s)
    full = full - start
    if len(full.shape) > 0:
        full = of_rows(full, s)[:, None]
    return gl.inline_asm_elementwise(
        hide_side_ptx(VALUES, BELOW, FIRST), in_place(VALUES, "rr"),
        [s, bounds, gl.zeros_like(bounds) + full], dtype=gl.float32, is_pure=True, pack=VALUES,
    )  # fmt: skip


@gluon.constexpr_function
def hide_side_ptx(values, below, first):
    """PTX that looks at 16 columns at a time, from the side where some are hidden, until all rows see all.

    A thread's values $0 and on are those of its two rows by turns, in pairs of neighbouring columns: ``first`` plus 0,
    1, 8, 9, 16, 17, ...
    """
    bounds, full = 2 * values, 3 * values
    text = "{ .reg .pred p; "
    for x in range(0, values, 8) if below else range(values - 8, -1, -8):
        edge = first + 2 * x
        text += f"setp.le.s32 p, ${full}, {edge}; " if below else f"setp.ge.s32 p, ${full}, {edge + 16}; "
        text += "@p bra done; "
        for i in range(x, x + 8):
            column, bound = first + i // 4 * 8 + i % 2, bounds + i // 2 % 2 * 2
            text += f"setp.{'le' if below else 'gt'}.s32 p, ${bound}, {column}; selp.f32 ${i}, ${i}, 0fFF800000, p; "
    return text + "done: }"


@gluon.jit
def hide_outside_window_and_lead(s, start, new_from, rows, C: gl.constexpr):
    """Scores with -inf for keys that are neither in the window nor leading. These end with the row's ``end`` if causal.

    A causal row sees key x if (low <= x or x < lead) and x < end, any other row if low <= x < end or x < lead.
    """
    low, end, _ = rows.reach  # of ``lead`` each row has its own; as one number for all rows it takes fewer registers
    lead, right = rows.key_tiles.work.lead, rows.key_tiles.band.right
    if C.F.bounds:  # a row whose window is empty may end before a gap in the list
        lead = gl.minimum(end + rows.key_tiles.walk.gap, lead)
        s = keep_seen(s, SEEN, start, (low, end, lead, low * 0 + new_from))
    elif C.F.causal:  # a gap in the list is no matter: every row's window ends beyond it
        s = keep_seen(s, SEEN_CAUSAL, start, (low, end, low * 0 + lead, low * 0 + new_from))
    else:
        s = keep_seen(s, SEEN, start, (low, end, low * 0 + gl.minimum(lead, right), low * 0 + new_from))
    return s


@gluon.jit
def capped(s, rows, C: gl.constexpr):
    """Scores with the soft cap, if there is one, and the scale that makes them base-2: a number, or one a row [M]."""
    scale = rows.scale_log2
    if C.F.softcap:
        s = soft_cap(s * (scale[:, None] if C.F.row_scales else scale), rows.cap_log2)
        scale = 1.0
    return s, scale


@gluon.jit
def hide_dead_pages(s, start, rows, batch, C: gl.constexpr):
    """Scores with -inf for keys of pages outside the pool."""
    if C.F.page_size > 0:
        if not rows.all_live:
            box = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) // C.box_rows
            live = (live_boxes(start, s.shape[1], rows.key_tiles, batch, C) >> box) & 1
            s = gl.where((live != 0)[None, :], s, float("-inf"))
    return s


SEEN = gl.constexpr(
    "setp.ge.s32 seen, $2, $3; setp.lt.and.s32 seen, $2, $4, seen; setp.lt.or.s32 seen, $2, $5, seen; "
    "setp.ge.and.s32 seen, $2, $6, seen;"
)
"""PTX: (low <= x < end or x < lead) and new_from <= x, for the column x in $2 and the bounds in $3, $4, $5 and $6."""
SEEN_CAUSAL = gl.constexpr(
    "setp.ge.s32 seen, $2, $3; setp.lt.or.s32 seen, $2, $5, seen; setp.lt.and.s32 seen, $2, $4, seen; "
    "setp.ge.and.s32 seen, $2, $6, seen;"
)
"""The same for (low <= x or x < lead) and x < end and new_from <= x."""


@gluon.jit
def keep_seen(s, SEEN_PTX: gl.constexpr, start, bounds):
    """Scores where ``SEEN_PTX`` holds, else -inf.

    The PTX has one predicate for all comparisons: of separate ones the compiler would keep each result in a register,
    and spill. A thread's own part of its columns is taken from the four bounds, so that $2 is known at compile time.
    """
    column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    own = own_columns(s)
    x = gl.zeros_like(s).to(gl.int32) + (column - own)[None, :]
    own += start
    low, end = less_own(bounds[0], own, s), less_own(bounds[1], own, s)
    lead, new_from = less_own(bounds[2], own, s), less_own(bounds[3], own, s)
    return gl.inline_asm_elementwise(
        "{ .reg .pred seen; " + SEEN_PTX + " selp.f32 $0, $1, 0fFF800000, seen; }", "=f,f,r,r,r,r,r",
        [s, x, low, end, lead, new_from], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def own_columns(s):
    """The thread's own part of each column number, [N]: 2 t of 2 t, 2 t + 1, 2 t + 8, 2 t + 9, ..."""
    return gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) % 8 // 2 * 2


@gluon.jit
def less_own(bound, own, s):
    """The bounds [M] of rows less the own parts [N] of columns: [M, N] in the layout of ``s``."""
    return of_rows(bound, s)[:, None] - own[None, :]


@gluon.jit
def live_boxes(start, KEYS: gl.constexpr, key_tiles, batch, C: gl.constexpr):
    """Which TMA boxes of a tile of ``KEYS`` keys are in a page of the pool, one bit each."""
    page = box_pages(start, key_tiles, KEYS, 4, False, batch, C)
    lane = gl.arange(0, 32, layout=page.type.layout)
    return gl.sum(gl.where((page >= 0) & (page < batch.num_pages), 1 << lane, 0), 0)
