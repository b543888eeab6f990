"""One job from the start of the engine to a row of results."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

import torch

from swath.bench.results import Origin, Row, Served
from swath.bench.serving.check import check
from swath.bench.serving.engine import Engine, Job, Load
from swath.bench.serving.profile import Kernel, Spent, profiled, spent
from swath.bench.serving.traffic import prompts, seconds, steps

MOST_GRAPHED = 64
"""Requests of one step up to which decode runs in CUDA graphs."""
MOST_REQUESTS = MOST_GRAPHED + 8
TIMED_STEPS, PROFILED_STEPS = 40, 8
"""Of the decode, in this order: a profiler that was at work once slows the launches that follow. Other tokens come
before, while later prompts are prefilled."""
LOOPS, ROUNDS = 5, 100_000
"""The host's speed is that of an empty loop in Python: ``ROUNDS`` iterations, the fastest of ``LOOPS`` runs."""
PROFILED_PROMPTS = 2
SINGLES = 3

Start = Callable[[Job, Load], Engine]
Tell = Callable[[str], None]


def new_row(job: Job, load: Load, origin: Origin, version: str | None = None) -> Row:
    """A row that says nothing yet."""
    return Row(
        case=job.case, op="serve", shape=f"{job.model.in_words(job.layers)}; {load}", provider=job.backend,
        version=version, status="failed", origin=origin,
    )  # fmt: skip


def measure(job: Job, load: Load, start: Start, origin: Origin, tell: Tell) -> Row:
    """Start the engine, send it a first prompt, check it, then time prefill and decode."""
    tell("engine starts")
    begin = time.perf_counter()
    engine = start(job, load)
    start_s = time.perf_counter() - begin
    row = new_row(job, load, origin, engine.version)
    tell("first prompt")
    first_prompt_s = seconds(engine, prompts(1, load.prompt_len, 0), 1)
    tell("checks")
    checker, apart, wrong = check(engine, job, MOST_GRAPHED)
    row.error, row.budget_used = checker.error, checker.budget_used
    if wrong is not None:
        row.status, row.reason = "refused", wrong
        return row
    tell("prefill")
    singles = [seconds(engine, prompts(1, load.prompt_len, seed), 1) for seed in range(1, 1 + SINGLES)]
    prefill_s = seconds(engine, prompts(load.prompts, load.prompt_len, 100), 1)
    sensors = _sensors()
    tell("decode")
    decode = _decode(engine, load)
    prefill = _profiled_prefill(engine, load)
    return Served(
        **vars(row) | {"status": "ok"},
        layers=job.layers,
        depth=job.model.depth,
        cache=job.cache,
        graphs=engine.graphs,
        checked_calls=checker.looked,
        graph_difference=apart if isfinite(apart) else None,
        start_s=start_s,
        first_prompt_s=first_prompt_s,
        first_token_ms=median(singles) * 1e3,
        prefill_tokens_per_s=load.prompts * load.prompt_len / prefill_s,
        decode_tokens_per_s=load.sequences / decode.step_us * 1e6,
        decode_step_us=decode.step_us,
        host_loop_ms=decode.host_loop_ms,
        all_first_tokens_s=decode.first_tokens_s,
        **_figures("decode", decode.spent),
        **_figures("prefill", prefill),
        **sensors,
    )


def _sensors() -> dict[str, Any]:
    """The driver's last sample of clock and power, which spans up to a second; nothing without nvidia-ml-py."""
    if not torch.cuda.is_available():
        return {}
    try:
        clock, milliwatts = torch.cuda.clock_rate(), torch.cuda.power_draw()
    except Exception:  # noqa: BLE001 - NVML's errors are classes of a package that may be missing
        return {}
    return {"prefill_clock_mhz": float(clock), "prefill_power_w": milliwatts / 1e3}


def _figures(name: str, found: Spent | None) -> dict[str, Any]:
    return {} if found is None else {f"{name}_{part}": us for part, us in found._asdict().items()}


@dataclass(frozen=True)
class Decode:
    """Of all sequences together: seconds to the last first token, a step's median wall time, the host's speed (see
    ``Served.host_loop_ms``), and a step's GPU time."""

    first_tokens_s: float
    step_us: float
    host_loop_ms: float
    spent: Spent | None


def _host_loop_ms() -> float:
    """How long an empty loop takes in this process now. On a shared machine Python may run at half its speed."""
    return min(timeit.repeat(number=ROUNDS, repeat=LOOPS)) * 1e3


def _decode(engine: Engine, load: Load) -> Decode:
    """Steps that give every sequence a token, first timed, then profiled."""
    first_tokens_s, last = 0.0, None
    gaps: list[float] = []
    kernels: list[Kernel] = []
    on_gpu = torch.cuda.is_available()
    before_ms = _host_loop_ms()
    going = steps(engine, prompts(load.sequences, load.context, 200), load.new_tokens)
    for step in going:
        if step.has_all and not first_tokens_s:
            first_tokens_s = step.seconds
        if kernels:
            continue
        full = step.tokens == load.sequences
        if full and last is not None:
            gaps.append(step.seconds - last)
        last = step.seconds if full else None
        if on_gpu and len(gaps) == TIMED_STEPS:
            with profiled(kernels):
                for _ in range(PROFILED_STEPS):
                    next(going)
    if not gaps:
        raise RuntimeError(
            f"no step gave all {load.sequences} sequences a token: the engine has room for fewer at once"
        )
    found = spent(kernels).each(PROFILED_STEPS) if kernels else None
    return Decode(first_tokens_s, median(gaps) * 1e6, max(before_ms, _host_loop_ms()), found)


def _profiled_prefill(engine: Engine, load: Load) -> Spent | None:
    """GPU time of a few prompts together."""
    if not torch.cuda.is_available():
        return None
    kernels: list[Kernel] = []
    with profiled(kernels):
        seconds(engine, prompts(PROFILED_PROMPTS, load.prompt_len, 300), 1)
    return spent(kernels).each(PROFILED_PROMPTS)
