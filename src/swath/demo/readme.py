"""The demo's table in README.md, from docs/img/demo.json, which is the report of a full run.

python -m swath.demo.readme        writes it anew, from the root of a checkout
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console

from swath.cli.files import between, write_all
from swath.demo.generate import Generation
from swath.demo.measure import Row
from swath.demo.report import Conditions, Report, caption, table
from swath.demo.settings import Budget

MARKS = "demo table"
README, JSON = Path("README.md"), Path("docs/img/demo.json")
PICTURE = "docs/img/demo.png"


def with_table(readme: str, report: str) -> str:
    """The text of README.md with the rows and the caption of a report (JSON) between its marks.

    Raises:
        ValueError: the marks are missing.
    """
    return between(readme, MARKS, _block(_report(json.loads(report))))


def _report(data: dict[str, Any]) -> Report:
    conditions = data["conditions"] | {"budget": Budget(**data["conditions"]["budget"])}
    generation = None if data["generation"] is None else Generation(**data["generation"])
    return Report(Conditions(**conditions), generation, [Row(**row) for row in data["rows"]], data["complete"])


def _block(report: Report) -> str:
    shown, page = table(report, speed=False), io.StringIO()
    shown.box, shown.pad_edge = MARKDOWN, True
    Console(file=page, width=200).print(shown)
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    return "\n".join(
        [
            "",
            *filter(None, lines),
            "",
            f"<sub>{caption(report.conditions, speed=False)} [As a picture]({PICTURE}).</sub>",
            "",
        ]
    )


if __name__ == "__main__":
    write_all({README: with_table(README.read_text(encoding="utf-8"), JSON.read_text(encoding="utf-8"))})
