"""``swath bench``: check, time and compare attention on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swath.cli.bench_results import compare, plot, report
from swath.cli.bench_serve import serve
from swath.cli.bench_tune import tune
from swath.cli.flags import Command, Group
from swath.cli.options import Json, Match, Op, Tag
from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from swath.bench.case import BenchCase
    from swath.bench.providers import Provider
    from swath.bench.results import Origin

app = typer.Typer(cls=Group, help="Measure swath and its peers on this machine.", no_args_is_help=True)

BOOKKEEPING = ("--output", "--resume", "--budget", "--commit")
"""Options that change no row."""
ROUNDS, QUICK_ROUNDS, QUICK_SECONDS = 7, 3, 50.0

Device = Annotated[
    Literal["cuda", "cpu"] | None,
    typer.Option(metavar="NAME", show_default="cuda where it works", help="Where to run: cuda or cpu."),
]


@app.command("list", cls=Command)
def list_cases(match: Match = None, op: Op = None, tag: Tag = None, as_json: Json = False) -> None:
    """Say which cases there are, their shapes and tags, how to read their names, and which libraries are here."""
    from rich.table import Table

    from swath.bench.cases import select
    from swath.bench.key import KEY
    from swath.bench.providers import PROVIDERS

    with one_line_errors():
        cases = select(tuple(match or ()), op, tuple(tag or ()))
    missing = {name: provider.missing(_device(None)) for name, provider in PROVIDERS.items()}
    if as_json:
        listed = [{"name": case.name, "op": case.op, "tags": case.tags, "shape": case.shape} for case in cases]
        here = [{"name": name, "version": PROVIDERS[name].version, "missing": missing[name]} for name in PROVIDERS]
        typer.echo(json.dumps({"cases": listed, "providers": here, "key": KEY}, indent=2))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("case", "kind", "tags", "shape"):
        table.add_column(name)
    for case in cases:
        table.add_row(case.name, case.op, " ".join(case.tags), case.shape)
    out = console()
    out.print(table)
    out.print()
    key = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("in a name", "stands for"):
        key.add_column(name)
    for part, meaning in KEY.items():
        key.add_row(part, meaning)
    out.print(key)
    out.print()
    installed = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("provider", "here"):
        installed.add_column(name)
    for name, reason in missing.items():
        installed.add_row(name, PROVIDERS[name].version or "yes" if reason is None else f"no: {reason}")
    out.print(installed)


@app.command(cls=Command)
def run(
    match: Match = None,
    op: Op = None,
    tag: Tag = None,
    provider: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these: swath, fa3, scalar ... (see: list).")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Leave these out.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default="7, quick 3", help="Interleaved rounds.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases and rounds: under a minute.")] = False,
    budget: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Begin no case that may not end within this.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="swath-bench.jsonl", help="Append here.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Append here, without the cases it has.")] = None,
    device: Device = None,
    commit: Annotated[
        str | None, typer.Option(metavar="NAME", envvar="SWATH_COMMIT", help="The commit, where git does not tell.")
    ] = None,
) -> None:
    """Check each case against float64, then time swath and its peers in interleaved rounds.

    Ctrl-C at any time: the cases measured so far are in the file, and --resume goes on.
    """
    if output is not None and resume is not None:
        raise fail("--output and --resume both name the file to append to: give one")
    where = _device(device)
    path = resume or output or Path("swath-bench.jsonl")
    out = console()
    if where.type == "cpu":
        out.print("torch sees no GPU: the cases tagged cpu, on the CPU" if device is None else "on the CPU")
    origin = _origin(where, commit)
    with one_line_errors():
        tags = (*(tag or ()), *(("quick",) if quick else ()))
        todo = _cases(match, op, tags, where)
        present = _present(provider, without, where, quick, out)
        todo = _unfinished(todo, path, origin) if resume is not None else todo
        _check_output(path)
    from swath.cli.bench_session import Session

    limit = QUICK_SECONDS if quick and budget is None else budget
    session = Session(path, origin, limit, len(todo))
    session.measure(todo, present, where, rounds or (QUICK_ROUNDS if quick else ROUNDS))


def _origin(device: torch.device, commit: str | None) -> Origin:
    from swath.bench.machine import describe

    return describe(device, commit, command_of(sys.argv[1:]))


def command_of(arguments: list[str]) -> str:
    """The command that draws the same rows: without where they went, how long it might take, and the commit's name."""
    kept, skip = ["swath"], False
    for argument in arguments:
        name, is_whole, _ = argument.partition("=")
        if not skip and name not in BOOKKEEPING:
            kept.append(argument)
        skip = not skip and name in BOOKKEEPING and not is_whole
    return shlex.join(kept)


def _cases(
    match: list[str] | None, op: str | None, tags: tuple[str, ...], device: torch.device
) -> tuple[BenchCase, ...]:
    from swath.bench.cases import select

    return select(tuple(match or ()), op, tags, on_gpu=device.type == "cuda")


def _unfinished(cases: tuple[BenchCase, ...], path: Path, origin: Origin) -> tuple[BenchCase, ...]:
    from swath.bench.results import done

    finished = done(path, origin)
    return tuple(case for case in cases if case.name not in finished)


def _check_output(path: Path) -> None:
    """That rows can be appended, before anything is measured: it is a file of results, or none yet."""
    from swath.bench.results import append, read

    if path.exists():
        read(path)
    append(path, ())


def _present(
    names: list[str] | None, without: list[str] | None, device: torch.device, quick: bool, out: Console
) -> tuple[Provider, ...]:
    """The providers asked for that can run here; says which cannot and why."""
    from swath.bench.providers import choose
    from swath.errors import bad_value

    left_out = choose(tuple(without)) if without else ()
    present = []
    for provider in choose(tuple(names or ())):
        reason = provider.missing(device)
        if reason is None and quick and provider.builds and not names:
            reason = f"it compiles for long (--provider {provider.name} takes it in)"
        if reason is not None:
            out.print(f"without {provider.name}: {reason}", style="dim")
        elif provider not in left_out:
            present.append(provider)
    if not present:
        raise bad_value("provider", "one that can run here", ", ".join(names or ()) or "none")
    return tuple(present)


def _device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise fail("--device cuda needs a GPU that torch can use; torch.cuda.is_available() is False")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


for command in (serve, compare, plot, report, tune):  # the order of ``swath bench --help``, after list and run
    app.command(cls=Command)(command)
