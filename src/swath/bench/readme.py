"""The table of times in README.md, from one file of results.

python -m swath.bench.readme [FILE]        writes it anew, from the root of a checkout

Without a file it is the one in benchmarks/results that ``swath bench report`` takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from swath.bench.judge import advantage, by_case, is_ours, sides
from swath.bench.results import Row, Timed, conditions, date_of, read, timed
from swath.bench.units import in_words
from swath.cli.files import between, write_all
from swath.cli.output import one_line_errors
from swath.errors import bad_value

MARKS = "bench table"
README, PAGE, RESULTS = Path("README.md"), Path("docs/benchmarks.md"), Path("benchmarks/results")
PEERS = {"fa3": "FlashAttention-3", "fa4": "FlashAttention-4", "flashinfer": "FlashInfer"}
LABELS = {
    "gpt-oss 16k": "gpt-oss prefill, 2 x 16k, window 128",
    "gpt-oss 16k sinks": "gpt-oss prefill with sinks",
    "mistral 16k": "Mistral prefill, 2 x 16k, window 4,096",
    "gemma 16k": "Gemma prefill, 2 x 16k, window 1,024",
    "llama 8k full": "Llama prefill, 8k, no window",
    "paged 2k at 16k": "chunked prefill, 4 x 2k at 16k, pages of 16",
    "B64 8k p16": "decode, 64 x 8k, bf16 cache",
    "B64 8k p16 int8 token": "decode, 64 x 8k, int8 cache",
}
"""The rows of the table: cases, and how a reader knows them."""


def in_order(files: Iterable[list[Row]]) -> list[list[Row]]:
    """The runs, first the one that README.md shows, in its table and its plots.

    It has most of the table's rows; of two with as many it is the newer, and of the same day the fuller.
    """
    return sorted(files, key=lambda rows: (len(_held(rows)), date_of(rows), len(rows)), reverse=True)


def _held(rows: Iterable[Row]) -> set[str]:
    """The cases of the table that swath has a time of."""
    return {row.case for row in timed(rows) if row.case in LABELS and is_ours(row.provider)}


def table(rows: Sequence[Row]) -> str:
    """The table, Markdown: a case a line, with the time of swath's fastest backend and of each peer that was there."""
    cases = by_case(row for row in rows if row.case in LABELS)
    there = [peer for peer in PEERS if any(row.provider == peer for found in cases.values() for row in found)]
    names = [PEERS[peer] for peer in there]
    lines = [["", "swath", *names, "ratio to the best peer"], ["---", *["---:"] * (len(there) + 2)]]
    for case, label in LABELS.items():
        found = cases.get(case, [])
        ours, best = sides(found)
        ratio = "" if ours is None or best is None else f"{advantage(ours, best):.2f}"
        peers = [_cell([row for row in found if row.provider == peer]) for peer in there]
        lines.append([label, "not run" if ours is None else f"**{in_words(ours.us, 3)}**", *peers, ratio])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(rows: Sequence[Row]) -> str:
    """The time of a peer, or why it has none: it cannot do the case, its result was wrong, or it was not there."""
    if not rows:
        return "not run"
    last = rows[-1]
    return in_words(last.us, 3) if isinstance(last, Timed) else "cannot" if last.status == "unable" else last.status


def caption(rows: Sequence[Row], name: str) -> str:
    """The GPU, the versions and the day, and where every figure is."""
    shown = [row for row in rows if row.case in LABELS and isinstance(row, Timed)]
    peers = {row.provider: row.version for row in shown if row.version is not None and row.provider in PEERS}
    versions = "".join(f", {PEERS[peer]} {version}" for peer, version in peers.items())
    said = (
        "Medians of interleaved rounds, results held to float64 first; the ratio is the best peer's time over swath's"
    )
    return f"{conditions(shown)}{versions}. {said}. From [{name}](benchmarks/results/{name}); [all figures]({PAGE})."


def with_table(readme: str, rows: Sequence[Row], name: str) -> str:
    """README.md with the table of the file ``name`` between its marks.

    Raises:
        ValueError: the marks are missing, or the file has no row of the table.
    """
    if not _held(rows):
        raise bad_value(name, f"a row of {', '.join(LABELS)}", "none with a time of swath")
    return between(readme, MARKS, f"\n{table(rows)}\n\n<sub>{caption(rows, name)}</sub>\n")


def main(arguments: Sequence[str]) -> None:
    """Write the table into README.md."""
    with one_line_errors():
        paths = [Path(argument) for argument in arguments] or sorted(RESULTS.glob("*.jsonl"))
        files = {path.name: rows for path in paths if (rows := read(path))}
        if not files:
            raise bad_value("file", f"one with rows, or the root of a checkout, where {RESULTS} is", "none")
        shown = in_order(files.values())[0]
        name = next(name for name, rows in files.items() if rows is shown)
        write_all({README: with_table(README.read_text(encoding="utf-8"), shown, name)})
    print(f"written: {README}, from {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
