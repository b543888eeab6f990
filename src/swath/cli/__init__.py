"""The command line, ``swath``: doctor, explain, show, demo, bench. It needs the packages of the extra ``bench``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_ABSENT = [package for package in ("typer", "rich") if find_spec(package) is None]
if not _ABSENT:
    from swath.cli.commands import app as app


def main() -> None:
    """Run the command line: the entry point ``swath``."""
    if _ABSENT:
        print(f"swath: the command line needs {' and '.join(_ABSENT)}: pip install 'swath[bench]'", file=sys.stderr)
        raise SystemExit(1)
    app(prog_name="swath")
