"""``swath bench compare``, ``plot`` and ``report``: what stored results say."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    from swath.bench.results import Row

RESULTS = Path("benchmarks/results")

Files = Annotated[
    list[Path] | None,
    typer.Argument(metavar="FILE", exists=True, dir_okay=False, show_default="all in benchmarks/results"),
]


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", exists=True, dir_okay=False)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", exists=True, dir_okay=False)],
    threshold: Annotated[
        float, typer.Option(min=0, metavar="SHARE", help="A loss of ours beyond this share of the time fails.")
    ] = 0.05,
) -> None:
    """Show gains and losses from one result file to another; exit with 1 where a backend of ours lost too much."""
    from rich.table import Table

    from swath.bench.compare import changes
    from swath.bench.units import in_words

    with one_line_errors():
        found = changes(_read(before), _read(after))
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
    output: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where the plots go.")] = Path(
        "swath-bench"
    ),
) -> None:
    """Draw stored results as PNG and SVG: x of the floor, time against context and window, cache bytes."""
    with one_line_errors():
        rows = [row for found in _results(files).values() for row in found]
    for path in _draw(rows, output):
        typer.echo(path)


def report(files: Files = None) -> None:
    """Write docs/benchmarks.md, its plots and the plot in README.md from stored results, in a checkout."""
    from swath.bench.report import IMAGES, PAGE, README, fullest, page, with_plot

    if not README.exists() or not PAGE.parent.is_dir():
        raise fail("report writes into a checkout: run it where README.md and docs/ are")
    with one_line_errors():
        found = _results(files)
        shown = fullest(found.values())
        for old in IMAGES.glob("bench-*"):
            old.unlink()
        images = [path.name for path in _draw(shown, IMAGES)]
        readme = with_plot(README.read_text(encoding="utf-8"), shown, images)
    PAGE.write_text(page(found, images), encoding="utf-8")
    README.write_text(readme, encoding="utf-8")
    typer.echo(f"written: {PAGE}, {README}, {len(images)} plots in {IMAGES}")


def _draw(rows: list[Row], folder: Path) -> list[Path]:
    if find_spec("matplotlib") is None:
        raise fail("plots need matplotlib: pip install 'swath[bench]'")
    from swath.bench.plot import save_all

    paths = save_all(rows, folder)
    if not paths:
        raise fail("no measured case there to draw")
    return paths


def _results(files: list[Path] | None) -> dict[str, list[Row]]:
    """Rows by the name of their file."""
    paths = files or sorted(RESULTS.glob("*.jsonl"))
    found = {path.name: rows for path in paths if (rows := _read(path))}
    if not found:
        raise fail(f"no results: name a file, or run it where {RESULTS} is")
    return found


def _read(path: Path) -> list[Row]:
    from swath.bench.results import read

    return read(path)
