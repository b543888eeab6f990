"""Rows of results made up for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from swath.bench.case import work_of
from swath.bench.cases import BY_NAME
from swath.bench.results import Origin, Row, Timed, append

ORIGIN = Origin(
    gpu="A GPU", driver="1", cpu=None, torch="2", triton="3", cuda=None, swath="0", commit="abc", date="2026-01-02",
    command="swath bench run --op decode",
)  # fmt: skip


def timed_row(us: float, *, floor_us: float = 1.0, **others: Any) -> Timed:
    """A row with a time; ``others`` may replace everything that follows from it."""
    made: dict[str, Any] = dict(
        status="ok", us=us, us_p10_p90=[us, us], rounds_us=[us] * 3, method="graph", floor_us=floor_us, bound="bytes",
        x_floor=us / floor_us, tflop_per_s=1.0, tb_per_s=1.0, flops=1, nbytes=1, read_tb_per_s=1.0, copy_tb_per_s=1.0,
        matmul_tflop_per_s=1.0, error=1e-3, budget_used=0.3, origin=ORIGIN,
    )  # fmt: skip
    return Timed(**made | others)


def row(case: str, provider: str, us: float | None, **others: Any) -> Any:
    """Of a case of the benchmark; without a time it was refused."""
    found = BY_NAME[case]
    said: dict[str, Any] = dict(case=case, op=found.op, shape=found.shape, provider=provider, origin=ORIGIN) | others
    if us is None:
        return Row(**{"status": "refused", "reason": "?"} | said)
    floor_us = work_of(found.drawn(torch.device("cpu"))).nbytes / 4.4e6
    return timed_row(us, **{"floor_us": floor_us} | said)


def write(path: Path, rows: list[Row]) -> Path:
    """A file of rows."""
    path.unlink(missing_ok=True)
    append(path, rows)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """What a file says, without its reader."""
    return [json.loads(line) for line in path.read_text().splitlines()]
