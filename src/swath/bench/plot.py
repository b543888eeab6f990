"""Plots of stored results: x of the floor by case, time against context and window, and what a cache must hold.

They are drawn for a page a phone wide: there the smallest letters are about as high as the text beside them.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from swath.bench.case import DECODES, BenchCase, Groups, stored_name, work_of
from swath.bench.cases import BY_NAME, CASES, shape_in_bits
from swath.bench.goals import X_FLOOR, X_PEER
from swath.bench.judge import best, by_case, is_baseline, is_ours
from swath.bench.results import Row, Timed, conditions, timed
from swath.bench.units import in_words
from swath.cli.palette import FAINT, INK, LOOKS, MUTED, TONES, UNKNOWN
from swath.quant import KVQuant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT, PER_CASE = 4.2, 4.8, 0.37
"""Inches: of a plot, and of a line for a case with its name above."""
TEXT, CAPTION = 8.6, 7.0
"""Points. On a phone 360 pixels wide letters of 8.6 points in 4.2 inches are 10 pixels high."""
DOTS = 240
FINEST = (*(n / 10 for n in range(10, 20)), *(n / 4 for n in range(8, 20)), *(n / 2 for n in range(10, 20)))
STEPS = ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), FINEST)
"""Ticks of a decade, coarse to fine."""
TICKS = 4
"""A logarithmic axis has as many or more."""
_KINDS = {"decode": DECODES, "prefill": ("prefill", "mixed")}


def figures(rows: Iterable[Row]) -> dict[str, Figure]:
    """Every plot for which there are rows, by name."""
    known = [row for row in timed(rows) if row.case in BY_NAME]
    drawn: dict[str, Figure | None] = {}
    for kind, ops in _KINDS.items():
        mine = [row for row in known if row.op in ops]
        drawn[f"floor-{kind}"] = _floors(mine, f"{kind.capitalize()}: time over the floor")
        drawn[f"context-{kind}"] = _sweep(mine, "context", _context, kind)
        drawn[f"window-{kind}"] = _sweep(mine, "window", lambda case: case.size or 0, kind)
        drawn[f"error-{kind}"] = _errors(mine, kind)
    drawn["cache"] = _cache(known)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_all(runs: Sequence[Iterable[Row]], prefix: str = "bench") -> dict[str, bytes]:
    """The plots as PNG and SVG, by the names of their files, each of the first run that has rows for it.

    The same rows give the same bytes.
    """
    chosen: dict[str, Figure] = {}
    for run in reversed(runs):
        chosen |= figures(run)
    return {f"{prefix}-{name}.{form}": _rendered(chosen[name], form) for name in chosen for form in ("png", "svg")}


def _rendered(figure: Figure, form: str) -> bytes:
    import matplotlib as mpl

    data = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "swath"}):
        figure.savefig(data, format=form, dpi=DOTS, metadata={"Date": None} if form == "svg" else None)
    return data.getvalue()


def _context(case: BenchCase) -> int:
    return max(kv for _, _, kv in case.draw.groups) if isinstance(case.draw, Groups) else 0


def _floors(rows: list[Timed], title: str) -> Figure | None:
    """A line for each case, ours filled, peers hollow; the cases that have a goal, or all where none has."""
    rows = [row for row in rows if not is_baseline(row.provider) and "sweep" not in BY_NAME[row.case].tags]
    rows = [row for row in rows if row.case in X_FLOOR or row.case in X_PEER] or rows
    if not rows:
        return None
    cases = by_case(rows)
    figure = _figure(PER_CASE * len(cases) + 1.9, title, conditions(rows))
    ax = figure.axes[0]
    for y, (name, points) in enumerate(cases.items()):
        spread = [row.x_floor for row in points]
        ax.plot([min(1.0, *spread), max(1.0, *spread)], [y, y], color=FAINT, linewidth=1, zorder=0)
        ax.annotate(name, (1, y - 0.42), (4, 0), textcoords="offset points", size=TEXT, color=INK, va="center")
        for row in points:
            ax.plot(row.x_floor, y, linestyle="", **_style(row.provider))
    ax.set_ylim(len(cases) - 0.5, -0.8)
    ax.yaxis.set_visible(False)
    ax.axvline(1, color=MUTED, linewidth=1, zorder=0)
    highest = max(row.x_floor for row in rows)
    ax.set_xscale("log")
    ax.set_xlim(min(0.95, *(row.x_floor for row in rows)) * 0.97, max(highest, 1.25) * 1.08)
    _set_ticks(ax.xaxis, *ax.get_xlim(), "{:g}".format)
    ax.set_xlabel("time / floor (left is better)", color=INK, size=TEXT)
    _legend(ax, {row.provider for row in rows})
    return figure


def _sweep(rows: list[Timed], tag: str, along: Callable[[BenchCase], int], kind: str) -> Figure | None:
    """Time against ``along``: a line for each provider, and one of its own for cases without a window."""
    rows = [row for row in rows if tag in BY_NAME[row.case].tags and not is_baseline(row.provider)]
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    floors: dict[bool, list[tuple[int, float]]] = {}
    for row in rows:
        case = BY_NAME[row.case]
        full = case.size is None
        lines.setdefault((row.provider, full), []).append((along(case), row.us))
        floors.setdefault(full, []).append((along(case), row.floor_us))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = _figure(HEIGHT, f"{kind.capitalize()}: time against the {tag}", conditions(rows))
    ax = figure.axes[0]
    for (provider, full), points in lines.items():
        ax.plot(*zip(*sorted(points), strict=True), linewidth=1.4, linestyle=":" if full else "-", **_style(provider))
    for points in floors.values():
        x, y = zip(*sorted(dict(points).items()), strict=True)
        ax.plot(x, y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    _log_axes(ax, sorted({x for points in lines.values() for x, _ in points}), in_words)
    fixed = _context(BY_NAME[rows[0].case])
    ax.set_xlabel(f"keys in the window, of {fixed}" if tag == "window" else "keys of a sequence", color=INK, size=TEXT)
    ax.set_ylabel("less is better", color=INK, size=TEXT)
    note = "dotted: no window; dashed: floor" if len(floors) > 1 else "dashed: floor"
    _legend(ax, {provider for provider, _ in lines}, note)
    return figure


def _errors(rows: list[Timed], kind: str) -> Figure | None:
    """Time over ours in 16 bits against the error, of every form of the calls that come in several."""
    rows = [row for row in rows if row.error and not is_baseline(row.provider)]
    points = []
    for row in rows:
        base = best(r for r in rows if r.case == f"8-bit {shape_in_bits(row.case)}, bf16" and is_ours(r.provider))
        if base is not None:
            points.append((row.error or 0.0, row.us / base.us, row.provider))
    if not points:
        return None
    figure = _figure(HEIGHT, f"{kind.capitalize()}: time against error", conditions(rows))
    ax = figure.axes[0]
    for error, ratio, provider in points:
        ax.plot(error, ratio, linestyle="", **_style(provider))
    errors = [error for error, _, _ in points]
    ax.set_xscale("log")
    ax.set_xlim(min(errors) / 1.5, max(errors) * 1.5)
    _set_ticks(ax.xaxis, *ax.get_xlim(), "{:g}".format)
    ax.set_ylim(0, max(ratio for _, ratio, _ in points) * 1.08)
    ax.axhline(1, color=MUTED, linewidth=1, zorder=0)
    ax.set_xlabel("relative error to float64 of the stored values", color=INK, size=TEXT)
    ax.set_ylabel("time / ours in 16 bits", color=INK, size=TEXT)
    _legend(ax, {provider for _, _, provider in points})
    return figure


def _cache(rows: list[Timed]) -> Figure | None:
    """What a cache of one layer must hold for a sequence: arithmetic on the shapes of the decode sweep."""
    measured = {row.case for row in rows}
    sweep = [c for c in CASES if c.op == "decode" and {"sweep", "context"} <= set(c.tags) and c.name in measured]
    contexts = sorted({_context(case) for case in sweep})
    if len(contexts) < 2:
        return None
    first, window = sweep[0], next(case.size for case in sweep if case.size is not None)
    heads = f"{first.num_kv_heads} kv heads of {first.head_dim}, pages of {first.page_size}"
    figure = _figure(HEIGHT, "Cache of one layer and sequence", f"Arithmetic, not measured: {heads}.")
    ax = figure.axes[0]
    kinds = [(size, quant) for size in (None, window) for quant in (first.quant, KVQuant(torch.int8, "token"))]
    for (size, quant), tone in zip(kinds, TONES, strict=False):
        alone = replace(first, size=size, quant=quant, q_lens=1)
        mib = [work_of(replace(alone, kv_lens=(n,))).cache_bytes / 2**20 for n in contexts]
        label = f"{stored_name(alone.storage)}, {'no window' if size is None else f'window {size}'}"
        ax.plot(contexts, mib, marker=".", linewidth=1.4, color=tone, label=label)
    _log_axes(ax, contexts, "{:g} MiB".format)
    ax.set_xlabel("keys of a sequence", color=INK, size=TEXT)
    ax.set_ylabel("less is better", color=INK, size=TEXT)
    ax.legend(frameon=False, fontsize=TEXT, labelcolor=INK)
    return figure


def ticks_within(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, at least ``TICKS`` where the steps are fine enough for that."""
    found: list[float] = []
    for steps in STEPS:
        found = [m * 10.0**k for k in range(-9, 12) for m in steps if low <= m * 10.0**k <= high]
        if len(found) >= TICKS:
            break
    return found


