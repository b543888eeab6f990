"""What rows see of the scores of a key tile: bounds of the window as comparisons, and keys of dead pages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.device.softmax import soft_cap
from swath.schedules.hopper_feed import box_pages
from swath.schedules.hopper_softmax import of_rows


@gluon.jit
def masked_scores(s, start, fresh, query, batch, MASKED: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """Scores of the key tile at ``start``, capped and masked, and the scale that makes them base-2.

    Keys before ``fresh`` are in another tile as well, and count there; none are where that is None.
    """
    s, scale = capped(s, query, F)
    if MASKED:
        if F.leading == "":
            s = hide_cut(s, start, fresh, query)
        else:
            s = hide_but_leading(s, start, fresh, query, F)
        s = hide_dead(s, start, query, batch, F, C)
    return s, scale


@gluon.jit
def hide_cut(s, start, fresh, query):
    """Scores with -inf where an edge of the window hides keys: few tiles are cut by both, some in one pass by none."""
    low, from_all = query.reach.low, query.from_all
    if fresh is not None:
        low, from_all = gl.maximum(low, fresh), gl.maximum(from_all, fresh)
    if from_all > start:
        s = keep(s, HIDE_BELOW, start, (low,))
    if query.to_all < start + s.shape[1]:
        s = keep(s, HIDE_ABOVE, start, (query.reach.end,))
    return s


@gluon.jit
def hide_but_leading(s, start, fresh, query, F: gl.constexpr):
    """The same where leading keys are seen beside the window: below its ``end`` if causal, else wherever it is."""
    low, end, _ = query.reach  # of ``lead`` a row has its own; as one number for all it takes fewer registers
    lead, right = query.tile.place.leading, query.tile.band.right
    if F.causal:  # a gap in the list is no matter: every row's window ends beyond it
        s = keep(s, HIDE_BUT_LEADING_CAUSAL, start, (low, end, low * 0 + lead, low * 0 + fresh))
    else:
        s = keep(s, HIDE_BUT_LEADING, start, (low, end, low * 0 + gl.minimum(lead, right), low * 0 + fresh))
    return s


@gluon.jit
def capped(s, query, F: gl.constexpr):
    """Scores with the soft cap, if there is one, and the scale that makes them base-2."""
    scale = query.scale_log2
    if F.softcap:
        s = soft_cap(s * scale, query.cap_log2)
        scale = 1.0
    return s, scale


@gluon.jit
def hide_dead(s, start, query, batch, F: gl.constexpr, C: gl.constexpr):
    """Scores with -inf for keys of pages outside the pool."""
    if F.page_size > 0:
        if not query.clean:
            box = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) // C.box_rows
            live = (live_boxes(start, s.shape[1], query.tile, batch, F, C) >> box) & 1
            s = gl.where((live != 0)[None, :], s, float("-inf"))
    return s


HIDE_BELOW = gl.constexpr("setp.ge.s32 seen, $2, $3;")
HIDE_ABOVE = gl.constexpr("setp.lt.s32 seen, $2, $3;")
HIDE_BUT_LEADING = gl.constexpr(
    "setp.ge.s32 seen, $2, $3; setp.lt.and.s32 seen, $2, $4, seen; setp.lt.or.s32 seen, $2, $5, seen; "
    "setp.ge.and.s32 seen, $2, $6, seen;"
)
HIDE_BUT_LEADING_CAUSAL = gl.constexpr(
    "setp.ge.s32 seen, $2, $3; setp.lt.or.s32 seen, $2, $5, seen; setp.lt.and.s32 seen, $2, $4, seen; "
    "setp.ge.and.s32 seen, $2, $6, seen;"
)


@gluon.jit
def keep(s, SEEN: gl.constexpr, start, bounds):
    """Scores that are ``SEEN``, an expression of a column $2 and of ``bounds``, $3 and on, of its row; -inf in place of
    others. There are one or four bounds.

    The expression passes one predicate on: of comparisons the compiler would keep all results in registers, and spill.
    A thread's own part of its columns' numbers is taken from the bounds; what is left is known when this is compiled.
    """
    column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    own = column % 8 // 2 * 2
    x = gl.zeros_like(s).to(gl.int32) + (column - own)[None, :]
    own += start
    CODE: gl.constexpr = "{ .reg .pred seen; " + SEEN + " selp.f32 $0, $1, 0fFF800000, seen; }"
    first = less(bounds[0], own, s)
    if len(bounds) == 1:
        return gl.inline_asm_elementwise(CODE, "=f,f,r,r", [s, x, first], dtype=gl.float32, is_pure=True, pack=1)
    else:
        second, third, fourth = less(bounds[1], own, s), less(bounds[2], own, s), less(bounds[3], own, s)
        return gl.inline_asm_elementwise(
            CODE, "=f,f,r,r,r,r,r", [s, x, first, second, third, fourth], dtype=gl.float32, is_pure=True, pack=1
        )


@gluon.jit
def less(bound, own, s):
    """The bounds of rows less ``own`` of columns, in the layout of ``s``."""
    return of_rows(bound, s)[:, None] - own[None, :]


@gluon.jit
def live_boxes(start, KEYS: gl.constexpr, tile, batch, F: gl.constexpr, C: gl.constexpr):
    """Which boxes of a tile of ``KEYS`` keys are in a page of the pool, one bit each."""
    page = box_pages(start, tile, KEYS, 4, batch, F, C)
    lane = gl.arange(0, 32, layout=page.type.layout)
    return gl.sum(gl.where((page >= 0) & (page < batch.num_pages), 1 << lane, 0), 0)
