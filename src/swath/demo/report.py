"""What the demo found, as a table, as JSON and in words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from swath.cli.files import write_all
from swath.demo.generate import Generation
from swath.demo.measure import PAGE_SIZE, Row
from swath.demo.settings import Budget

if TYPE_CHECKING:
    from rich.table import Table

MIB = 2**20


@dataclass(frozen=True)
class Conditions:
    """Under which the rows were measured."""

    model: str
    dtype: str
    device: str
    text: str
    budget: Budget
    notes: str
    versions: dict[str, str]
    date: str


@dataclass
class Report:
    """The rows so far, the conditions, and the text generated."""

    conditions: Conditions
    generation: Generation | None = None
    rows: list[Row] = field(default_factory=list)
    complete: bool = False

    def write(self, path: Path) -> None:
        """Write JSON; a reader sees the old file or the new one, never a part."""
        write_all({path: json.dumps({**asdict(self), "page_size": PAGE_SIZE}, indent=2) + "\n"})


def table(report: Report, *, speed: bool = True) -> Table:
    """The rows so far, for a terminal; ``speed``: with the tokens of a second, which say something on one machine."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("attention")
    shown.add_column("KV")
    for name in ("perplexity", "peak cache", "of bf16", *["tokens/s"] * speed):
        shown.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(report.rows):
        same = i > 0 and report.rows[i - 1].attention == row.attention
        shown.add_row(
            "" if same else row.attention,
            row.kv,
            f"{row.perplexity:.2f}",
            mebibytes(row.peak_cache_bytes),
            f"{row.peak_cache_bytes / row.full_bf16_cache_bytes:.0%}",
            *[f"{row.decode_tokens_per_s:.1f}"] * speed,
        )
    return shown


def caption(conditions: Conditions, *, speed: bool = True) -> str:
    """The conditions in words, those of the tokens of a second where these are shown."""
    c, budget = conditions, conditions.budget
    parts = [
        f"{c.model} in {c.dtype} on {c.device}.",
        f"Perplexity of the last {budget.scored:,} of the first {budget.tokens:,} tokens of {c.text},",
        f"prefilled {budget.chunk} at a time through the paged cache (pages of {PAGE_SIZE} tokens).",
        "Peak cache: keys, values and scales of all layers, and its share of a bf16 cache of all tokens.",
        "int8, fp8: one scale per token and head.",
        *[f"Tokens/s: decode, the median of {budget.decode_steps} steps after those tokens."] * speed,
        c.notes,
        ", ".join(f"{name} {version}" for name, version in c.versions.items()) + f"; {c.date}.",
    ]
    return " ".join(parts)


def in_short(conditions: Conditions) -> str:
    """Model, text and versions, for under a picture."""
    c = conditions
    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    return f"{c.model} in {c.dtype} on {c.device}; {c.text}. {versions}; {c.date}."


def mebibytes(count: int) -> str:
    """Bytes for people: "1.9 MiB"."""
    return f"{count / MIB:.1f} MiB"


def in_words(generation: Generation) -> str:
    """Speed and memory of the generation in one sentence."""
    g = generation
    share = g.peak_cache_bytes / g.full_bf16_cache_bytes
    return (
        f"{g.new_tokens} tokens after {g.prompt_tokens} of prompt, {g.attention}, {g.kv} cache: "
        f"{g.decode_tokens_per_s:.1f} tokens/s; the cache peaked at {mebibytes(g.peak_cache_bytes)}, "
        f"{share:.0%} of the {mebibytes(g.full_bf16_cache_bytes)} of a full bf16 cache."
    )
