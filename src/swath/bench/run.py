"""Measuring a case: check every provider, then time those that passed in interleaved rounds, all in one process.

A round measures the machine's ceilings, then each provider in turn, the first one another one each round; a pause goes
before each. Ratios are taken within a round, so that heat and power, which move a round, move both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median, quantiles

import torch
from torch import Tensor

from swath.bench.case import BenchCase, Work, work_of
from swath.bench.clock import Ceilings, CpuClock, Graph, Run, capture, host_us
from swath.bench.gate import Gate
from swath.bench.inputs import Inputs, make_inputs
from swath.bench.providers import Provider
from swath.bench.results import Origin, Row, Timed

MAX_SETS, SETS_BYTES = 3, 4 << 30
"""Input sets that runs take in turn, so that no cache serves them: as many as fit."""
ROUND_US = 8000.0
"""A provider's runs in a round take about so long together."""
MIN_RUNS, MAX_RUNS = 2, 20

Progress = Callable[[str], None]


class BrokenDeviceError(RuntimeError):
    """A provider's failure took the device with it: nothing measured after it in this process would count."""


@dataclass
class _Contender:
    """A provider that passed the gate, and its times: a list for each round."""

    provider: Provider
    row: Row
    timed: Run
    eager: Run | None
    runs: int = MIN_RUNS
    times: list[list[float]] = field(default_factory=list)
    eager_times: list[list[float]] = field(default_factory=list)


