"""A benchmark run at the terminal: its progress, its file, its limit of time, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    import torch

    from swath.bench.case import BenchCase
    from swath.bench.providers import Provider
    from swath.bench.results import Origin, Row


class Session:
    """A run's progress, its file, and how it ends."""

    def __init__(self, path: Path, origin: Origin, budget: float | None, total: int) -> None:
        self.path, self.origin, self.budget, self.total = path, origin, budget, total
        self.began = time.monotonic()
        self.slowest = 0.0
        self.kept = 0
        self.rows: list[Row] = []
        self.out = console()

    def measure(
        self, cases: tuple[BenchCase, ...], providers: tuple[Provider, ...], device: torch.device, rounds: int
    ) -> None:
        """Measure until the cases, the time or the patience end."""
        from swath.bench.clock import CpuClock, GpuClock
        from swath.bench.judge import is_ours
        from swath.bench.run import BrokenDeviceError, measure_case, release

        clock = GpuClock() if device.type == "cuda" else CpuClock()
        try:
            with self._progress() as tell:
                for case in cases:
                    if self._out_of_time():
                        break
                    begin = time.monotonic()
                    rows = measure_case(case, providers, clock, rounds, tell, self.origin)
                    release(clock.device)
                    self._keep(rows)
                    self.slowest = max(self.slowest, time.monotonic() - begin)
        except KeyboardInterrupt:
            typer.echo(f"\nswath: interrupted; {self._said()}", err=True)
            raise typer.Exit(130) from None
        except BrokenDeviceError as error:
            raise fail(f"{error}: --without leaves a provider out; {self._said()}") from error
        self._print_goals()
        typer.echo(self._said())
        bad = [row for row in self.rows if row.status in ("refused", "failed") and is_ours(row.provider)]
        if bad:
            said = "; ".join(f"{row.provider} on {row.case!r}, {row.reason}" for row in bad)
            raise fail(f"swath itself was refused or failed: {said}")

    def _out_of_time(self) -> bool:
        return self.budget is not None and time.monotonic() - self.began + self.slowest > self.budget

    def _keep(self, rows: list[Row]) -> None:
        from swath.bench.judge import verdict
        from swath.bench.results import append
        from swath.bench.table import case_table, ceilings, title, unsteady, untimed

        with one_line_errors((OSError,)):
            append(self.path, rows)
        self.kept += 1
        self.rows += rows
        self.out.print(title(rows[0]))
        self.out.print(case_table(rows))
        for line in (*filter(None, (ceilings(rows),)), *untimed(rows)):
            self.out.print(f"  {line}", style="dim", markup=False)
        for line in unsteady(rows):
            self.out.print(f"  {line}", style="yellow", markup=False)
        said = verdict(rows)
        self.out.print(f"  {said}\n" if said else "", markup=False)

    def _print_goals(self) -> None:
        """The ratios that this run can tell."""
        from swath.bench.judge import outcomes

        for found in outcomes(self.rows):
            style = "green" if found.reached else "red"
            said = f"{found.goal.name}: {found.ratio:.3g}, wanted at most {found.goal.most:.3g}"
            self.out.print(said, style=style, markup=False)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.out, transient=True) as progress:
            bar = progress.add_task("", total=self.total)
            yield lambda text: progress.update(bar, description=text, completed=self.kept)

    def _said(self) -> str:
        left = self.total - self.kept
        rest = f"; {left} left, go on with: swath bench run --resume {self.path}" if left else ""
        return f"{self.kept} case{'s' * (self.kept != 1)} written to {self.path}{rest}"
