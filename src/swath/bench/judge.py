"""What results say: who is ahead, what is a tie, whether goals are reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from swath.bench.goals import GOALS, OURS, X_FLOOR, X_PEER, Goal
from swath.bench.results import Row, Timed, timed

BASELINES = ("scalar", "torch")
TIES = {"decode": 0.01, "steps": 0.01}
TIE = 0.03
"""Differences that are called ties, by op: prefill moves more with heat and power."""
SPREAD = 0.2
"""Rounds of one provider that lie further apart, as a share of its time, deserve a warning."""


@dataclass(frozen=True)
class Outcome:
    """A goal and the ratio that came."""

    goal: Goal
    ratio: float

    @property
    def reached(self) -> bool:
        """Whether the ratio is good."""
        return self.ratio <= self.goal.most


def tie_of(op: str) -> float:
    """The share of a time within which two are called equal."""
    return TIES.get(op, TIE)


def is_ours(provider: str) -> bool:
    """Whether a provider's name is of a backend of swath."""
    return provider.startswith(f"{OURS}-")


def is_baseline(provider: str) -> bool:
    """Whether it shows what tiles or fused kernels bring, and is no library's fast path."""
    return provider in BASELINES


def is_peer(provider: str) -> bool:
    """Whether it is another library's fast path: neither ours nor a baseline."""
    return not is_ours(provider) and not is_baseline(provider)


def advantage(ours: Timed, other: Timed) -> float:
    """The other's time over ours: the median over the rounds they share."""
    return _over(other.rounds_us, ours.rounds_us)


def _over(times: Iterable[float], others: Iterable[float]) -> float:
    return median(a / b for a, b in zip(times, others, strict=False))


def best(rows: Iterable[Row]) -> Timed | None:
    """The fastest row."""
    return min(timed(rows), key=lambda row: row.us, default=None)


def sides(rows: Sequence[Row]) -> tuple[Timed | None, Timed | None]:
    """Of one case: our fastest row, and that of the best peer."""
    return best(r for r in rows if is_ours(r.provider)), best(r for r in rows if is_peer(r.provider))


def verdict(rows: Sequence[Row]) -> str:
    """Of one case: our best against the best peer, and against the goals that the case has."""
    ours, peer = sides(rows)
    if ours is None:
        return ""
    words = []
    if peer is not None:
        ratio, tie = advantage(ours, peer), tie_of(ours.op)
        said = "a tie" if abs(ratio - 1) <= tie else "ahead" if ratio > 1 else "behind"
        goal = f", goal {X_PEER[ours.case]:g}" if ours.case in X_PEER else ""
        words.append(f"{ratio:.2f} x {peer.provider} ({said}{goal})")
    if ours.case in X_FLOOR:
        words.append(f"x{ours.x_floor:.2f} of the floor, goal x{X_FLOOR[ours.case]:g}")
    return "; ".join(words)


def outcomes(rows: Iterable[Row]) -> list[Outcome]:
    """The goals whose rows are all among ``rows``."""
    cases = by_case(rows)
    found = []
    for goal in GOALS:
        ours = best(row for row in cases.get(goal.case, []) if is_ours(row.provider))
        others = [best(row for row in cases.get(name, []) if _stands(row, goal.against)) for name in goal.others]
        measured = [row for row in others if row is not None]
        if ours is not None and len(measured) == len(others):
            together = map(sum, zip(*(row.rounds_us for row in measured), strict=False))
            found.append(Outcome(goal, 1 / _over(together, ours.rounds_us)))
    return found


def _stands(row: Row, against: str) -> bool:
    return is_ours(row.provider) if against == OURS else row.provider == against


R = TypeVar("R", bound=Row)


def by_case(rows: Iterable[R]) -> dict[str, list[R]]:
    """Rows grouped by case, in the order in which cases first appear."""
    groups: dict[str, list[R]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return groups
