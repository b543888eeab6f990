"""Ratios of the cpu backend: against the context's length, against torch's own attention, against a wider cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from swath.ops.attention import attention
from swath.ops.paged import paged_attention
from swath.quant import KVQuant
from swath.testing import Case, Inputs, make
from swath.window import Window

Call = Callable[[], object]

DECODE = Case(kv_lens=(32768,) * 16, dtype=torch.float32, num_kv_heads=2, group=4, size=1024)
PREFILL = Case((8192,), (8192,), dense=True, dtype=torch.float32, num_kv_heads=2, group=4, size=512)
WARM_UPS = 2


@dataclass(frozen=True)
class Ratio:
    """Medians of a call and of its baseline, and the largest ratio of the two that is good."""

    name: str
    baseline: str
    time_ms: float
    baseline_ms: float
    goal: float

    @property
    def ratio(self) -> float:
        """The call's time over the baseline's."""
        return self.time_ms / self.baseline_ms


def ratios(rounds: int = 15) -> list[Ratio]:
    """Time the cpu backend: 8 query heads over 2 kv heads of 64, fp32; decode is a batch of 16 with a window of 1024.

    The machine should be idle: a thread that waits for a core holds up every parallel operation.

    Args:
        rounds: timings of each call; a call and its baselines take turns, so that a slow moment hits all of them.
    """
    short = _swath(replace(DECODE, kv_lens=(4096,) * DECODE.num_seqs))
    token, channel = (_swath(replace(DECODE, quant=KVQuant(torch.int8, g))) for g in ("token", "channel"))
    long_ms, short_ms, token_ms, channel_ms = _medians_ms([_swath(DECODE), short, token, channel], rounds)
    prefill_ms, sdpa_ms = _medians_ms([_swath(PREFILL), _sdpa(make(PREFILL))], max(rounds // 5, 1))
    return [
        Ratio("decode at 32k", "decode at 4k", long_ms, short_ms, 1.3),
        Ratio("int8 decode, token", "fp32 decode", token_ms, long_ms, 1.5),
        Ratio("int8 decode, channel", "fp32 decode", channel_ms, long_ms, 1.5),
        Ratio("prefill 8k, window 512", "SDPA, band mask", prefill_ms, sdpa_ms, 0.25),
    ]


def main() -> None:
    """Measure and print a table."""
    from rich.console import Console  # optional: the ratios need torch alone
    from rich.table import Table

    table = Table(title=f"swath, impl='cpu', torch {torch.__version__}, {torch.get_num_threads()} threads, medians")
    table.add_column("case")
    table.add_column("against")
    for name in ("ms", "its ms", "ratio", "goal"):
        table.add_column(name, justify="right")
    for row in ratios():
        style = "green" if row.ratio <= row.goal else "red"
        times = (f"{row.time_ms:.2f}", f"{row.baseline_ms:.2f}", f"[{style}]{row.ratio:.2f}[/]", f"<= {row.goal:.2f}")
        table.add_row(row.name, row.baseline, *times)
    Console().print(table)


def _swath(case: Case) -> Call:
    inputs = make(case)
    public: Callable[..., Any] = attention if case.dense else paged_attention
    return lambda: public(*inputs.args, **inputs.options, impl="cpu")


def _sdpa(inputs: Inputs) -> Call:
    """torch's attention of one dense sequence, its band mask and the repeated heads made beforehand."""
    positions = torch.arange(inputs.q.shape[0])
    mask = Window(inputs.case.size).mask(positions, positions)
    q = inputs.q.transpose(0, 1)[None]
    k, v = (x[: len(positions)].repeat_interleave(inputs.case.group, 1).transpose(0, 1)[None] for x in inputs.args[1:3])
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _medians_ms(calls: list[Call], rounds: int) -> list[float]:
    """Median times of several calls that take turns."""
    for call in calls * WARM_UPS:
        call()
    times_ms: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times_ms, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times_ms]
