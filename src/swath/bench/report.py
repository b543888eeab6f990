"""docs/benchmarks.md, and the plot in README.md, from stored results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from swath.bench.cases import shape_in_bits
from swath.bench.judge import SPREAD, by_case, outcomes, sides, verdict
from swath.bench.key import IN_SHORT, KEY
from swath.bench.results import Row, Timed, conditions, date_of, timed
from swath.bench.serving.table import markdown
from swath.bench.units import in_words
from swath.cli.files import between

MARKS = "bench plot"
PAGE, README, IMAGES = Path("docs/benchmarks.md"), Path("README.md"), Path("docs/img")
PLOTS = {
    "floor-decode": "Decode: time over the floor, by case and provider",
    "floor-prefill": "Prefill: time over the floor, by case and provider",
    "context-decode": "Decode: time against the context",
    "context-prefill": "Prefill: time against the context",
    "window-decode": "Decode: time against the window",
    "window-prefill": "Prefill: time against the window",
    "error-decode": "Decode: time against error, in 16 and 8 bits",
    "error-prefill": "Prefill: time against error, in 16 and 8 bits",
    "cache": "What a cache must hold, against the context",
}
"""Names of plot.py's files and what they show."""

INTRODUCTION = """\
# Benchmarks

Written by `swath bench report` from the files in [benchmarks/results](../benchmarks/results), which hold every figure.
[benchmarks/README.md](../benchmarks/README.md) tells the method. Times are medians, with the time over the floor behind
an x: the floor is what the bytes that must move and the arithmetic that must be done take at the ceilings of the same
run. A ratio above 1 says that swath is faster than the best peer; differences up to 1 % (decode) or 3 % (prefill) are
ties. A result outside its error budget has no time, and rounds that spread by more than 20 % are marked. Cases in
8 bits show the largest relative error of some rows, to float64 of the stored values, beside the time. Their floor is
that of products in 16 bits. `fa3-fp8` is held to the budget of a p with 3 mantissa bits, and of what sums of e4m3
products lose over 1,280 keys: where they lose more, it is refused.
"""
TITLES = {"decode": "Decode", "steps": "N-step decode", "prefill": "Prefill", "mixed": "Mixed batches"}


def page(files: dict[str, list[Row]], images: Iterable[str]) -> str:
    """The page of result files, the newest first; ``images`` are the names of the plots that exist."""
    drawn = set(images)
    plots = [f"![{text}](img/bench-{name}.png)\n" for name, text in PLOTS.items() if f"bench-{name}.png" in drawn]
    newest_first = sorted(files.items(), key=lambda item: (date_of(item[1]), len(item[1]), item[0]), reverse=True)
    sections = [_section(name, rows) for name, rows in newest_first]
    return "\n".join([INTRODUCTION, *plots, *_key(), *sections])


def _key() -> list[str]:
    lines = [f"| {part} | {meaning} |" for part, meaning in KEY.items()]
    return ["## How cases are named\n", "| in a name | stands for |", "| --- | --- |", *lines, ""]


def _section(name: str, rows: list[Row]) -> str:
    date = date_of(rows)
    about = name.removesuffix(".jsonl").split(date)[-1].strip("-").replace("-", " ")
    text = [
        f"## {rows[0].origin.machine}, {date}{about and ': ' + about}\n",
        f"[{name}](../benchmarks/results/{name}): {conditions(rows)}.\n",
    ]
    for op, title in TITLES.items():
        mine = [row for row in rows if row.op == op]
        if mine:
            text += [f"### {title}\n", *_table(mine), "", "```text", *_commands(mine), "```", ""]
    served = [row for row in rows if row.op == "serve"]
    if served:
        text += ["### Served models\n", *markdown(served), "", "```text", *_commands(served), "```", ""]
    found = outcomes(rows)
    if found:
        text += ["### Ratios\n", "| case against case | ratio | wanted at most |", "| --- | --- | --- |"]
        text += [f"| {o.goal.name} | {o.ratio:.3g} | {o.goal.most:.3g} |" for o in found]
        text.append("")
    return "\n".join(text)


def _table(rows: list[Row]) -> list[str]:
    lines = ["| case | floor | swath | best peer | ratio and goals | others |", "| --- | --- | --- | --- | --- | --- |"]
    for name, found in by_case(rows).items():
        ours, peer = sides(found)
        shown = [row for row in (ours, peer) if row is not None]
        floor = f"{in_words(shown[0].floor_us)}, {shown[0].bound}" if shown else ""
        rest = [_cell(row) for row in timed(found) if row not in shown]
        rest += [f"{row.provider}: {row.status}" for row in found if row.status in ("refused", "failed")]
        cells = (name, floor, _cell(ours), _cell(peer), verdict(found), "; ".join(rest))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(row: Timed | None) -> str:
    if row is None:
        return ""
    spread = f" (rounds spread by {row.spread:.0%})" if row.spread > SPREAD else ""
    said = f"{row.provider.removeprefix('swath-')} {in_words(row.us)} x{row.x_floor:.2f}{spread}"
    return said if row.error is None or shape_in_bits(row.case) is None else f"{said}, error {row.error:.1e}"


def _commands(rows: list[Row]) -> list[str]:
    """The commands that gave these rows."""
    return list(dict.fromkeys(row.origin.command for row in rows))


def with_plot(readme: str, rows: list[Row], images: Iterable[str]) -> str:
    """README.md with the plots of time over the floor, and their conditions, between their marks.

    Raises:
        ValueError: the marks are missing.
    """
    drawn = set(images)
    shown = [name for name in ("floor-decode", "floor-prefill") if f"bench-{name}.png" in drawn]
    pictures = [f'<img src="docs/img/bench-{name}.png" width="420" alt="{PLOTS[name]}.">' for name in shown]
    commands = _commands(rows)
    by = f"Drawn from `{commands[0]}`. [All figures](docs/benchmarks.md)"
    if len(commands) > 1:
        by = "[All figures, and the commands that give them](docs/benchmarks.md)"
    said = f"<sub>{IN_SHORT} {conditions(rows)}. {by}.</sub>"
    return between(readme, MARKS, "\n".join(["", *pictures, "", said, ""]))
