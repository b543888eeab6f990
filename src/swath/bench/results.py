"""Results: one row for each case and provider, each with its origin, so that files of JSON lines can be joined and cut.

A line holds the fields of a ``Row``, or of a ``Timed`` or ``Served`` one, and of its ``Origin`` side by side; a field
that is absent is None. ``read`` and ``append`` are the only code that knows this.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from swath.errors import bad_value

Status = Literal["ok", "unable", "refused", "failed"]
Kind = Literal["decode", "steps", "prefill", "mixed", "serve"]
"""What is measured: an ``Op``, or a served model."""


@dataclass(frozen=True)
class Origin:
    """Where a row comes from: the machine, the versions, the day, and the command that gives it again."""

    gpu: str | None
    driver: str | None
    cpu: str | None
    torch: str
    triton: str | None
    cuda: str | None
    swath: str
    commit: str | None
    date: str
    command: str

    @property
    def machine(self) -> str:
        """The GPU, or the CPU where there was none."""
        return self.gpu or self.cpu or "a machine without a name"

    @property
    def run(self) -> dict[str, str | None]:
        """What two rows must share to stand in one run."""
        return {name: getattr(self, name) for name in ("gpu", "driver", "torch", "triton", "swath", "commit")}


@dataclass(kw_only=True)
class Row:
    """What became of one case by one provider.

    - shape: the case in words; version: of the provider's package
    - reason: why there is no time; graph_error: why the call was not timed as a CUDA graph
    - error, budget_used: of the rows that the gate looked at
    - host_us: the host's share of an eager call; extra_bytes: memory that a call takes on top of its result
    - launch: of a backend of swath, the kernels and their settings in words
    """

    case: str
    op: Kind
    shape: str
    provider: str
    version: str | None = None
    status: Status
    reason: str | None = None
    error: float | None = None
    budget_used: float | None = None
    host_us: float | None = None
    extra_bytes: int | None = None
    graph_error: str | None = None
    launch: str | None = None
    origin: Origin


@dataclass(kw_only=True)
class Timed(Row):
    """A row of status "ok".

    - us: the median of rounds_us; us_p10_p90: of all runs; method: "graph" or "eager"
    - floor_us: what bytes or arithmetic take at the machine's ceilings, whichever bounds; x_floor: the time over it
    - flops, nbytes, cache_bytes: what the case cannot avoid, and what its cache must keep
    - read_tb_per_s, copy_tb_per_s, matmul_tflop_per_s: the ceilings of this run
    - eager_us: a call outside its graph; read_us: a plain read of as many bytes; x_present: see tune.py
    """

    us: float
    us_p10_p90: list[float]
    rounds_us: list[float]
    method: str
    floor_us: float
    bound: str
    x_floor: float
    tflop_per_s: float
    tb_per_s: float
    flops: int
    nbytes: int
    cache_bytes: int | None = None
    read_tb_per_s: float
    copy_tb_per_s: float
    matmul_tflop_per_s: float
    eager_us: float | None = None
    read_us: float | None = None
    x_present: float | None = None

    @property
    def spread(self) -> float:
        """How far the rounds lie apart, as a share of the time."""
        return (max(self.rounds_us) - min(self.rounds_us)) / self.us


@dataclass(kw_only=True)
class Served(Row):
    """A row of status "ok" whose op is "serve": a model on an engine.

    - layers, of the depth of the real model; cache: what keys and values are stored as; graphs: which steps have them
    - checked_calls: calls of attention that were held to float64; graph_difference: of log-probabilities, with CUDA
      graphs and without, or None where the two answers part and have no likely token in common
    - start_s: until the engine takes requests, its compilation included; first_prompt_s: the first prompt after that,
      which compiles what the start did not
    - first_token_ms: of one prompt alone; all_first_tokens_s: of all sequences of the decode together
    - decode_step_us: the wall time of a step in which every sequence gets a token, and decode_tokens_per_s what it
      makes; None in rows of a run that did not time them
    - decode_gpu_us, decode_attention_us, decode_append_us: GPU time of such a step, and what attention and writing the
      cache have of it; prefill_*: the same of one prompt
    - host_loop_ms: the time of an empty loop in Python, measured before and after the decode; the larger of the two.
      Rows whose values differ ran on hosts of different speed, so their wall times of steps do not compare
    - prefill_clock_mhz, prefill_power_w: SM clock and power as the timed prefill ends; None where no driver tells
    """

    layers: int
    depth: int
    cache: str
    graphs: str
    checked_calls: int
    graph_difference: float | None = None
    start_s: float
    first_prompt_s: float
    first_token_ms: float
    prefill_tokens_per_s: float
    all_first_tokens_s: float
    decode_tokens_per_s: float | None = None
    decode_step_us: float | None = None
    decode_gpu_us: float | None = None
    decode_attention_us: float | None = None
    decode_append_us: float | None = None
    host_loop_ms: float | None = None
    prefill_gpu_us: float | None = None
    prefill_attention_us: float | None = None
    prefill_append_us: float | None = None
    prefill_clock_mhz: float | None = None
    prefill_power_w: float | None = None


POSITIVE = ("us", "us_p10_p90", "rounds_us", "floor_us", "x_floor", "read_us", "eager_us")
"""Fields that are divided by, or drawn on a logarithmic axis."""


def read(path: Path) -> list[Row]:
    """The rows of a file. A last line that a crash cut short is left out.

    Raises:
        ValueError: naming the file, the line and the field that is missing or of another type.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise bad_value(str(path), "lines of JSON in UTF-8", f"other bytes at {error.start}") from None
    whole, tail = _whole(text)
    lines = (whole + tail).splitlines()
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _whole(text: str) -> tuple[str, str]:
    """The lines that are ended, and what follows them, less what a crash cut short."""
    end = text.rfind("\n") + 1
    tail = text[end:]
    return text[:end], "" if tail.startswith("{") and _parsed(tail) is None else tail


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file in one write, on the disk when this returns: a case is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(_flat(row)) + "\n" for row in rows)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        whole, tail = _whole(file.read())
        file.truncate(len((whole + tail).encode()))
        file.write(("\n" if tail else "") + text)
        file.flush()
        os.fsync(file.fileno())


