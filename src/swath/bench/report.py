"""docs/benchmarks.md, and the plot in README.md, from stored results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from swath.bench.judge import by_case, outcomes, sides, verdict
from swath.bench.results import Row, Timed, conditions, timed
from swath.bench.units import in_words
from swath.errors import bad_value

BEGIN, END = "<!-- bench plot: begin -->", "<!-- bench plot: end -->"
PAGE, README, IMAGES = Path("docs/benchmarks.md"), Path("README.md"), Path("docs/img")
PLOTS = {
    "floor-decode": "Decode: time over the floor, by case and provider",
    "floor-prefill": "Prefill: time over the floor, by case and provider",
    "context-decode": "Decode: time against the context",
    "context-prefill": "Prefill: time against the context",
    "window-decode": "Decode: time against the window",
    "window-prefill": "Prefill: time against the window",
    "cache": "What a cache must hold, against the context",
}
"""Names of plot.py's files and what they show."""

INTRODUCTION = """\
# Benchmarks

Written by `swath bench report` from the files in [benchmarks/results](../benchmarks/results), which hold every figure.
[benchmarks/README.md](../benchmarks/README.md) tells the method. Times are medians in us, with the time over the floor
behind an x: the floor is what the bytes that must move and the arithmetic that must be done take at the ceilings of the
same run. A ratio above 1 says that swath is faster than the best peer; differences up to 1 % (decode) or 3 % (prefill)
are ties. A result outside its error budget has no time.
"""
TITLES = {"decode": "Decode", "steps": "N-step decode", "prefill": "Prefill", "mixed": "Mixed batches"}


def page(files: dict[str, list[Row]], images: Iterable[str]) -> str:
    """The page of result files, the newest first; ``images`` are the names of the plots that exist."""
    drawn = set(images)
    plots = [f"![{text}](img/bench-{name}.png)\n" for name, text in PLOTS.items() if f"bench-{name}.png" in drawn]
    newest_first = sorted(files.items(), key=lambda item: (date_of(item[1]), len(item[1]), item[0]), reverse=True)
    sections = [_section(name, rows) for name, rows in newest_first]
    return "\n".join([INTRODUCTION, *plots, *sections])


def date_of(rows: list[Row]) -> str:
    """The last day of a file."""
    return max(row.origin.date for row in rows)


def fullest(files: Iterable[list[Row]]) -> list[Row]:
    """The file that plots show: the one with the most rows, of two with as many the newer."""
    return max(files, key=lambda rows: (len(rows), date_of(rows)))


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
    return "" if row is None else f"{row.provider.removeprefix('swath-')} {in_words(row.us)} x{row.x_floor:.2f}"


def _commands(rows: list[Row]) -> list[str]:
    """The commands that gave these rows."""
    return list(dict.fromkeys(row.origin.command for row in rows))


def with_plot(readme: str, rows: list[Row], images: Iterable[str]) -> str:
    """README.md with the plots of time over the floor, and their conditions, between the two marks.

    Raises:
        ValueError: the marks are missing.
    """
    if BEGIN not in readme or END not in readme:
        raise bad_value("readme", f"a text with {BEGIN} and {END}", "one without")
    drawn = set(images)
    shown = [name for name in ("floor-decode", "floor-prefill") if f"bench-{name}.png" in drawn]
    pictures = [f'<img src="docs/img/bench-{name}.png" width="640" alt="{PLOTS[name]}.">\n' for name in shown]
    commands = _commands(rows)
    by = f"Drawn from `{commands[0]}`. [All figures](docs/benchmarks.md)"
    if len(commands) > 1:
        by = "[All figures, and the commands that give them](docs/benchmarks.md)"
    said = f"<sub>{conditions(rows)}. {by}.</sub>\n"
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return "\n".join([f"{before}{BEGIN}\n", *pictures, said, f"{END}{after}"])
