"""The table as a picture: quality against cache memory."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from swath.cli.files import write_all
from swath.cli.palette import FAINT, INK, MUTED, TONES
from swath.demo.measure import Row
from swath.demo.report import MIB, Report, in_short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save(report: Report, path: Path) -> None:
    """Write the plot as PNG: one pair of points per attention, hollow as the model computes, filled quantised."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.3, 6.6), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    rows = [row for row in report.rows if not row.tokens_before]  # after other text, losses are not comparable
    _draw_axes(ax, rows)
    names = list(dict.fromkeys(row.attention for row in rows))
    for name, tone in zip(names, TONES, strict=False):
        _draw_pair(ax, [row for row in rows if row.attention == name], tone)
    _draw_kv_legend(ax, rows)
    figure.suptitle("Quality against cache memory", x=0.02, ha="left", color=INK, size=13, weight="bold")
    figure.supxlabel(textwrap.fill(in_short(report.conditions), 78), x=0.02, ha="left", color=MUTED, size=9)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    write_all({path: data.getvalue()})


def _draw_axes(ax: Axes, rows: list[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    sizes = [row.peak_cache_bytes / MIB for row in rows]
    losses = [row.perplexity for row in rows]
    full = rows[0].full_bf16_cache_bytes / MIB
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(min(sizes) / 1.5, max(*sizes, full) * 1.5)
    ax.set_ylim(min(losses) / 1.15, max(losses) * 1.15)
    ticks = [
        t
        for t in (5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 150, 200, 300)
        if min(losses) / 1.15 <= t <= max(losses) * 1.15
    ]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.axvline(full, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    ax.annotate(
        "full bf16 cache", (full, 1), xycoords=("data", "axes fraction"), xytext=(-4, -6), textcoords="offset points",
        rotation=90, ha="right", va="top", size=10, color=MUTED,
    )  # fmt: skip
    ax.set_xlabel("peak KV cache, MiB (less is better)", color=INK, size=11)
    ax.set_ylabel("perplexity (less is better)", color=INK, size=11)
    ax.tick_params(colors=INK, which="both", length=0, labelsize=11)
    ax.grid(color=FAINT, linewidth=0.4, alpha=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_pair(ax: Axes, rows: list[Row], tone: str) -> None:
    """The points of one attention, joined: quantising moves along the line."""
    sizes = [row.peak_cache_bytes / MIB for row in rows]
    losses = [row.perplexity for row in rows]
    right = sizes[-1] > 8  # names in the right half stand below, and end with the line
    ax.plot(sizes, losses, color=tone, linewidth=1.2, alpha=0.6)
    for row, size, loss in zip(rows, sizes, losses, strict=True):
        ax.plot(size, loss, "o", markersize=8, markeredgewidth=1.6, color=tone, markerfacecolor=_face(row, tone))
    ax.annotate(
        f"{rows[0].attention}: {losses[-1]:.1f}", (sizes[0 if right else -1], losses[-1]),
        xytext=(0, -9 if right else 9), textcoords="offset points", color=tone, size=11, weight="bold",
        ha="right" if right else "left", va="top" if right else "bottom",
    )  # fmt: skip


def _face(row: Row, tone: str) -> str:
    return tone if row.kv in ("int8", "fp8") else "white"


def _draw_kv_legend(ax: Axes, rows: list[Row]) -> None:
    from matplotlib.lines import Line2D

    kinds = {row.kv: _face(row, MUTED) for row in rows}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=MUTED, markerfacecolor=face, markersize=8, label=f"{kv} cache")
        for kv, face in kinds.items()
    ]
    ax.legend(handles=handles, frameon=False, fontsize=11, labelcolor=INK)
