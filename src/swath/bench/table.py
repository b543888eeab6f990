"""Results on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from swath.bench.judge import SPREAD
from swath.bench.results import Row, Timed, timed
from swath.bench.units import in_words, number, unit_of


def case_table(rows: Sequence[Row]) -> Table:
    """The providers of one case, the fastest first."""
    return _table(rows, _COLUMNS)


def tuning_table(rows: Sequence[Row]) -> Table:
    """The launch rows that were tried for one case, the fastest first."""
    return _table(rows, _TUNING_COLUMNS)


def _table(rows: Sequence[Row], columns: tuple[_Column, ...]) -> Table:
    """A column only where a row has a figure for it; times in the unit that suits the fastest."""
    found = sorted(timed(rows), key=lambda row: row.us)
    scale, unit = unit_of(found[0].us) if found else (1.0, "us")
    columns = tuple(column for column in columns if any(column.value(row) is not None for row in found))
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", min_width=12)
    for column in columns:
        table.add_column(f"{column.title} {unit}".lstrip() if column.is_time else column.title, justify="right")
    for row in found:
        table.add_row(row.provider, *(column.shown(row, scale) for column in columns))
    return table


def title(row: Row) -> Text:
    """The case and its shape."""
    return Text.assemble((row.case, "bold"), (f"  {row.shape}", "dim"))


def ceilings(rows: Sequence[Row]) -> str:
    """What the machine reached on plain work beside this case."""
    row = next(iter(timed(rows)), None)
    if row is None:
        return ""
    moved = f"reads {row.read_tb_per_s:.3g} TB/s, copies {row.copy_tb_per_s:.3g} TB/s"
    return f"floor {in_words(row.floor_us)} ({row.bound}): {moved}, multiplies {row.matmul_tflop_per_s:.3g} TFLOP/s"


def unsteady(rows: Sequence[Row]) -> list[str]:
    """A warning for each provider whose rounds lie far apart."""
    return [
        f"{row.provider}: its rounds spread by {row.spread:.0%}: the machine was not steady, so measure again"
        for row in timed(rows)
        if row.spread > SPREAD
    ]


def untimed(rows: Sequence[Row]) -> list[str]:
    """In words: who has no time and why, and who was timed eager for want of a CUDA graph."""
    said = [f"{row.provider}: {row.status}, {row.reason}" for row in rows if not isinstance(row, Timed)]
    return said + [f"{row.provider}: eager, {row.graph_error}" for row in rows if row.graph_error is not None]


@dataclass(frozen=True)
class _Column:
    """A figure of rows. is_time: in microseconds, shown in the unit of the table."""

    title: str
    value: Callable[[Timed], float | None]
    form: str = ""
    is_time: bool = False

    def shown(self, row: Timed, scale: float) -> str:
        value = self.value(row)
        if value is None:
            return ""
        return number(value / scale) if self.is_time else format(value, self.form)


_TIME = _Column("", lambda row: row.us, is_time=True)
_SPREAD = _Column("spread", lambda row: row.spread, ".0%")
_X_FLOOR = _Column("x floor", lambda row: row.x_floor, ".2f")
_COLUMNS = (
    _TIME,
    _SPREAD,
    _X_FLOOR,
    _Column("TFLOP/s", lambda row: row.tflop_per_s if row.bound == "matmul" else None, ".3g"),
    _Column("TB/s", lambda row: row.tb_per_s if row.bound == "bytes" else None, ".3g"),
    _Column("plain read", lambda row: row.read_us, is_time=True),
    _Column("eager", lambda row: row.eager_us, is_time=True),
    _Column("host us", lambda row: row.host_us, ".0f"),
    _Column("extra MiB", lambda row: None if row.extra_bytes is None else row.extra_bytes / 2**20, ".1f"),
    _Column("error", lambda row: row.error, ".1e"),
)
_TUNING_COLUMNS = (_TIME, _SPREAD, _X_FLOOR, _Column("x present", lambda row: row.x_present, ".3f"))
