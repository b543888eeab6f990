"""Plots of stored results: x of the floor by case, time against context and window, and what a cache must hold."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from swath.bench.case import DECODES, BenchCase, Groups, stored_name, work_of
from swath.bench.cases import BY_NAME, CASES
from swath.bench.goals import X_FLOOR, X_PEER
from swath.bench.judge import by_case, is_baseline, is_ours
from swath.bench.results import Row, Timed, conditions, timed
from swath.cli.palette import FAINT, INK, MUTED, TONES
from swath.quant import KVQuant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches: a page's width in print, and at its letters' size readable on a phone held across."""
TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
MARKERS = "osD^vP*X"
_KINDS = {"decode": DECODES, "prefill": ("prefill", "mixed")}


def draw_all(rows: Iterable[Row], prefix: str = "bench") -> dict[str, bytes]:
    """Every plot for which there are rows, by the name of its file, PNG and SVG; the same rows give the same bytes."""
    import matplotlib as mpl

    known = [row for row in timed(rows) if row.case in BY_NAME]
    drawn: dict[str, Figure | None] = {}
    for kind, ops in _KINDS.items():
        mine = [row for row in known if row.op in ops]
        drawn[f"floor-{kind}"] = _floors(mine, f"{kind.capitalize()}: time over the floor")
        drawn[f"context-{kind}"] = _sweep(mine, "context", _context, kind)
        drawn[f"window-{kind}"] = _sweep(mine, "window", lambda case: case.size or 0, kind)
    drawn["cache"] = _cache(known)
    files = {}
    with mpl.rc_context({"svg.hashsalt": "swath", "font.family": "DejaVu Sans"}):
        for name, figure in drawn.items():
            for form in ("png", "svg") if figure is not None else ():
                data = io.BytesIO()
                figure.savefig(data, format=form, dpi=160, metadata={"Date": None} if form == "svg" else None)  # type: ignore[union-attr]
                files[f"{prefix}-{name}.{form}"] = data.getvalue()
    return files


def _context(case: BenchCase) -> int:
    return max(kv for _, _, kv in case.draw.groups) if isinstance(case.draw, Groups) else 0


def _floors(rows: list[Timed], title: str) -> Figure | None:
    """A line for each case, ours filled, peers hollow; the cases that have a goal, or all where none has."""
    cases = {name: found for name, found in by_case(rows).items() if "sweep" not in BY_NAME[name].tags}
    with_goal = {name: found for name, found in cases.items() if _goal(BY_NAME[name])}
    cases = with_goal or cases
    if not cases:
        return None
    figure = _figure(0.27 * len(cases) + 1.5, title, rows)
    ax = figure.axes[0]
    styles = _styles(row.provider for found in cases.values() for row in found if not is_baseline(row.provider))
    for y, found in enumerate(cases.values()):
        points = [row for row in found if not is_baseline(row.provider)]
        spread = [row.x_floor for row in points]
        if spread:
            ax.plot([min(1.0, *spread), max(spread)], [y, y], color=FAINT, linewidth=1, zorder=0)
        for row in points:
            ax.plot(row.x_floor, y, linestyle="", **styles[row.provider])
    ax.set_yticks(range(len(cases)), list(cases), size=8)
    ax.invert_yaxis()
    ax.axvline(1, color=MUTED, linewidth=1)
    _log_ticks(ax, [row.x_floor for found in cases.values() for row in found if not is_baseline(row.provider)])
    ax.set_xlabel("time / floor (1 is what the machine allows, left is better)", color=INK, size=9)
    _legend(ax, styles)
    return figure


def _goal(case: BenchCase) -> bool:
    return case.name in X_FLOOR or case.name in X_PEER


def _log_ticks(ax: Axes, values: list[float]) -> None:
    from matplotlib.ticker import NullLocator

    low, high = min(0.97, *values, 1.0), max(*values, 1.25) * 1.1
    ax.set_xscale("log")
    ax.set_xlim(low * 0.98, high)
    shown = [tick for tick in TICKS if tick <= high and (high < 4 or tick not in (1.1, 1.25))]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.xaxis.set_minor_locator(NullLocator())


