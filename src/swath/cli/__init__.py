"""The command line, ``swath``: doctor, explain, show, demo, bench. It needs the packages of the extra ``bench``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swath.cli.commands import app
else:

    def __getattr__(name: str) -> object:
        """``app``, imported when it is asked for: the other modules here need not have typer."""
        if name != "app":
            raise AttributeError(f"module 'swath.cli' has no attribute {name!r}")
        from swath.cli.commands import app

        return app


__all__ = ["app", "main"]


def main() -> None:
    """Run the command line: the entry point ``swath``."""
    absent = [package for package in ("typer", "rich") if find_spec(package) is None]
    if absent:
        print(f"swath: the command line needs {' and '.join(absent)}: pip install 'swath[bench]'", file=sys.stderr)
        raise SystemExit(1)
    from swath.cli.commands import app

    app(prog_name="swath")
