"""``swath bench compare``, ``plot`` and ``report``: what stored results say."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swath.cli.files import marks, write_all
from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    from swath.bench.results import Row

RESULTS = Path("benchmarks/results")

Files = Annotated[list[Path] | None, typer.Argument(metavar="FILE", show_default="all in benchmarks/results")]


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Results.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Later ones.")],
    threshold: Annotated[
        float, typer.Option(min=0, metavar="SHARE", help="A loss of ours beyond this share of the time fails.")
    ] = 0.05,
) -> None:
    """Show gains and losses from one result file to another; exit with 1 where a backend of ours lost too much."""
    from rich.table import Table

    from swath.bench.compare import changes
    from swath.bench.results import read
    from swath.bench.units import in_words

    with one_line_errors():
        found = changes(read(before), read(after))
    if not found:
        raise fail(f"{before} and {after} have no case and provider in common")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("case")
    table.add_column("provider")
    for name in ("before", "after", "ratio", ""):
        table.add_column(name, justify="right")
    for change in found:
        style = "red" if change.loses(threshold) else {"faster": "green", "same": "dim"}.get(change.verdict)
        now = "" if change.after_us is None else in_words(change.after_us)
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        figures = (in_words(change.before_us), now, ratio, change.verdict)
        table.add_row(change.case, change.provider, *figures, style=style)
    console().print(table)
    lost = [change for change in found if change.loses(threshold)]
    if lost:
        typer.echo(f"swath: {len(lost)} of {len(found)} lost more than {threshold:.0%}, or have no time now", err=True)
        raise typer.Exit(1)


def plot(
    files: Files = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the plots go.")] = Path("swath-bench"),
) -> None:
    """Draw stored results as PNG and SVG: x of the floor, time against context and window, cache bytes."""
    with one_line_errors():
        drawn = _draw([[row for found in _results(files).values() for row in found]])
        output.mkdir(parents=True, exist_ok=True)
        write_all({output / name: data for name, data in drawn.items()})
    for name in drawn:
        typer.echo(output / name)


def report(files: Files = None) -> None:
    """Write docs/benchmarks.md and its plots, and what README.md and docs/engines.md show, from a checkout's results.

    Nothing is written before everything is made; plots that are drawn no more are removed at the end.
    """
    from swath.bench import readme
    from swath.bench.report import IMAGES, PAGE, README, page, with_plot
    from swath.bench.serving import page as engines

    if not README.exists() or not PAGE.parent.is_dir():
        raise fail("report writes into a checkout: run it where README.md and docs/ are")
    with one_line_errors():
        found = _results(files)
        runs = readme.in_order(found.values())
        drawn = _draw(runs)
        text = with_plot(README.read_text(encoding="utf-8"), runs[0], drawn)
        if marks(readme.MARKS)[0] in text:
            text = readme.with_table(text, runs[0], next(name for name, rows in found.items() if rows is runs[0]))
        written: dict[Path, bytes | str] = {IMAGES / name: data for name, data in drawn.items()}
        if engines.PAGE.exists():
            written[engines.PAGE] = engines.with_table(engines.PAGE.read_text(encoding="utf-8"), found)
        IMAGES.mkdir(exist_ok=True)
        write_all(written | {PAGE: page(found, drawn), README: text})
        for old in IMAGES.glob("bench-*"):
            if old.name not in drawn:
                old.unlink()
    typer.echo(f"written: {PAGE}, {README}, {len(drawn)} plots in {IMAGES}")


def _draw(runs: list[list[Row]]) -> dict[str, bytes]:
    if find_spec("matplotlib") is None:
        raise fail("plots need matplotlib: pip install 'swath[bench]'")
    from swath.bench.plot import draw_all

    drawn = draw_all(runs)
    if not drawn:
        raise fail("no measured case there to draw")
    return drawn


def _results(files: list[Path] | None) -> dict[str, list[Row]]:
    """Rows by the name of their file."""
    from swath.bench.results import read

    paths = files or sorted(RESULTS.glob("*.jsonl"))
    if not paths:
        raise fail(f"no results: name a file, or run it where {RESULTS} is")
    found = {path.name: read(path) for path in paths}
    if len(found) < len(paths):
        raise fail("two of the files have the same name, by which the report would tell them apart")
    empty = [name for name, rows in found.items() if not rows]
    if empty:
        raise fail(f"no rows in {', '.join(empty)}")
    return found