def measure_case(
    case: BenchCase, providers: Sequence[Provider], clock: CpuClock, rounds: int, tell: Progress, origin: Origin
) -> list[Row]:
    """A row for each provider: its figures, or why there are none."""
    tell(f"{case.name}: inputs and truth")
    case = case.drawn(clock.device)
    work = work_of(case)
    sets = [make_inputs(case, clock.device)]
    count = min(MAX_SETS, max(SETS_BYTES // max(sets[0].nbytes, 1), 1))
    sets += [make_inputs(case, clock.device, seed) for seed in range(1, count)]
    gate = Gate(sets[0])
    rows: list[Row] = []
    contenders: dict[int, _Contender] = {}
    for provider in providers:
        tell(f"{case.name}: {provider.name}, check")
        row = Row(
            case=case.name, op=case.op, shape=case.shape, provider=provider.name, status="unable", origin=origin
        )  # fmt: skip
        contender = _admit(provider, case, sets, gate, clock, row)
        if contender is not None:
            contenders[len(rows)] = contender
        rows.append(row)
    ceilings, read_us = _time(list(contenders.values()), case, clock, work, rounds, tell)
    for place, contender in contenders.items():
        rows[place] = _figures(contender, work, ceilings, read_us)
    return rows


def _time(
    contenders: list[_Contender], case: BenchCase, clock: CpuClock, work: Work, rounds: int, tell: Progress
) -> tuple[list[Ceilings], float | None]:
    """Interleaved rounds: the ceilings of each, and what a plain read of as many bytes takes, where that says much."""
    ceilings, read_times = [], []
    plain = clock.plain_read(work.nbytes) if contenders and case.is_decode else None
    for i in range(rounds if contenders else 0):
        tell(f"{case.name}: round {i + 1} of {rounds}")
        clock.pause()
        ceilings.append(clock.ceilings())
        read_times += [] if plain is None else clock.times_us(plain, MIN_RUNS)
        turn = i % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            _one_turn(contender, clock)
    return ceilings, median(read_times) if read_times else None


def _admit(
    provider: Provider, case: BenchCase, sets: list[Inputs], gate: Gate, clock: CpuClock, row: Row
) -> _Contender | None:
    """The provider ready to be timed, or None; ``row`` gets its status, the reason, and its error."""
    row.reason = provider.why_not(case)
    if row.reason is not None:
        return None
    row.version = provider.version
    try:
        runs: list[Run] = [provider.prepare(inputs) for inputs in sets]
        passed = _judge(gate, runs[0](), provider, row)
        eager = None
        if passed and clock.device.type == "cuda" and case.is_decode:
            row.host_us = host_us(runs[0])
            row.extra_bytes = clock.extra_bytes(runs[0])
            graphs = _captured(provider, runs, row)
            if graphs:
                eager, runs = _rotating(runs), graphs
                passed = _judge(gate, runs[0](), provider, row)
        if not passed:
            return None
        if eager is None:
            row.extra_bytes = clock.extra_bytes(runs[0])
        contender = _Contender(provider, row, _rotating(runs), eager)
        estimate = max(min(clock.times_us(contender.timed, 2)), 1.0)
        contender.runs = int(min(max(ROUND_US / estimate, MIN_RUNS), MAX_RUNS))
    except NotImplementedError as error:
        row.reason = _one_line(error)
        return None
    except Exception as error:  # noqa: BLE001 - whatever another library raises is a result, stored and printed
        row.status, row.reason = "failed", f"{type(error).__name__}: {_one_line(error)}"
        _check_device(clock.device, provider, case)
        return None
    if provider.launch is not None:
        row.launch = provider.launch(sets[0])
    return contender


def _judge(gate: Gate, out: Tensor, provider: Provider, row: Row) -> bool:
    """Whether a result may be timed; ``row`` gets its error, and why it may not."""
    verdict = gate.check(out, p_e4m3=provider.p_e4m3)
    row.error, row.budget_used = verdict.error, verdict.budget_used
    if not verdict.passed:
        used = f"{verdict.budget_used:.3g} of its error budget (error {verdict.error:.1e})"
        row.status, row.reason = "refused", f"a sampled row uses {used}"
    return verdict.passed


def _captured(provider: Provider, runs: list[Run], row: Row) -> list[Run]:
    """Each call as a CUDA graph, replayed once over an output of NaN; none where a peer's call cannot be captured."""
    try:
        graphs: list[Graph] = [capture(run) for run in runs]
    except Exception as error:
        if provider.launch is not None:
            raise
        row.graph_error = _one_line(error)
        return []
    for graph in graphs:
        graph.out.fill_(torch.nan)
        graph()
    return list(graphs)


def _rotating(runs: list[Run]) -> Run:
    turns = cycle(runs)
    return lambda: next(turns)()


def _one_turn(contender: _Contender, clock: CpuClock) -> None:
    clock.pause()
    contender.times.append(clock.times_us(contender.timed, contender.runs))
    if contender.eager is not None:
        contender.eager_times.append(clock.times_us(contender.eager, contender.runs))


def _figures(contender: _Contender, work: Work, ceilings: list[Ceilings], read_us: float | None) -> Timed:
    """Medians over the rounds; the floor of a round comes from its own matrix product and the run's best read."""
    rounds_us = [median(times) for times in contender.times]
    tenths = quantiles([t for times in contender.times for t in times], n=10, method="inclusive")  # no time beyond them
    read, copied = max(c.read_tb_per_s for c in ceilings), median(c.copy_tb_per_s for c in ceilings)
    bytes_us = work.nbytes / read / 1e6
    floors = [max(bytes_us, work.flops / c.matmul_tflop_per_s / 1e6) for c in ceilings]
    us, floor_us = median(rounds_us), median(floors)
    eager = contender.eager_times
    return Timed(
        **vars(contender.row) | {"status": "ok"},
        us=us,
        us_p10_p90=[tenths[0], tenths[-1]],
        rounds_us=rounds_us,
        method="graph" if contender.eager is not None else "eager",
        floor_us=floor_us,
        bound="bytes" if bytes_us >= floor_us else "matmul",
        x_floor=median(t / floor for t, floor in zip(rounds_us, floors, strict=True)),
        tflop_per_s=work.flops / us / 1e6,
        tb_per_s=work.nbytes / us / 1e6,
        flops=work.flops,
        nbytes=work.nbytes,
        cache_bytes=work.cache_bytes or None,
        read_tb_per_s=read,
        copy_tb_per_s=copied,
        matmul_tflop_per_s=median(c.matmul_tflop_per_s for c in ceilings),
        eager_us=median(median(times) for times in eager) if eager else None,
        read_us=read_us,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_device(device: torch.device, provider: Provider, case: BenchCase) -> None:
    """Raise where a failure took the device with it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            said = f"{provider.name} on {case.name!r} broke the device ({_one_line(error)})"
            raise BrokenDeviceError(said) from error


def release(device: torch.device) -> None:
    """Give back what a case held: memory, and compiled functions, whose number torch limits."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
