"""What rows see of the scores of a key tile: bounds of the window as comparisons, and keys of dead pages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.device.softmax import soft_cap
from swath.schedules.hopper_feed import box_pages

NOWHERE = gl.constexpr(1 << 30)
"""A place in the list of keys that no row sees."""


@gluon.jit
def masked_scores(s, start, fresh, query, tile, batch, MASKED: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """Scores of the key tile at ``start``, capped and masked, and the scale that makes them base-2."""
    s, scale = capped(s, query, F)
    if MASKED:
        low = query.reach.low
        column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        x = start + column
        if F.leading == "":
            low = gl.maximum(low, fresh)
            s = hide(s, x, low, query.reach.end, query.reach.lead, HIDE)
        else:  # leading keys are seen below ``low``
            x |= ((x - fresh) >> 31) & NOWHERE  # where x < fresh; as a choice it would take predicates from ``hide``
            s = hide(s, x, low, query.reach.end, query.reach.lead, HIDE_BUT_LEADING)
        s = hide_dead(s, start, query, tile, batch, F, C)
    return s, scale


@gluon.jit
def cut_scores(s, start, fresh: gl.constexpr, query, tile, batch, F: gl.constexpr, C: gl.constexpr):
    """The same in one pass, where an edge cuts few of the tiles: scores are compared with those that do alone."""
    s, scale = capped(s, query, F)
    column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    own = column % 8 // 2 * 2  # of a column's number; the rest is known when this is compiled, and costs no register
    low, from_all = query.reach.low, query.from_all
    if fresh > 0:
        low, from_all = gl.maximum(low, fresh), gl.maximum(from_all, fresh)
    low, end = low - start, query.reach.end - start  # there are no leading keys: ``hide`` reads no ``lead``
    if from_all > start:
        s = hide(s, column - own, low, end, low, HIDE_BELOW, own)
    if query.to_all < start + s.shape[1]:
        s = hide(s, column - own, low, end, low, HIDE_ABOVE, own)
    return hide_dead(s, start, query, tile, batch, F, C), scale


@gluon.jit
def capped(s, query, F: gl.constexpr):
    """Scores with the soft cap, if there is one, and the scale that makes them base-2."""
    scale = query.scale_log2
    if F.softcap:
        s = soft_cap(s * scale, query.cap_log2)
        scale = 1.0
    return s, scale


@gluon.jit
def hide_dead(s, start, query, tile, batch, F: gl.constexpr, C: gl.constexpr):
    """Scores with -inf for keys of pages outside the pool."""
    if F.page_size > 0:
        if not query.clean:
            box = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) // C.box_rows
            live = (live_boxes(start, s.shape[1], tile, batch, F, C) >> box) & 1
            s = gl.where((live != 0)[None, :], s, float("-inf"))
    return s


BELOW = "{ .reg .pred seen; setp.lt.s32 seen, $2, $4; "
WITHIN = BELOW + "setp.ge.and.s32 seen, $2, $3, seen; "
CHOOSE = "selp.f32 $0, $1, 0fFF800000, seen; }"
HIDE = gl.constexpr(WITHIN + CHOOSE)
HIDE_BUT_LEADING = gl.constexpr(WITHIN + "setp.lt.or.s32 seen, $2, $5, seen; " + CHOOSE)
HIDE_BELOW = gl.constexpr("{ .reg .pred seen; setp.ge.s32 seen, $2, $3; " + CHOOSE)
HIDE_ABOVE = gl.constexpr(BELOW + CHOOSE)


@gluon.jit
def hide(s, x, low, end, lead, CODE: gl.constexpr, own=None):
    """Scores with -inf where a row does not see a key: ``visible`` as comparisons that pass one predicate on.

    The compiler keeps the results of all comparisons in registers, and spills. ``own``: what is still to be added to x.
    """
    zero = gl.zeros_like(s).to(gl.int32)
    ROW: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    low, end, lead = gl.convert_layout(low, ROW), gl.convert_layout(end, ROW), gl.convert_layout(lead, ROW)
    x, low, end, lead = zero + x[None, :], zero + low[:, None], zero + end[:, None], zero + lead[:, None]
    if own is not None:
        low, end = low - own[None, :], end - own[None, :]
    return gl.inline_asm_elementwise(
        CODE, "=f,f,r,r,r,r", [s, x, low, end, lead], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def live_boxes(start, KEYS: gl.constexpr, tile, batch, F: gl.constexpr, C: gl.constexpr):
    """Which boxes of a tile of ``KEYS`` keys are in a page of the pool, one bit each."""
    page = box_pages(start, tile, KEYS, 4, batch, F, C)
    lane = gl.arange(0, 32, layout=page.type.layout)
    return gl.sum(gl.where((page >= 0) & (page < batch.num_pages), 1 << lane, 0), 0)
