"""Results on a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from swath.bench.results import Row


def case_table(rows: list[Row]) -> Table:
    """The providers of one case, the fastest first."""
    return _table(rows, _COLUMNS)


def tuning_table(rows: list[Row]) -> Table:
    """The launch rows that were tried for one case, the fastest first."""
    return _table(rows, _TUNING_COLUMNS)


def _table(rows: list[Row], columns: tuple[_Column, ...]) -> Table:
    """A column only where somebody has a figure."""
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: float(row["us"]))
    columns = tuple(column for column in columns if any(row.get(column.key) is not None for row in timed))
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
_TUNING_COLUMNS = (*_COLUMNS[:3], _Column("x present", "x_present", ".3f"))


def untimed(rows: list[Row]) -> list[str]:
    """In words: who has no time and why, and who was timed eager for want of a CUDA graph."""
    said = [f"{row['provider']}: {row['status']}, {row['reason']}" for row in rows if row["status"] != "ok"]
    return said + [f"{row['provider']}: eager, {row['graph_error']}" for row in rows if "graph_error" in row]
