"""The commands put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import swath
from swath.cli.demo import demo
from swath.cli.doctor import doctor
from swath.cli.explain import explain
from swath.cli.output import fail
from swath.cli.show import show

app = typer.Typer(
    name="swath",
    help="Sliding-window attention over a paged, optionally quantised key/value cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor)
app.command()(explain)
app.command()(show)
app.command()(demo)

bench = typer.Typer(help="Measure swath on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swath {swath.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@bench.command("cpu")
def bench_cpu() -> None:
    """Time the cpu backend against torch's own attention."""
    from swath.bench import cpu  # here, because no other command needs it

    cpu.main()


@bench.command("gpu")
def bench_gpu(
    match: Annotated[str, typer.Option(metavar="TEXT", help="Only cases whose name contains this.")] = "",
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines, appended.")] = Path("swath-bench.jsonl"),
) -> None:
    """Check, then time the GPU backend on serving shapes, beside the floor of each."""
    import torch

    if not torch.cuda.is_available():
        raise fail("bench gpu needs a GPU that torch can use; torch.cuda.is_available() is False")
    from swath.bench import cases, gpu, table

    chosen = tuple(case for case in cases.CASES if match in case.name)
    if not chosen:
        raise fail(f"no case contains {match!r}; there are: {', '.join(case.name for case in cases.CASES)}")
    table.show(gpu.write(gpu.measure(chosen), output), len(chosen))
    typer.echo(f"written to {output}")
