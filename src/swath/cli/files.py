"""Files that are replaced whole: a reader sees the old ones or the new ones, and a failure leaves the old ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def write_all(files: Mapping[Path, bytes | str]) -> None:
    """Write every file beside its place, and only then put all in their places.

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
    """What goes wrong with the file beside ``path`` is said of ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
