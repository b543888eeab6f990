"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

import swath
from swath.cli import bench
from swath.cli.demo import demo
from swath.cli.doctor import doctor
from swath.cli.explain import explain
from swath.cli.flags import Command, Group
from swath.cli.show import show

app = typer.Typer(
    cls=Group,
    name="swath",
    help="Sliding-window attention over a paged, optionally quantised key/value cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (doctor, explain, show, demo):
    app.command(cls=Command)(command)

app.add_typer(bench.app, name="bench")


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
