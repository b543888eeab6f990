"""The table of served models in docs/engines.md, from stored results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from swath.bench.results import Row, conditions, date_of
from swath.bench.serving.table import markdown
from swath.cli.files import between

PAGE = Path("docs/engines.md")
MARKS = "serve table"


def with_table(page: str, files: Mapping[str, Sequence[Row]]) -> str:
    """The page with the newest file of served models between its marks; as it is where no file has any.

    Raises:
        ValueError: the marks are missing.
    """
    served = {name: found for name, rows in files.items() if (found := [row for row in rows if row.op == "serve"])}
    if not served:
        return page
    name = max(served, key=lambda name: (date_of(served[name]), name))
    return between(page, MARKS, "\n".join(["", *markdown(served[name]), "", caption(served[name], name), ""]))


def caption(rows: Sequence[Row], name: str) -> str:
    """The machine, the versions, the day, and where every figure is."""
    engines = ", ".join(dict.fromkeys(row.version for row in rows if row.version is not None))
    return f"<sub>{conditions(rows)}, {engines}. From [{name}](../benchmarks/results/{name}).</sub>"
