"""Searching launch rows: those around the present one, held to the gate and timed by the clock of ``bench run``.

Each row is a provider, so that a search is ``measure_case`` with rows for contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from itertools import product
from typing import Any

from torch import Tensor

from swath.backends.hopper import attention as hopper
from swath.backends.hopper.heuristics import HopperHeuristics, HopperLaunch, box_rows
from swath.backends.triton import attention as triton
from swath.backends.triton.arguments import operands_of
from swath.backends.triton.attention import Runner
from swath.backends.triton.features import Features
from swath.backends.triton.heuristics import Heuristics
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch, fitting
from swath.backends.triton.runtime import KernelCall, Plan
from swath.backends.triton.work import Work
from swath.bench.case import BenchCase
from swath.bench.clock import CpuClock
from swath.bench.inputs import Inputs, make_inputs
from swath.bench.judge import advantage, best, tie_of
from swath.bench.providers import Provider
from swath.bench.providers.own import GPU_BACKENDS, call_of
from swath.bench.results import Origin, Row, Timed, timed
from swath.bench.run import Progress, measure_case
from swath.ops.explain import explain, prepare
from swath.problem import Problem
from swath.target import Target, on_device, target_of

KERNELS = {"splits": "split_kernel", "tiles": "tile_kernel", "hopper": "hopper_tile_kernel"}
"""Schedules and the kernel that each of them launches."""
RUNNERS: dict[str, Runner[Any]] = {"triton": triton.runner, "hopper": hopper.runner}
"""The backends whose rows are tuned."""
MOST_CHANGES = 2
"""Fields in which a row may differ from the present one: some only pay together."""
MOST_RESIDENT = 16
"""Programs on a multiprocessor that a line may claim for its row."""
DECIDED_BY_CALL = ("pack", "box_rows", "uniform", "sections")
"""Fields of a launch that are not the row's."""

Axes = dict[str, tuple[int, ...]]
"""Values to try by field, the present one first."""


@dataclass(frozen=True)
class Candidate:
    """A row to try.

    - name: its values in words
    - heuristics: the backend's, with this row in place of the present one
    - line: the row for the table, nvidia.py or amd.py, or Hopper's heuristics.py
    - cut: whether the table's own rule would cut it to the target's shared memory
    """

    name: str
    heuristics: Heuristics
    line: str
    cut: bool = False


def source_of(origin: Origin) -> str:
    """Where a row was measured, as the tables say it."""
    gpu = origin.machine.removeprefix("NVIDIA ")
    torch_version, triton_version = (".".join(str(version).split(".")[:2]) for version in (origin.torch, origin.triton))
    return f"{gpu}, torch {torch_version}, Triton {triton_version}, {origin.date}"


@dataclass(frozen=True, eq=False)
class Present:
    """A call, the launch in it whose row is tuned, and what rows measured now are to say of their source."""

    problem: Problem
    target: Target
    runner: Runner[Any]
    call: KernelCall
    source: str

    @property
    def features(self) -> Features:
        """What the kernel is compiled for."""
        features: Features = self.call.args["F"]
        return features

    @property
    def heuristics(self) -> Heuristics:
        """The backend's."""
        heuristics: Heuristics = self.runner.heuristics
        return heuristics

    def launches(self, heuristics: Heuristics) -> str:
        """What the call launches then, in words."""
        return str(self.runner.plan_for(self.problem, self.target, heuristics))


def candidates_of(problem: Problem, target: Target, schedule: str, tiles: str, source: str) -> list[Candidate]:
    """The rows around the one that a schedule launches a call with, which comes first.

    Raises:
        NotImplementedError: the call does not use the schedule.
    """
    runner = RUNNERS[tiles]
    call = _call(runner.plan_for(problem, target, runner.heuristics), schedule)
    if call is None:
        raise NotImplementedError(f"launches no {schedule}")
    return list(_AROUND[schedule](Present(problem, target, runner, call, source)))