def _set_ticks(axis: Axis, low: float, high: float, words: Callable[[float], str]) -> None:
    from matplotlib.ticker import NullLocator

    ticks = ticks_within(low, high)
    axis.set_ticks(ticks, [words(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _log_axes(ax: Axes, values: Sequence[int], words: Callable[[float], str]) -> None:
    """Powers of two along x, round numbers along y."""
    from matplotlib.ticker import NullLocator

    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [f"{v // 1024}k" if v >= 1024 else str(v) for v in values])
    ax.xaxis.set_minor_locator(NullLocator())
    _set_ticks(ax.yaxis, *ax.get_ylim(), words)


def _figure(height: float, title: str, caption: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    ax.tick_params(colors=INK, which="both", length=0, labelsize=TEXT)
    ax.grid(color=FAINT, linewidth=0.4, alpha=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", color=INK, size=11, weight="bold")
    figure.supxlabel(textwrap.fill(caption, 70), x=0.02, ha="left", color=MUTED, size=CAPTION)
    return figure


def _style(provider: str) -> dict[str, Any]:
    """Ours filled, others hollow."""
    tone, marker = LOOKS.get(provider, UNKNOWN)
    face = tone if is_ours(provider) else "white"
    return dict(marker=marker, color=tone, markerfacecolor=face, markersize=6.5)


def _legend(ax: Axes, providers: Iterable[str], note: str = "") -> None:
    from matplotlib.lines import Line2D

    order = list(LOOKS)
    names = sorted(providers, key=lambda name: order.index(name) if name in order else len(order))
    legend = ax.legend(
        handles=[Line2D([], [], linestyle="", label=name, **_style(name)) for name in names], frameon=False,
        fontsize=TEXT, labelcolor=INK, title=note or None, ncols=min(len(names), 3), loc="lower left",
        bbox_to_anchor=(0, 1), borderaxespad=0.2, handletextpad=0.2, columnspacing=1.0, alignment="left",
    )  # fmt: skip
    legend.get_title().set(size=TEXT, color=MUTED)
