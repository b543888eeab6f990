"""The picture of a window as text, for ``swath show``: readable with and without colours, on dark and light."""

from __future__ import annotations

from rich.console import ConsoleOptions
from rich.text import Text

from swath.cli.draw import Cell, Picture, runs, stride_for

NAMES = {Cell.WINDOW: "window", Cell.LEADING: "leading tokens", Cell.SKIPPED: "skipped"}
# Mid tones, with a contrast of at least 3 against black and against white.
STYLES = {Cell.WINDOW: "#0b84a5", Cell.LEADING: "#c9741a", Cell.SKIPPED: "dim", Cell.HIDDEN: ""}
# The kinds differ in shape too, for terminals without colours.
GLYPHS = {Cell.WINDOW: "██", Cell.LEADING: "▒▒", Cell.SKIPPED: "· ", Cell.HIDDEN: "  "}
ASCII_GLYPHS = {Cell.WINDOW: "##", Cell.LEADING: "++", Cell.SKIPPED: ". ", Cell.HIDDEN: "  "}
PAGE_BARS, ASCII_PAGE_BARS = ("━", "╌"), ("=", "-")
MAX_ROWS = 64


def grid(drawn: Picture, options: ConsoleOptions, page_size: int | None) -> Text:
    """Axes, cells, pages and the legend. A picture too large for the terminal is pooled."""
    rows, columns = drawn.cells.shape
    digits = max(len(str(drawn.q_start)), len(str(drawn.last)))
    margin = len("query ") + digits + 2
    fitting = max((options.max_width - margin) // len(GLYPHS[Cell.WINDOW]), 1)
    step = max(stride_for(columns, fitting), stride_for(rows, MAX_ROWS))
    glyphs = ASCII_GLYPHS if options.ascii_only else GLYPHS
    lines = [Text(" " * margin + "key"), Text(" " * margin + _key_axis(columns, step))]
    for i, row in enumerate(drawn.pooled(step).tolist()):
        line = Text(f"{'' if i else 'query ':6}{drawn.q_start + i * step:>{digits}}  ")
        lines.append(line.append_tokens((glyphs[Cell(cell)], STYLES[Cell(cell)]) for cell in row))
    kinds = [cell for cell in NAMES if bool((drawn.cells == cell).any())]
    legends = [[Text(f"{glyphs[cell]} {NAMES[cell]}", STYLES[cell]) for cell in kinds]]
    if step > 1:
        legends.append([Text(f"one cell is {step} x {step} positions, filled if any is seen")])
    elif page_size is not None:
        held, freed = ASCII_PAGE_BARS if options.ascii_only else PAGE_BARS
        lines.append(Text(f"{'pages':<{margin}}{_page_bars(drawn, page_size, held, freed)}"))
        legends.append([Text(f"{held * 2} page held"), Text(f"{freed * 2} page freed")])
    lines += [Text(), *(Text.assemble(" " * margin, Text("   ").join(legend)) for legend in legends)]
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


def facts(drawn: Picture, page_size: int | None) -> list[str]:
    """In words: what the last query sees, what full attention would compute, what can be freed."""
    columns, last = drawn.cells.shape[1], f"Query {drawn.last}"
    seen = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(drawn.seen[-1]))
    lines = [f"{last} sees {int(drawn.seen[-1].sum())} of {columns} keys: {seen}." if seen else f"{last} sees no key."]
    pairs, full = int(drawn.seen.sum()), int(drawn.full.sum())
    if drawn.window.bounds is not None:
        lines.append(f"{pairs:,} query-key pairs.")
    elif full:
        kind = "full causal attention" if drawn.window.causal else "full attention"
        lines.append(f"{pairs:,} of {full:,} query-key pairs: {1 - pairs / full:.0%} less than {kind}.")
    if page_size is not None:
        held = drawn.pages_held(page_size)[-1].tolist()
        needed, count = sum(held), len(held)
        rest = "" if needed == count else f"; {count - needed} can be freed"
        lines.append(f"After it {needed} of {count} pages are still needed{rest}.")
    return lines


def _key_axis(columns: int, step: int) -> str:
    """Key positions above their cells, as many as have room."""
    wide = len(GLYPHS[Cell.WINDOW])
    every = stride_for(len(str(columns - 1)) + 1, wide)  # cells that a label and a space take
    return "".join(f"{key:<{wide * every}}" for key in range(0, columns, step * every))


def _page_bars(drawn: Picture, page_size: int, held: str, freed: str) -> str:
    left = drawn.cells.shape[1]
    bars = []
    for kept in drawn.pages_held(page_size)[-1].tolist():
        width = 2 * min(page_size, left) - 1
        bars.append((held if kept else freed) * width)
        left -= page_size
    return " ".join(bars)