def _around_split(now: Present) -> Iterator[Candidate]:
    block_m = now.call.args["BLOCK_M"]
    row = replace(now.heuristics.split_launch(Work(now.problem, now.target), block_m), source=now.source)
    axes = _tile_axes(row) | {"num_splits": _doubled(now.call.args["num_splits"], 1, 4096)}
    for name, values in _rows(axes):
        num_splits = values.pop("num_splits")
        launch = replace(row, **values)
        cut = fitting(launch, now.features, block_m, now.target) != launch
        tried = _with_split(now, launch, num_splits)
        yield Candidate(name, tried, _split_line(now, launch, num_splits, tried), cut)


def _with_split(now: Present, launch: SplitLaunch, num_splits: int | None = None) -> Heuristics:
    """With as many splits as the rule gives, or as the test says."""
    tried = replace(now.heuristics, split_launch=lambda *_: launch)
    return tried if num_splits is None else replace(tried, num_splits=lambda *_: num_splits)


def _split_line(now: Present, launch: SplitLaunch, num_splits: int, tried: Heuristics) -> str:
    """The row that launches the same from the table, where ``resident`` decides how many slices there are."""
    wanted = now.launches(tried)
    for resident in (launch.resident, *range(1, MOST_RESIDENT + 1)):
        alone = replace(launch, resident=resident)
        if now.launches(_with_split(now, alone)) == wanted:
            return _spelled(alone)
    return f"{_spelled(launch)}  # and {num_splits} splits, which the rule of num_splits does not give"


def _around_tile(now: Present) -> Iterator[Candidate]:
    args, warps = now.call.args, now.call.options["num_warps"]
    row = TileLaunch(args["BLOCK_M"], args["BLOCK_N"], warps, args["STAGES"], now.source)
    for name, values in _rows({"block_m": _doubled(row.block_m, 16, 256)} | _tile_axes(row)):
        launch = replace(row, **values)
        cut = fitting(launch, now.features, launch.block_m, now.target) != launch
        yield Candidate(name, _with_tile(now, launch), _spelled(launch), cut)


def _with_tile(now: Present, launch: TileLaunch) -> Heuristics:
    """A plan may have tiles over the cache beside those over what is dequantised: the row is for one of them."""
    others = now.heuristics.tile_launch
    return replace(now.heuristics, tile_launch=lambda work: launch if work.features == now.features else others(work))


def _around_hopper(now: Present) -> Iterator[Candidate]:
    row: HopperLaunch = now.call.args["LAUNCH"]
    axes = {
        "block_n": (row.block_n,) if row.narrow_n else _doubled(row.block_n, 32, 256),  # one pass holds all keys
        "stages": _beside(row.stages, 2),  # one stage would overlap nothing
        "q_stages": _beside(row.q_stages, 1),
    }
    for name, values in _rows(axes):
        launch = replace(row, **values)
        launch = replace(launch, box_rows=box_rows(now.features, launch))
        yield Candidate(name, _with_hopper(now, launch), f"{_spelled(launch)}  # {now.source}")


def _with_hopper(now: Present, launch: HopperLaunch) -> Heuristics:
    heuristics: HopperHeuristics = now.runner.heuristics
    return replace(heuristics, hopper_launch=lambda _work: launch)


_AROUND: dict[str, Callable[[Present], Iterator[Candidate]]] = {
    "splits": _around_split,
    "tiles": _around_tile,
    "hopper": _around_hopper,
}


def _tile_axes(row: SplitLaunch | TileLaunch) -> Axes:
    return {
        "block_n": _doubled(row.block_n, 16, 256),
        "warps": _doubled(row.warps, 1, 16),
        "stages": _beside(row.stages, 1),
    }