def done(path: Path, origin: Origin) -> set[str]:
    """Names of the cases that a file has of this machine; an absent file has none.

    Raises:
        ValueError: the file holds rows of another machine, version or commit.
    """
    rows = read(path) if path.exists() else []
    for row in rows:
        for name, value in origin.run.items():
            if row.origin.run[name] != value:
                raise bad_value(f"resume {path}", f"rows with {name} {value}", row.origin.run[name])
    return {row.case for row in rows}


def timed(rows: Iterable[Row]) -> list[Timed]:
    """The rows that have a time."""
    return [row for row in rows if isinstance(row, Timed)]


def measured(rows: Iterable[Row]) -> dict[tuple[str, str], Timed]:
    """Rows that have a time, by case and provider; of several the last."""
    return {(row.case, row.provider): row for row in timed(rows)}


def date_of(rows: Iterable[Row]) -> str:
    """The last day of rows."""
    return max(row.origin.date for row in rows)


def conditions(rows: Iterable[Row]) -> str:
    """The machines, versions, commits and dates of rows in a sentence."""
    found: dict[str, dict[str, list[str]]] = {}
    for o in dict.fromkeys(row.origin for row in rows):
        driver = f", driver {o.driver}" if o.driver else ""
        where = f"{o.machine}{driver}, torch {o.torch}, Triton {o.triton}, swath {o.swath}"
        commits = found.setdefault(where, {}).setdefault(o.date, [])
        commit = o.commit or "no commit"
        if commit not in commits:
            commits.append(commit)
    return "; ".join(f"{where} at {_by_day(days)}" for where, days in found.items())


def _by_day(commits: dict[str, list[str]]) -> str:
    return ", and at ".join(f"{' and '.join(names)}, {day}" for day, names in commits.items())


def _flat(row: Row) -> dict[str, Any]:
    own = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "origin"}
    return {name: value for name, value in own.items() if value is not None} | asdict(row.origin)


def _row(line: str, where: str) -> Row:
    found = _parsed(line)
    if not isinstance(found, dict):
        raise bad_value(where, "a row as JSON", repr(line[:40]))
    kind = (Served if found.get("op") == "serve" else Timed) if found.get("status") == "ok" else Row
    return _made(kind, found | {"origin": _made(Origin, found, where)}, where)


def _parsed(text: str) -> Any:
    """From JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


HINTS: dict[Any, dict[str, Any]] = {kind: get_type_hints(kind) for kind in (Origin, Row, Timed, Served)}
T = TypeVar("T")


def _made(kind: type[T], found: dict[str, Any], where: str) -> T:
    """An instance of a dataclass whose fields are checked one by one."""
    hints = HINTS[kind]
    values = {name: found.get(name) for name in hints}
    for name, hint in hints.items():
        wanted = _unlike(name, values[name], hint)
        if wanted is not None:
            came = repr(values[name])[:40] if name in found else "nothing"
            raise bad_value(f"{where}, {name}", wanted, came)
    return kind(**values)


def _unlike(name: str, value: Any, hint: Any) -> str | None:
    """What a field should hold, where the value is something else."""
    if hint is Origin:
        return None
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is str:
        return "a text" if not isinstance(value, str) else _not_a_day(value) if name == "date" else None
    if kind is int or kind is float:
        return None if _is_number(name, value, kind) else f"a {'positive ' if name in POSITIVE else ''}number"
    if kind == list[float]:
        fits = isinstance(value, list) and len(value) > 0 and all(_is_number(name, x, float) for x in value)
        return None if fits else "a list of positive numbers"
    return None if value in get_args(kind) else f"one of {', '.join(get_args(kind))}"


def _is_number(name: str, value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return abs(value) <= sys.float_info.max and (value > 0 or name not in POSITIVE)


def _not_a_day(text: str) -> str | None:
    try:
        date.fromisoformat(text)
    except ValueError:
        return "a day as YYYY-MM-DD"
    return None
