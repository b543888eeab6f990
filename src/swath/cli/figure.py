"""The picture of a window as a figure, for ``swath show --png`` and ``--svg``."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swath.cli.draw import Cell, Picture, spelled, stride_for
from swath.cli.palette import FAINT, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A dark, a middle and a light tone: they stay apart in print and for the colour-blind.
COLOURS = {Cell.WINDOW: "#1d5b79", Cell.LEADING: "#f2a541", Cell.SKIPPED: "#e3e9ed"}
HELD: dict[str, Any] = {"facecolor": "#edf3f6", "edgecolor": COLOURS[Cell.WINDOW]}
FREED: dict[str, Any] = {"facecolor": "none", "edgecolor": FAINT, "linestyle": (0, (2, 2))}
SIDE = 1.03
"""Where the text beside the grid begins, in widths of the grid."""
FINE = 64
"""Up to so many rows and columns every cell is a square of its own; beyond, the grid is an image."""


def rendered(drawn: Picture, file_format: str, page_size: int | None) -> bytes:
    """The figure as "png" or "svg". The same picture gives the same bytes."""
    import matplotlib as mpl

    data = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    with mpl.rc_context({"svg.hashsalt": "swath", "font.family": "DejaVu Sans"}):
        fig = figure(drawn, page_size)
        fig.savefig(data, format=file_format, dpi=200, metadata=metadata, bbox_inches="tight", pad_inches=0.15)
    return data.getvalue()


def figure(drawn: Picture, page_size: int | None) -> Figure:
    """Cells, axes, and a legend beside them; with ``page_size`` also page boundaries and which pages are freed."""
    from matplotlib.figure import Figure

    rows, columns = drawn.cells.shape
    inch = 4.4 / max(rows, columns)
    fig = Figure(figsize=(max(columns * inch, 1.0), max(rows * inch, 1.0)), facecolor="white")
    ax = fig.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    held = torch.ones_like(drawn.seen) if page_size is None else _held_cells(drawn, page_size)
    if max(rows, columns) <= FINE:
        _draw_squares(ax, drawn, held)
    else:
        _draw_image(ax, drawn, held)
    _label_axes(ax, drawn)
    if page_size is not None:
        _draw_pages(ax, drawn, page_size)
    _draw_legend(ax, drawn, held)
    _draw_counts(ax, drawn, page_size)
    return fig


def _held_cells(drawn: Picture, page_size: int) -> Tensor:
    """bool [Q, K]: the page of the key is still held when the query runs."""
    return drawn.pages_held(page_size).repeat_interleave(page_size, dim=1)[:, : drawn.cells.shape[1]]


def _draw_squares(ax: Axes, drawn: Picture, held: Tensor) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import FancyBboxPatch

    def squares(where: Tensor) -> list[FancyBboxPatch]:
        style = "round,pad=0,rounding_size=0.12"
        return [FancyBboxPatch((k + 0.06, q + 0.06), 0.88, 0.88, boxstyle=style) for q, k in where.nonzero().tolist()]

    for cell, colour in COLOURS.items():
        shown = drawn.cells == cell
        ax.add_collection(PatchCollection(squares(shown & held), facecolor=colour, linewidth=0))
    freed = squares((drawn.cells == Cell.SKIPPED) & ~held)
    ax.add_collection(PatchCollection(freed, linewidth=0.7, **FREED))


def _draw_image(ax: Axes, drawn: Picture, held: Tensor) -> None:
    from matplotlib.colors import ListedColormap

    rows, columns = drawn.cells.shape
    shown = drawn.cells.where(held, 0)
    colours = ListedColormap(["white", *(COLOURS[c] for c in (Cell.SKIPPED, Cell.LEADING, Cell.WINDOW))])
    extent = (0, columns, rows, 0)
    ax.imshow(shown.numpy(), cmap=colours, vmin=0, vmax=3, extent=extent, interpolation="nearest", aspect="equal")


def _label_axes(ax: Axes, drawn: Picture) -> None:
    rows, columns = drawn.cells.shape
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    for axis, count, first in ((ax.xaxis, columns, 0), (ax.yaxis, rows, drawn.q_start)):
        every = stride_for(count, 24)
        shown = range(-first % every, count, every)
        axis.set_ticks([i + 0.5 for i in shown], [str(first + i) for i in shown])
    ax.set_xlabel("key position", color=MUTED, size=9, labelpad=6)
    ax.set_ylabel("query position", color=MUTED, size=9, labelpad=6)
    ax.tick_params(length=0, labelsize=8, labelcolor=INK, pad=3)
    ax.spines[:].set_visible(False)


def _draw_pages(ax: Axes, drawn: Picture, page_size: int) -> None:
    """Page boundaries through the grid, and a strip below it: which pages are held after the last query."""
    from matplotlib.patches import FancyBboxPatch

    rows, columns = drawn.cells.shape
    unit = _unit(drawn)
    if page_size < 0.5 * unit:  # too fine to be told apart
        return
    top, height, gap = rows + 0.45 * unit, 0.85 * unit, 0.06 * unit
    box = f"round,pad=0,rounding_size={0.15 * unit}"
    for page, held in enumerate(drawn.pages_held(page_size)[-1].tolist()):
        left, right = page * page_size, min((page + 1) * page_size, columns)
        if page:
            ax.plot([left, left], [0, rows], color=MUTED, linewidth=0.6, linestyle=(0, (1, 3)))
        look = HELD if held else FREED
        width = right - left - 2 * gap
        ax.add_patch(
            FancyBboxPatch((left + gap, top), width, height, boxstyle=box, linewidth=0.8, clip_on=False, **look)
        )
        if width >= 2.5 * unit:
            ax.text(
                (left + right) / 2, top + height / 2, f"page {page}" if held else "freed", size=7.5, ha="center",
                va="center_baseline", color=INK if held else MUTED, style="normal" if held else "italic",
            )  # fmt: skip


def _draw_legend(ax: Axes, drawn: Picture, held: Tensor) -> None:
    from matplotlib.patches import Patch

    labels = {Cell.WINDOW: "window", Cell.LEADING: "leading tokens", Cell.SKIPPED: "skipped"}
    shown = [cell for cell in labels if bool(((drawn.cells == cell) & held).any())]
    handles = [Patch(facecolor=COLOURS[cell], label=labels[cell]) for cell in shown]
    if not bool(held.all()):
        handles.append(Patch(label="skipped, page freed", **FREED))
    legend = ax.legend(
        handles=handles, title=spelled(drawn.window), loc="upper left", bbox_to_anchor=(SIDE, 1.0), frameon=False,
        fontsize=9, labelcolor=INK, handlelength=1.0, handleheight=1.0, labelspacing=0.65, borderaxespad=0.0,
        borderpad=0.0, alignment="left",
    )  # fmt: skip
    legend.get_title().set(family="DejaVu Sans Mono", size=9.5, color=INK)


def _draw_counts(ax: Axes, drawn: Picture, page_size: int | None) -> None:
    """Beside the last row what its query sees, beside the strip of pages how many are held."""
    rows, columns = drawn.cells.shape
    unit = _unit(drawn)
    if rows < 8 * unit:  # the legend needs the room
        return
    facts = [(rows - 0.5 * unit, f"query {drawn.last} sees {int(drawn.seen[-1].sum())} of {columns} keys")]
    if page_size is not None:
        pages = drawn.pages_held(page_size)[-1]
        facts.append((rows + 0.9 * unit, f"{int(pages.sum())} of {len(pages)} pages still held"))
    for y, text in facts:
        ax.text(SIDE * columns, y, text, size=9, color=MUTED, va="center_baseline")


def _unit(drawn: Picture) -> float:
    """A length in cells that is the same on paper for every picture: 1 for a grid of 16."""
    return max(drawn.cells.shape) / 16
