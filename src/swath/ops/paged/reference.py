"""The truth: every row straight from the formula, in float64."""

from __future__ import annotations

from swath.problem import Problem
from swath.schedules import rows


def why_not(problem: Problem) -> str | None:
    """Runs everywhere, slowly."""
    return None


def plan(problem: Problem) -> str:
    """The launch in words."""
    return "torch, float64, one row at a time"


def warm(problem: Problem) -> None:
    """Nothing to compile."""


def run(problem: Problem) -> None:
    """Compute in float64 and round once."""
    rows.run(problem)
