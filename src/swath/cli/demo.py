"""``swath demo``: a language model generates text, and is judged on text, through swath's paged cache."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    from swath.demo.run import Demo

PROMPT = "Explain to a child why the sky is blue."
PACKAGES = ("transformers", "matplotlib")

Tokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", show_default="192, quick 64", help="Longest answer, in tokens.")
]
Stored = Annotated[
    Literal["int8", "fp8", "none"],
    typer.Option(metavar="TYPE", help="What the quantised cache stores: int8 or fp8; none: measure without one."),
]
ModelDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", show_default="SmolLM2-135M-Instruct", help="A Hugging Face model."),
]
TextFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default="Python's help", help="Judge on this text."),
]


def demo(
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model is asked.")] = PROMPT,
    max_new_tokens: Tokens = None,
    window: Annotated[int, typer.Option(min=1, metavar="N", help="Keys in the window.")] = 128,
    global_tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Leading tokens that stay visible.")] = 4,
    kv: Stored = "int8",
    model: ModelDir = None,
    text: TextFile = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="cuda, else cpu", help="Where to run.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens and rows: about a minute on two cores.")] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where files go.")] = Path("swath-demo"),
) -> None:
    """Run a language model on swath: generate text, then compare windows and caches in quality, memory and speed.

    Ctrl-C at any time; the rows measured so far are on disk.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise fail(f"the demo needs {' and '.join(missing)}: pip install 'swath[demo]'")
    running = None
    try:
        with one_line_errors():
            from swath.demo.run import Demo
            from swath.demo.settings import FULL, QUICK, Settings, pick_device

            settings = Settings(
                output=output,
                device=pick_device(device),
                prompt=prompt,
                max_new_tokens=max_new_tokens or (64 if quick else 192),
                window=window,
                global_tokens=global_tokens,
                kv=kv,
                model=model,
                text=text,
                quick=quick,
                budget=QUICK if quick else FULL,
            )
            running = Demo(settings, console())
            running.run()
    except KeyboardInterrupt:
        typer.echo(f"\nswath: interrupted; {_kept(running, output)}", err=True)
        raise typer.Exit(130) from None


def _kept(running: Demo | None, output: Path) -> str:
    """What an interrupted run leaves."""
    report = None if running is None else running.report
    rows = 0 if report is None else len(report.rows)
    return f"{rows} row{'s' * (rows > 1)} kept in {output / 'demo.json'}" if rows else "no row was measured yet"