def _sweep(rows: list[Timed], tag: str, along: Callable[[BenchCase], int], kind: str) -> Figure | None:
    """Time against ``along``: a line for each provider, and one of its own for cases without a window."""
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    floors: dict[bool, list[tuple[int, float]]] = {}
    for row in rows:
        case = BY_NAME[row.case]
        if tag in case.tags and not is_baseline(row.provider):
            full = case.size is None
            lines.setdefault((row.provider, full), []).append((along(case), row.us))
            floors.setdefault(full, []).append((along(case), row.floor_us))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure = _figure(4.4, f"{kind.capitalize()}: time against the {tag}", rows)
    ax = figure.axes[0]
    styles = _styles(provider for provider, _ in lines)
    for (provider, full), points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        ax.plot(x, y, linewidth=1.4, linestyle=":" if full else "-", **styles[provider])
    for points in floors.values():
        x, y = zip(*sorted(dict(points).items()), strict=True)
        ax.plot(x, y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    _powers(ax, sorted({x for points in lines.values() for x, _ in points}))
    fixed = BY_NAME[next(row.case for row in rows if tag in BY_NAME[row.case].tags)]
    windowed = f"keys in the window, of {_context(fixed)}" if tag == "window" else "keys of a sequence"
    ax.set_xlabel(windowed, color=INK, size=9)
    ax.set_ylabel("us (less is better)", color=INK, size=9)
    _legend(ax, styles, "dotted: no window; dashed: floor" if len(floors) > 1 else "dashed: floor")
    return figure


def _cache(rows: list[Timed]) -> Figure | None:
    """What a cache of one layer must hold for a sequence: arithmetic on the shapes of the decode sweep."""
    sweep = [case for case in CASES if case.op == "decode" and {"sweep", "context"} <= set(case.tags)]
    measured = {row.case for row in rows}
    sweep = [case for case in sweep if case.name in measured]
    contexts = sorted({_context(case) for case in sweep})
    if len(contexts) < 2:
        return None
    first = sweep[0]
    figure = _figure(4.4, "Cache of one layer and sequence", rows)
    ax = figure.axes[0]
    window = next(case.size for case in sweep if case.size is not None)
    kinds = [(size, quant) for size in (None, window) for quant in (first.quant, KVQuant(torch.int8, "token"))]
    for (size, quant), tone, marker in zip(kinds, TONES, MARKERS, strict=False):
        alone = replace(first, size=size, quant=quant, q_lens=1)
        mib = [work_of(replace(alone, kv_lens=(n,))).cache_bytes / 2**20 for n in contexts]
        label = f"{stored_name(alone.storage)}, {'no window' if size is None else f'window {size}'}"
        ax.plot(contexts, mib, marker=marker, markersize=5, linewidth=1.4, color=tone, label=label)
    _powers(ax, contexts)
    ax.set_xlabel("keys of a sequence", color=INK, size=9)
    ax.set_ylabel("MiB (less is better)", color=INK, size=9)
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _powers(ax: Axes, values: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(values, [f"{v // 1024}k" if v >= 1024 else str(v) for v in values])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _figure(height: float, title: str, rows: list[Timed]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    ax.tick_params(colors=INK, which="both", length=0, labelsize=8)
    ax.grid(color=FAINT, linewidth=0.4, alpha=0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", color=INK, size=12, weight="bold")
    figure.supxlabel(textwrap.fill(conditions(rows), 110), x=0.02, ha="left", color=MUTED, size=7)
    return figure


def _styles(providers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Marker and colour of each provider: ours filled and in the first tone."""
    names = sorted(set(providers), key=lambda name: (not is_ours(name), name))
    styles = {}
    for i, name in enumerate(names):
        tone = TONES[i % len(TONES)]
        face = tone if is_ours(name) else "white"
        styles[name] = dict(marker=MARKERS[i % len(MARKERS)], color=tone, markerfacecolor=face, markersize=6)
    return styles


def _legend(ax: Axes, styles: dict[str, dict[str, Any]], note: str = "") -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()]
    legend = ax.legend(
        handles=handles, frameon=False, fontsize=8, labelcolor=INK, title=note or None, ncols=min(len(handles), 5),
        loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    legend.get_title().set(size=8, color=MUTED)
