"""The command line, called from tests."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from swath.cli import app

PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": None, "TERM": "dumb", "GITHUB_ACTIONS": None}


def invoke(*args: object, code: int = 0) -> Any:
    """A command that ends with this exit code."""
    result = CliRunner().invoke(app, [str(a) for a in args], env=PLAIN)
    assert result.exit_code == code, result.output
    return result


def failure(*args: object) -> str:
    """The one line that bad arguments print."""
    result = invoke(*args, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return str(result.stderr).removeprefix("swath: ").rstrip("\n")


def output_of(*args: object, code: int = 0) -> str:
    """What a command prints, its lines joined."""
    return " ".join(invoke(*args, code=code).output.split())
