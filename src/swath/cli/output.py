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
def one_line_errors(kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)) -> Iterator[None]:
    """Turn an error that is the user's into one line and exit code 2.

    By default these are ValueError and TypeError, by which the library says that an argument is wrong, and OSError.
    """
    try:
        yield
    except kinds as error:
        raise fail(" ".join(in_words(error).split())) from error


def in_words(error: Exception) -> str:
    """What an error says; of a file, which one it was and what is wrong with it."""
    if isinstance(error, FileExistsError):  # where a folder was to be made
        return f"{error.filename}: is no folder"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_rows(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Indented lines of a name and a text, the texts below one another and wrapped."""
    for name, text in rows:
        first = f"  {name:<{NAME_WIDTH}}  "
        lines = textwrap.wrap(text, max(out.width, 40), initial_indent=first, subsequent_indent=" " * len(first))
        out.print("\n".join(lines), markup=False, soft_wrap=True)
