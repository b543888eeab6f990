"""Ratios between two measured rows that swath promises, or wants to tell: each states what it is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swath.bench.judge import advantage, best, by_case, is_ours
from swath.bench.results import Row

OURS = "swath"


@dataclass(frozen=True)
class Goal:
    """A case's time over another's. most: the largest ratio that is good.

    against: the provider of the second case; the first one's is our fastest.
    """

    name: str
    case: str
    other: str
    most: float
    against: str = OURS


@dataclass(frozen=True)
class Outcome:
    """A goal and the ratio that came."""

    goal: Goal
    ratio: float
    us: float
    other_us: float

    @property
    def reached(self) -> bool:
        """Whether the ratio is good."""
        return self.ratio <= self.goal.most


def _seeds() -> Iterable[Goal]:
    """The headlines of rows 000a, 000b and 001, against the same kind of kernel on the same card."""
    yield Goal("decode, 10x a scalar kernel", "000a p32", "000a p32", 1 / 10, "scalar")
    name = "000b B2 16/4 D96 2048+0 p128"
    yield Goal("int8 window prefill, 45x a scalar kernel", name, name, 1 / 45, "scalar")
    name = "001 B2 8/1 D128 4096+8192 p128"
    yield Goal("int8 full prefill, 100x a scalar kernel", name, name, 1 / 100, "scalar")


def _table() -> Iterable[Goal]:
    """Row 004: a window never costs."""
    for n in (1024, 2048, 4096, 8192):
        for s in (127, 256, 512):
            yield Goal(f"ragged N {n}, S {s} against no window", f"004 N{n} S{s}", f"004 N{n} S-1", 1.0)


GOALS = (
    Goal("paged against dense prefill", "paged 2k at 16k", "2k at 16k dense", 1.05),
    Goal("leading tokens against none", "stream 16k", "stream 16k, no leading", 1.08),
    Goal("int8 against bf16 prefill", "paged 2k at 16k int8 channel", "paged 2k at 16k", 1.08),
    Goal("int8 token against bf16 prefill", "paged 2k at 16k int8 token", "paged 2k at 16k", 1.08),
    *_seeds(),
    *_table(),
    Goal("cpu decode at 32k against 4k", "cpu B16 32k w1024", "cpu B16 4k w1024", 1.3),
    Goal("cpu int8 token against fp32", "cpu B16 32k w1024 int8 token", "cpu B16 32k w1024", 1.5),
    Goal("cpu int8 channel against fp32", "cpu B16 32k w1024 int8 channel", "cpu B16 32k w1024", 1.5),
    Goal("cpu prefill against SDPA, band mask", "cpu prefill 8k w512", "cpu prefill 8k w512", 0.25, "torch"),
)
"""What the run, the report and the tests look at, where both rows are there."""


def outcomes(rows: Iterable[Row]) -> list[Outcome]:
    """The goals whose two rows are among ``rows``."""
    cases = by_case(rows)
    found = []
    for goal in GOALS:
        ours = best(row for row in cases.get(goal.case, []) if is_ours(row["provider"]))
        other = best(row for row in cases.get(goal.other, []) if _stands(row, goal.against))
        if ours is not None and other is not None:
            found.append(Outcome(goal, 1 / advantage(ours, other), ours["us"], other["us"]))
    return found


def _stands(row: Row, against: str) -> bool:
    return is_ours(row["provider"]) if against == OURS else bool(row["provider"] == against)
