"""What rows see of the scores of a key tile: bounds of the window as comparisons, and keys of dead pages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.device.softmax import soft_cap
from swath.backends.hopper.load import box_pages
from swath.backends.hopper.softmax import in_place, of_rows


@gluon.jit
def masked_scores(
    s, start, fresh, query, batch, MASKED: gl.constexpr, F: gl.constexpr, C: gl.constexpr, FIRST: gl.constexpr = 0
):  # fmt: skip
    """Scores of the key tile at ``start``, from its column ``FIRST`` on, capped and masked, and their base-2 scale.

    Keys before ``fresh`` are in another tile as well, and count there; none are where that is None.
    """
    s, scale = capped(s, query, F)
    if MASKED:
        if F.leading == "":
            s = hide_cut(s, start, FIRST, fresh, query)
        else:
            s = hide_but_leading(s, start + FIRST, fresh, query, F)
        s = hide_dead(s, start + FIRST, query, batch, F, C)
    return s, scale


@gluon.jit
def hide_cut(s, start, FIRST: gl.constexpr, fresh, query):
    """Scores with -inf where an edge of the window hides keys: few tiles are cut by both, some in one pass by none."""
    low, from_all = query.reach.low, query.from_all
    if fresh is not None:
        low, from_all = gl.maximum(low, fresh), gl.maximum(from_all, fresh)
    s = hide_side(s, True, start, FIRST, low, from_all)
    return hide_side(s, False, start, FIRST, query.reach.end, query.to_all)


@gluon.jit
def hide_side(s, BELOW: gl.constexpr, start, FIRST: gl.constexpr, bound, of_all):
    """Scores with -inf below each row's ``bound``, or from it on. Beyond ``of_all`` every row sees every key, so that
    only columns up to it are looked at.
    """
    VALUES: gl.constexpr = s.shape[0] * s.shape[1] // 128
    bounds = less(bound, own_columns(s) + start, s)
    return gl.inline_asm_elementwise(
        hiding(VALUES, BELOW, FIRST), in_place(VALUES, "rr"), [s, bounds, gl.zeros_like(bounds) + (of_all - start)],
        dtype=gl.float32, is_pure=True, pack=VALUES,
    )  # fmt: skip


@gluon.constexpr_function
def hiding(values, below, first):
    """PTX that looks at 16 columns at a time, from the side where some are hidden, until all rows see all.

    A thread's values $0 and on are those of its two rows by turns, in pairs of neighbouring columns from ``first`` on.
    """
    bounds, of_all = 2 * values, 3 * values
    text = "{ .reg .pred p; "
    for x in range(0, values, 8) if below else range(values - 8, -1, -8):
        edge = first + 2 * x
        text += f"setp.le.s32 p, ${of_all}, {edge}; " if below else f"setp.ge.s32 p, ${of_all}, {edge + 16}; "
        text += "@p bra done; "
        for i in range(x, x + 8):
            column, bound = first + i // 4 * 8 + i % 2, bounds + i // 2 % 2 * 2
            text += f"setp.{'le' if below else 'gt'}.s32 p, ${bound}, {column}; selp.f32 ${i}, ${i}, 0fFF800000, p; "
    return text + "done: }"


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
    """Scores that are ``SEEN``, an expression of a column $2 and of four ``bounds``, $3 and on, of its row; -inf in
    place of others.

    The expression passes one predicate on: of comparisons the compiler would keep all results in registers, and spill.
    A thread's own part of its columns' numbers is taken from the bounds; what is left is known when this is compiled.
    """
    column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    own = own_columns(s)
    x = gl.zeros_like(s).to(gl.int32) + (column - own)[None, :]
    own += start
    first, second = less(bounds[0], own, s), less(bounds[1], own, s)
    third, fourth = less(bounds[2], own, s), less(bounds[3], own, s)
    return gl.inline_asm_elementwise(
        "{ .reg .pred seen; " + SEEN + " selp.f32 $0, $1, 0fFF800000, seen; }", "=f,f,r,r,r,r,r",
        [s, x, first, second, third, fourth], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def own_columns(s):
    """A thread's own part of the numbers of its columns: what is left of them is known when this is compiled."""
    return gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) % 8 // 2 * 2


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
