"""Results on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from rich.table import Table
from rich.text import Text

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
    """The providers of one case, the fastest first; a column only where somebody has a figure."""
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: float(row["us"]))
    columns = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in timed)]
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", min_width=12)
    for column in columns:
        table.add_column(column.title, justify="right")
    for row in timed:
        table.add_row(row["provider"], *(column.shown(row) for column in columns))
    return table


def title(row: Row) -> Text:
    """The case and its shape."""
    return Text.assemble((row["case"], "bold"), (f"  {row['shape']}", "dim"))


def ceilings(rows: list[Row]) -> str:
    """What the machine reached on plain work beside this case."""
    row = next((row for row in rows if row["status"] == "ok"), None)
    if row is None:
        return ""
    reads, copies = ("reads", "read_tb_per_s", "TB/s"), ("copies", "copy_tb_per_s", "TB/s")
    names = (reads, copies, ("multiplies", "matmul_tflop_per_s", "TFLOP/s"))
    rates = ", ".join(f"{verb} {row[key]:.3g} {unit}" for verb, key, unit in names)
    return f"floor {row['floor_us']:.4g} us ({row['bound']}): {rates}"


@dataclass(frozen=True)
class _Column:
    title: str
    key: str
    form: str
    unit: float = 1.0

    def shown(self, row: Row) -> str:
        value = row.get(self.key)
        if isinstance(value, list):  # the 10th and the 90th percentile: how far they lie apart
            value = (value[1] - value[0]) / row["us"]
        return "" if value is None else format(value / self.unit, self.form)


_COLUMNS = (
    _Column("us", "us", ".1f"),
    _Column("spread", "us_p10_p90", ".1%"),
    _Column("x floor", "x_floor", ".2f"),
    _Column("TFLOP/s", "tflop_per_s", ".3g"),
    _Column("TB/s", "tb_per_s", ".3g"),
    _Column("plain read us", "read_us", ".1f"),
    _Column("eager us", "eager_us", ".1f"),
    _Column("host us", "host_us", ".0f"),
    _Column("extra MiB", "extra_bytes", ".1f", 2**20),
    _Column("error", "error", ".1e"),
)


def untimed(rows: list[Row]) -> list[str]:
    """In words: who has no time and why, and who was timed eager for want of a CUDA graph."""
    said = [f"{row['provider']}: {row['status']}, {row['reason']}" for row in rows if row["status"] != "ok"]
    return said + [f"{row['provider']}: eager, {row['graph_error']}" for row in rows if "graph_error" in row]


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by case, in the order in which cases first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups
