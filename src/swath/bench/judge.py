"""What results say: who is ahead, what is a tie, whether a case reaches its goals."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from swath.bench.cases import BY_NAME
from swath.bench.results import Row

BASELINES = ("scalar", "torch")
TIES = {"decode": 0.01, "steps": 0.01}
TIE = 0.03
"""Differences that are called ties, by op: prefill moves more with heat and power."""


def tie_of(op: str) -> float:
    """The share of a time within which two are called equal."""
    return TIES.get(op, TIE)


def is_ours(provider: str) -> bool:
    """Whether a provider's name is of a backend of swath."""
    return provider.startswith("swath-")


def is_baseline(provider: str) -> bool:
    """Whether it shows what tiles or fused kernels bring, and is nobody's fast path."""
    return provider in BASELINES


def is_peer(provider: str) -> bool:
    """Whether it is another library's fast path: neither ours nor a baseline."""
    return not is_ours(provider) and not is_baseline(provider)


def advantage(ours: Row, other: Row) -> float:
    """The other's time over ours: the median over the rounds they share, or of the medians."""
    pairs = list(zip(other.get("rounds_us") or [], ours.get("rounds_us") or [], strict=False))
    return median(a / b for a, b in pairs) if pairs else float(other["us"] / ours["us"])


def best(rows: Iterable[Row]) -> Row | None:
    """The fastest measured row."""
    return min((row for row in rows if row["status"] == "ok"), key=lambda row: float(row["us"]), default=None)


def sides(rows: list[Row]) -> tuple[Row | None, Row | None]:
    """Of one case: our fastest row, and that of the best peer."""
    return best(r for r in rows if is_ours(r["provider"])), best(r for r in rows if is_peer(r["provider"]))


def verdict(rows: list[Row]) -> str:
    """Of one case: our best against the best peer, and against the goals that the case states."""
    ours, peer = sides(rows)
    if ours is None:
        return ""
    goals = BY_NAME.get(ours["case"])
    words = []
    if peer is not None:
        ratio, tie = advantage(ours, peer), tie_of(ours["op"])
        said = "a tie" if abs(ratio - 1) <= tie else "ahead" if ratio > 1 else "behind"
        goal = "" if goals is None or goals.goal_peer is None else f", goal {goals.goal_peer:g}"
        words.append(f"{ratio:.2f} x {peer['provider']} ({said}{goal})")
    if goals is not None and goals.goal_x_floor is not None:
        words.append(f"x{ours['x_floor']:.2f} of the floor, goal x{goals.goal_x_floor:g}")
    return "; ".join(words)


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by case, in the order in which cases first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups
