"""Served models in words and in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from swath.bench.results import Row, Served
from swath.bench.units import MS, number

Column = tuple[str, Callable[[Served], str]]

COLUMNS: tuple[Column, ...] = (
    ("prefill tok/s", lambda row: f"{row.prefill_tokens_per_s:,.0f}"),
    ("attention ms a prompt", lambda row: _part(row.prefill_attention_us, row.prefill_gpu_us, MS)),
    ("first token ms", lambda row: number(row.first_token_ms, 3)),
    ("decode tok/s", lambda row: "" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:,.0f}"),
    ("host loop ms", lambda row: "" if row.host_loop_ms is None else number(row.host_loop_ms, 3)),
    ("GPU us a step", lambda row: "" if row.decode_gpu_us is None else number(row.decode_gpu_us)),
    ("attention us a layer", lambda row: _part(row.decode_attention_us, row.decode_gpu_us, row.layers)),
    ("start s", lambda row: number(row.start_s, 3)),
    ("error", lambda row: f"{row.error:.1e}" if row.error is not None else ""),
)
"""Titles and figures. Behind the time of attention stands its share of the GPU's time."""
TITLES = ("model, cache", "backend", *(title for title, _ in COLUMNS))


def cells(row: Row) -> list[str]:
    """A line: the figures, or in the first of their columns why there are none."""
    names = [row.case, row.provider]
    if not isinstance(row, Served):
        return [*names, f"{row.status}: {row.reason}", *[""] * (len(COLUMNS) - 1)]
    return names + [figure(row) for _, figure in COLUMNS]


def in_words(row: Row) -> str:
    """The figures, each behind its title, or why there are none."""
    figures = cells(row)[2:]
    if not isinstance(row, Served):
        return figures[0]
    return ", ".join(f"{title} {text}" for title, text in zip(TITLES[2:], figures, strict=True) if text)


def markdown(rows: Iterable[Row]) -> list[str]:
    """The lines of a table for a page, with the columns that some row has a figure for."""
    lines = [TITLES, *map(cells, rows)]
    shown = [i for i, column in enumerate(zip(*lines, strict=True)) if any(column[1:])]
    rule = [("---", "---", *["---:"] * len(COLUMNS))[i] for i in shown]
    head, *others = (" | ".join(line[i] for i in shown) for line in lines)
    return [f"| {line} |" for line in (head, " | ".join(rule), *others)]


def _part(us: float | None, whole: float | None, unit: float) -> str:
    return "" if us is None or not whole else f"{number(us / unit, 3)} ({us / whole:.0%})"
