"""The tables of served models in docs/engines.md, from stored results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from swath.bench.results import Row, conditions, date_of
from swath.bench.serving.table import markdown
from swath.cli.files import between

PAGE = Path("docs/engines.md")
MARKS = {"vllm": "serve table", "sglang": "sglang table"}
"""Around the table of an engine."""


def with_table(page: str, files: Mapping[str, Sequence[Row]]) -> str:
    """The page with each engine's newest file of rows between its marks; as it is where no file has any.

    Raises:
        ValueError: marks are missing.
    """
    for engine, marks in MARKS.items():
        served = {name: found for name, rows in files.items() if (found := [row for row in rows if is_of(row, engine)])}
        if served:
            name = max(served, key=lambda name: (date_of(served[name]), name))
            page = between(page, marks, "\n".join(["", *markdown(served[name]), "", caption(served[name], name), ""]))
    return page


def is_of(row: Row, engine: str) -> bool:
    """Whether it is a row of a model that this engine served."""
    return row.op == "serve" and (row.version or "").startswith(f"{engine} ")


def caption(rows: Sequence[Row], name: str) -> str:
    """The machine, the versions, the day, and where every figure is."""
    engines = ", ".join(dict.fromkeys(row.version for row in rows if row.version is not None))
    return f"<sub>{conditions(rows)}, {engines}. From [{name}](../benchmarks/results/{name}).</sub>"
