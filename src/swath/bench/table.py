"""Results on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from rich.table import Table

from swath.bench.cases import CASES
from swath.bench.results import Row

TIES = {"decode": 0.01, "steps": 0.01}
TIE = 0.03
"""Differences that are called ties, by op: prefill moves more with heat and power."""


def tie_of(op: str) -> float:
    """The share of a time within which two are called equal."""
    return TIES.get(op, TIE)


def is_ours(provider: str) -> bool:
    """Whether a provider's name is of a backend of swath."""
    return provider.startswith("swath-")


def is_peer(provider: str) -> bool:
    """Whether it is another library's fast path: neither ours nor a baseline."""
    return not is_ours(provider) and provider not in ("scalar", "torch")


def advantage(ours: Row, other: Row) -> float:
    """The other's time over ours: the median over the rounds they share, or of the medians."""
    pairs = list(zip(other.get("rounds_us") or [], ours.get("rounds_us") or [], strict=False))
    return median(a / b for a, b in pairs) if pairs else float(other["us"] / ours["us"])


def best(rows: Iterable[Row]) -> Row | None:
    """The fastest measured row."""
    return min((row for row in rows if row["status"] == "ok"), key=lambda row: float(row["us"]), default=None)


def verdict(rows: list[Row]) -> str:
    """Of one case: our best against the best peer, and against the goals that the case states."""
    ours, peer = best(r for r in rows if is_ours(r["provider"])), best(r for r in rows if is_peer(r["provider"]))
    if ours is None:
        return ""
    goals = {case.name: case for case in CASES}.get(ours["case"])
    words = []
    if peer is not None:
        ratio, tie = advantage(ours, peer), tie_of(ours["op"])
        said = "a tie" if abs(ratio - 1) <= tie else "ahead" if ratio > 1 else "behind"
        goal = "" if goals is None or goals.goal_peer is None else f", goal {goals.goal_peer:g}"
        words.append(f"{ratio:.2f} x {peer['provider']} ({said}{goal})")
    if goals is not None and goals.goal_x_floor is not None:
        words.append(f"x{ours['x_floor']:.2f} of the floor, goal x{goals.goal_x_floor:g}")
    return "; ".join(words)


def case_table(rows: list[Row]) -> Table:
    """The providers of one case, the fastest first, those without a time last."""
    title = f"{rows[0]['case']}  [dim]{rows[0].get('shape', '')}[/]"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    table.add_column("", min_width=12)
    for name in ("us", "x floor", "TFLOP/s", "TB/s", "eager us", "host us", "extra MiB", "error"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: row.get("us", float("inf"))):
        if row["status"] == "ok":
            table.add_row(row["provider"], *_figures(row))
    return table


def _figures(row: Row) -> list[str]:
    def number(name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    extra = row.get("extra_bytes")
    return [
        number("us", ".1f"), number("x_floor", ".2f"), number("tflop_per_s", ".3g"), number("tb_per_s", ".3g"),
        number("eager_us", ".1f"), number("host_us", ".1f"), "" if extra is None else f"{extra / 2**20:.1f}",
        number("error", ".1e"),
    ]  # fmt: skip


def untimed(rows: list[Row]) -> list[str]:
    """In words: who has no time and why."""
    return [f"{row['provider']}: {row['status']}, {row['reason']}" for row in rows if row["status"] != "ok"]


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by case, in the order in which cases first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups
