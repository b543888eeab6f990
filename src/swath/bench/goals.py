"""Ratios between measured rows that swath promises, or wants to tell: each states what it is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swath.bench.judge import advantage, best, by_case, is_ours
from swath.bench.results import Row

OURS = "swath"


@dataclass(frozen=True)
class Goal:
    """A case's time over that of others together. most: the largest ratio that is good.

    against: the provider of the others; the case's own is our fastest.
    """

    name: str
    case: str
    others: tuple[str, ...]
    most: float
    against: str = OURS


@dataclass(frozen=True)
class Outcome:
    """A goal and the ratio that came."""

    goal: Goal
    ratio: float

    @property
    def reached(self) -> bool:
        """Whether the ratio is good."""
        return self.ratio <= self.goal.most


def _seeds() -> Iterable[Goal]:
    """The headlines of rows 000a, 000b and 001, against the same kind of kernel on the same card."""
    for what, times, name in (
        ("decode", 10, "000a p32"),
        ("int8 window prefill", 45, "000b B2 16/4 D96 2048+0 p128"),
        ("int8 full prefill", 100, "001 B2 8/1 D128 4096+8192 p128"),
    ):
        yield Goal(f"{what}, {times}x a scalar kernel", name, (name,), 1 / times, "scalar")


def _table() -> Iterable[Goal]:
    """Row 004: a window never costs."""
    for n in (1024, 2048, 4096, 8192):
        for s in (127, 256, 512):
            yield Goal(f"ragged N {n}, S {s} against no window", f"004 N{n} S{s}", (f"004 N{n} S-1",), 1.0)


def _mixed() -> Iterable[Goal]:
    """A mixed batch costs little more than its chunks and its decodes, each in a call of their own."""
    for kind in ("", " w1024", " int8 channel"):
        parts = f"mixed, chunks alone at 16k{kind}", f"mixed, decodes alone at 16k{kind}"
        yield Goal(f"mixed batch{kind} against its parts", f"mixed 2 x 2k + 62 at 16k{kind}", parts, 1.15)


GOALS = (
    Goal("paged against dense prefill", "paged 2k at 16k", ("2k at 16k dense",), 1.05),
    Goal("leading tokens against none", "stream 16k", ("stream 16k, no leading",), 1.08),
    Goal("int8 against bf16 prefill", "paged 2k at 16k int8 channel", ("paged 2k at 16k",), 1.08),
    Goal("int8 token against bf16 prefill", "paged 2k at 16k int8 token", ("paged 2k at 16k",), 1.08),
    *_mixed(),
    *_seeds(),
    *_table(),
    Goal("cpu decode at 32k against 4k", "cpu B16 32k w1024", ("cpu B16 4k w1024",), 1.3),
    Goal("cpu int8 token against fp32", "cpu B16 32k w1024 int8 token", ("cpu B16 32k w1024",), 1.5),
    Goal("cpu int8 channel against fp32", "cpu B16 32k w1024 int8 channel", ("cpu B16 32k w1024",), 1.5),
    Goal("cpu prefill against SDPA, band mask", "cpu prefill 8k w512", ("cpu prefill 8k w512",), 0.25, "torch"),
)
"""What the run, the report and the tests look at, where all rows are there."""


def outcomes(rows: Iterable[Row]) -> list[Outcome]:
    """The goals whose rows are all among ``rows``."""
    cases = by_case(rows)
    found = []
    for goal in GOALS:
        ours = best(row for row in cases.get(goal.case, []) if is_ours(row["provider"]))
        others = [best(row for row in cases.get(name, []) if _stands(row, goal.against)) for name in goal.others]
        measured = [row for row in others if row is not None]
        if ours is not None and len(measured) == len(others):
            found.append(Outcome(goal, 1 / advantage(ours, _together(measured))))
    return found


def _together(rows: list[Row]) -> Row:
    """The time of all rows, one after the other."""
    rounds = zip(*(row.get("rounds_us") or [] for row in rows), strict=False)
    return {"us": sum(row["us"] for row in rows), "rounds_us": [sum(times) for times in rounds]}


def _stands(row: Row, against: str) -> bool:
    return is_ours(row["provider"]) if against == OURS else bool(row["provider"] == against)