def _doubled(value: int, low: int, high: int) -> tuple[int, ...]:
    return value, *(n for n in (value // 2, value * 2) if low <= n <= high)


def _beside(value: int, low: int) -> tuple[int, ...]:
    return value, *(n for n in (value - 1, value + 1) if low <= n)


def _rows(axes: Axes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and values, the present ones first."""
    for values in product(*axes.values()):
        changes = sum(value != axis[0] for value, axis in zip(values, axes.values(), strict=True))
        if changes <= MOST_CHANGES:
            row = dict(zip(axes, values, strict=True))
            said = ", ".join(f"{field} {value}" for field, value in row.items())
            yield f"{said}, present" if changes == 0 else said, row


def _spelled(launch: SplitLaunch | TileLaunch | HopperLaunch) -> str:
    """The row as code: its shape, and what differs from the defaults, but not what a call decides."""
    said = []
    for field in fields(launch):
        value = getattr(launch, field.name)
        if field.default is MISSING:
            said.append(repr(value))
        elif value != field.default and field.name not in DECIDED_BY_CALL:
            said.append(f"{field.name}={value!r}")
    return f"{type(launch).__name__}({', '.join(said)})"


def _call(plan: Plan, schedule: str) -> KernelCall | None:
    """The launch of a schedule in a plan."""
    return next((call for call in plan.calls if call.kernel.fn.__name__ == KERNELS[schedule]), None)


@dataclass(frozen=True)
class Search:
    """A schedule's rows for one case: ``rows`` has the outcome of each of ``candidates``, the present row first."""

    schedule: str
    candidates: list[Candidate]
    rows: list[Row]

    def fastest(self) -> tuple[Candidate, Timed] | None:
        """The row that won, if any has a time."""
        row = best(self.rows)
        return None if row is None else (self.candidates[self.rows.index(row)], row)

    def verdict(self) -> str:
        """The best row against the present one."""
        row, present = best(self.rows), self.rows[0]
        if row is None:
            return "no row has a time"
        if row is present:
            return "the present row is the fastest"
        share, tie = row.x_present, tie_of(row.op)
        if share is None:
            return "the present row has no time"
        return f"x{share:.3f} of the present row" + (f", a tie up to {tie:.0%}" if share >= 1 - tie else "")


def search_case(
    case: BenchCase, schedule: str | None, origin: Origin, clock: CpuClock, rounds: int, tell: Progress
) -> Iterator[Search]:
    """Search the rows of a schedule for a case; of None, those of each schedule that the case uses here.

    Raises:
        NotImplementedError: the case does not use the schedule, or nothing that has rows.
    """
    tell(f"{case.name}: rows")
    todo = _todo(make_inputs(case.drawn(clock.device), clock.device), schedule, source_of(origin))
    for name, tiles, candidates in todo:
        providers = tuple(_provider(candidate, tiles) for candidate in candidates)
        rows = measure_case(case, providers, clock, rounds, tell, origin)
        for row in timed(rows):
            if isinstance(rows[0], Timed):
                row.x_present = advantage(rows[0], row)
        yield Search(name, candidates, rows)


def _todo(inputs: Inputs, schedule: str | None, source: str) -> list[tuple[str, str, list[Candidate]]]:
    """Schedules, whose tiles a plan with them has, and rows to try."""
    function, args, options = call_of(inputs)
    said, problem = explain(function, *args, **options), prepare(function, *args, **options)
    tiles = {None: said.backend or "nothing", "hopper": "hopper"}.get(schedule, "triton")
    reason = said.reasons[tiles] if tiles in GPU_BACKENDS else f"runs on {tiles}, which has no rows"
    if reason is not None:
        raise NotImplementedError(reason)
    target = target_of(problem.q.device)
    plan = RUNNERS[tiles].plan_for(problem, target, RUNNERS[tiles].heuristics)
    names = [schedule] if schedule else [name for name in KERNELS if _call(plan, name) is not None]
    return [(name, tiles, candidates_of(problem, target, name, tiles, source)) for name in names]


def _provider(candidate: Candidate, tiles: str) -> Provider:
    """Who launches calls with this row."""

    def planned(inputs: Inputs) -> Plan:
        function, args, options = call_of(inputs)
        problem = prepare(function, *args, **options)
        return RUNNERS[tiles].plan_for(problem, target_of(problem.q.device), candidate.heuristics)

    def ready(inputs: Inputs) -> Callable[[], Tensor]:
        if candidate.cut:
            raise NotImplementedError("needs more shared memory than a program has here")
        plan = planned(inputs)
        function, args, options = call_of(inputs)

        def run() -> Tensor:
            problem: Problem = prepare(function, *args, **options)
            with on_device(problem.q.device):
                plan.run(operands_of(problem), problem.q.device)
            return problem.out

        return run

    return Provider(candidate.name, lambda _case: None, ready, launch=lambda inputs: str(planned(inputs)))
