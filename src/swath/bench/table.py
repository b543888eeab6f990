"""Benchmark rows on a terminal, with progress while they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def show(rows: Iterator[dict[str, Any]], total: int) -> None:
    """Print the machine, then a table of the cases; ``rows`` is consumed as it is measured."""
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        machine = next(rows)
        measured = []
        for row in rows:
            measured.append(row)
            progress.update(task, advance=1, description=row["case"])
    console.print(
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}: "
        f"reads {machine['read_tb_per_s']:.2f} TB/s, multiplies {machine['matmul_tflop_per_s']:.0f} TFLOP/s"
    )
    console.print(_table(measured))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("case")
    for name in ("us", "x floor", "TFLOP/s", "TB/s", "eager us", "host us", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        if "refused" in row:
            table.add_row(row["case"], "refused: " + row["refused"])
            continue
        eager = [f"{row[name]:.1f}" if name in row else "" for name in ("eager_us", "host_us")]
        figures = [f"{row['us']:.1f}", f"{row['x_floor']:.2f}", f"{row['tflop_per_s']:.0f}", f"{row['tb_per_s']:.2f}"]
        table.add_row(row["case"], *figures, *eager, f"{row['error']:.1e}")
    return table
