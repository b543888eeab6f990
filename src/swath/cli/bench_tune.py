"""``swath bench tune``: search rows for the tables of launches on this GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swath.cli.options import Match, Op, Tag
from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from swath.bench.tune import Search

Schedule = Annotated[
    Literal["splits", "tiles", "hopper"] | None,
    typer.Option(metavar="NAME", show_default="what the case uses", help="Whose rows: splits, tiles or hopper."),
]


def tune(
    match: Match = None,
    op: Op = None,
    tag: Tag = None,
    schedule: Schedule = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Interleaved rounds.")] = 3,
) -> None:
    """Search launch rows around the present ones on this GPU, and print lines to paste.

    They belong into nvidia.py or amd.py of backends/triton/heuristics, those of tiles on Hopper into
    backends/hopper/heuristics.py.

    Rows that differ in up to two fields are checked and timed as by run; those that cannot be launched say why.
    """
    import torch

    from swath.target import has_triton

    if not (torch.cuda.is_available() and has_triton()):
        raise fail("tune needs a GPU that torch can use, and Triton")
    from swath.bench.cases import select
    from swath.bench.clock import GpuClock
    from swath.bench.machine import describe
    from swath.bench.run import BrokenDeviceError, release
    from swath.bench.tune import search_case

    with one_line_errors():
        cases = select(tuple(match or ()), op, tuple(tag or ()), on_gpu=True)
    clock, out = GpuClock(), console()
    origin = describe(clock.device, None, "swath bench tune")
    for case in cases:
        try:
            with out.status(case.name) as status:
                for found in search_case(case, schedule, origin, clock, rounds, status.update):
                    show(out, found)
        except NotImplementedError as error:
            out.print(f"{case.name}: {error}\n", style="dim", markup=False)
        except BrokenDeviceError as error:
            raise fail(str(error)) from error
        release(clock.device)


def show(out: Console, found: Search) -> None:
    """The rows of a search, the fastest first, those without a time and why, and the line to paste."""
    from swath.bench.table import title, tuning_table, untimed

    out.print(title(found.rows[0]))
    out.print(tuning_table(found.rows))
    for line in untimed(found.rows):
        out.print(f"  {line}", style="dim", markup=False)
    out.print(f"  {found.schedule}: {found.verdict()}", markup=False)
    fastest = found.fastest()
    if fastest is not None:
        candidate, row = fastest
        out.print(f"  {row.launch}", style="dim", markup=False, soft_wrap=True)
        out.print(f"    {candidate.line}\n", markup=False, soft_wrap=True)
