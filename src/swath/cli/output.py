"""What the commands share: where text goes, and how an error looks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

NAME_WIDTH = 15


def console() -> Console:
    """Standard output, without colours that are guessed from the text."""
    return Console(highlight=False, emoji=False)


def fail(message: str) -> typer.Exit:
    """One line on standard error; raise what comes back, which exits with 2."""
    typer.echo(f"swath: {message}", err=True)
    return typer.Exit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the library says about an argument (ValueError, TypeError) into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise fail(str(error)) from error


def print_rows(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Indented lines of a name and a text, the texts below one another and wrapped."""
    for name, text in rows:
        first = f"  {name:<{NAME_WIDTH}}  "
        lines = textwrap.wrap(text, max(out.width, 40), initial_indent=first, subsequent_indent=" " * len(first))
        out.print("\n".join(lines), markup=False, soft_wrap=True)
