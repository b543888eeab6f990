"""Files that are replaced whole, and parts of a page between marks.

A reader sees the old files or the new ones, and a failure leaves the old ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from swath.errors import bad_value


def write_all(files: Mapping[Path, bytes | str]) -> None:
    """Write every file next to its place, and only then put all in their places.

    Raises:
        OSError: naming the file that cannot be written.
    """
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, data in files.items():
            with _naming(path):
                aside[path].write_bytes(data if isinstance(data, bytes) else data.encode())
        for path, scratch in aside.items():
            with _naming(path):
                scratch.replace(path)
    finally:
        for scratch in aside.values():
            with suppress(OSError):  # it was never made, or what went wrong is on its way up
                scratch.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about the file next to ``path`` name ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def between(page: str, name: str, block: str) -> str:
    """A page with ``block`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: the marks are not there once, one after the other.
    """
    begin, end = marks(name)
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found or begin in rest or end in before + after:
        raise bad_value("readme", f"a text with {begin} and {end}", "one without, or with more than one of them")
    return f"{before}{begin}\n{block}\n{end}{after}"


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a part of a page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
