"""Searching launch rows: those around the present one, held to the gate and timed by the clock of ``bench run``.

Each row is a provider, so that a search is ``measure_case`` with rows for contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.clock import CpuClock
from swath.bench.inputs import Inputs, make_inputs
from swath.bench.judge import advantage, best, tie_of
from swath.bench.providers import Provider
from swath.bench.providers.own import GPU_BACKENDS, call_of
from swath.bench.results import Row
from swath.bench.run import Progress, measure_case
from swath.launch import (
    Features,
    TileLaunch,
    Tuning,
    box_rows,
    fitting,
    is_short,
    split_launch,
    tile_launch,
)
from swath.problem import Problem
from swath.schedules.kernels import operands_of, plan_of
from swath.schedules.launcher import KernelCall, Plan
from swath.target import Target, on_device, target_of
from swath.tooling import explain, prepare

KERNELS = {"splits": "split_kernel", "tiles": "tile_kernel", "hopper": "hopper_tile_kernel"}
"""Schedules and the kernel that each of them launches."""
MOST_CHANGES = 2
"""Fields in which a row may differ from the present one: some only pay together."""
MOST_RESIDENT = 16
"""Programs on a multiprocessor that a row may be said to have."""

Axes = dict[str, tuple[int, ...]]
"""Values to try by field, the present one first."""


@dataclass(frozen=True)
class Candidate:
    """A row to try.

    - name: its values in words
    - tuning: the row as it is launched; settled: as it would be pasted
    - cut: whether the table's own rule would cut it to the target's shared memory
    """

    name: str
    tuning: Tuning
    settled: Tuning
    cut: bool = False

    def code(self, source: str) -> str:
        """The line for launch.py; ``source`` says where it was measured."""
        row = self.settled
        if row.hopper is not None:
            values = f"{row.hopper.block_n}, {row.hopper.stages}, {row.hopper.q_stages}"
            return f"block_n, stages, q_stages = {values}  # {source}"
        if row.tile is not None:
            block_m, launch = row.tile
            return f"block_m, launch = {block_m}, {_spelled(launch, source)}"
        if row.split is None:
            raise TypeError("a candidate has a row")
        note = "" if row.num_splits is None else f"  # and {row.num_splits} splits, which num_splits_for does not give"
        return f"launch = {_spelled(row.split, source)}{note}"


def _spelled(launch: TileLaunch, source: str) -> str:
    resident = "" if launch.resident == TileLaunch.resident else f", resident={launch.resident}"
    return f'TileLaunch({launch.block_n}, {launch.warps}, {launch.stages}, "{source}"{resident})'


def source_of(machine: Row) -> str:
    """Where a row was measured, as launch.py says it, from ``results.describe``."""
    gpu = str(machine["gpu"] or machine["cpu"]).removeprefix("NVIDIA ")
    torch_version, triton_version = (".".join(str(machine[key]).split(".")[:2]) for key in ("torch", "triton"))
    return f"{gpu}, torch {torch_version}, Triton {triton_version}, {machine['date']}"


def candidates_of(problem: Problem, target: Target, schedule: str, tiles: str) -> list[Candidate]:
    """The rows around the one that a schedule launches a call with, which comes first.

    Raises:
        NotImplementedError: the call does not use the schedule.
    """
    call = _call(plan_of(problem, target, tiles), schedule)
    if call is None:
        raise NotImplementedError(f"launches no {schedule}")
    return list(_AROUND[schedule](problem, target, tiles, call))


def _around_split(problem: Problem, target: Target, tiles: str, call: KernelCall) -> Iterator[Candidate]:
    F, block_m = call.args["F"], call.args["BLOCK_M"]
    row = split_launch(F, target, block_m)
    axes = _tile_axes(row) | {"num_splits": _doubled(call.args["num_splits"], 1, 4096)}
    for name, values in _rows(axes):
        num_splits = values.pop("num_splits")
        launch = replace(row, **values)
        settled = _settled(problem, target, tiles, launch, num_splits)
        tuning = Tuning(split=launch, num_splits=num_splits)
        yield Candidate(name, tuning, settled, _is_cut(launch, F, block_m, target))


def _around_tile(problem: Problem, target: Target, _tiles: str, call: KernelCall) -> Iterator[Candidate]:
    F = call.args["F"]
    block_m, row = tile_launch(F, target, is_short(problem.window))
    for name, values in _rows({"block_m": _doubled(block_m, 16, 256)} | _tile_axes(row)):
        block_m = values.pop("block_m")
        launch = replace(row, **values)
        tuning = Tuning(tile=(block_m, launch))
        yield Candidate(name, tuning, tuning, _is_cut(launch, F, block_m, target))


def _around_hopper(_problem: Problem, _target: Target, _tiles: str, call: KernelCall) -> Iterator[Candidate]:
    F, row = call.args["F"], call.args["C"]
    axes = {
        "block_n": _doubled(row.block_n, 32, 256),
        "stages": _beside(row.stages, 2),  # one stage would overlap nothing
        "q_stages": _beside(row.q_stages, 1),
    }
    for name, values in _rows(axes):
        tuning = Tuning(hopper=replace(row, **values, box_rows=box_rows(F, values["block_n"])))
        yield Candidate(name, tuning, tuning)


_AROUND: dict[str, Callable[[Problem, Target, str, KernelCall], Iterator[Candidate]]] = {
    "splits": _around_split,
    "tiles": _around_tile,
    "hopper": _around_hopper,
}


def _tile_axes(row: TileLaunch) -> Axes:
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


def _settled(problem: Problem, target: Target, tiles: str, launch: TileLaunch, num_splits: int) -> Tuning:
    """The row that launches the same from the table: its ``resident`` decides how many slices there are."""
    tuning = Tuning(split=launch, num_splits=num_splits)
    wanted = str(plan_of(problem, target, tiles, tuning))
    for resident in (launch.resident, *range(1, MOST_RESIDENT + 1)):
        alone = Tuning(split=replace(launch, resident=resident))
        if str(plan_of(problem, target, tiles, alone)) == wanted:
            return alone
    return tuning


def _is_cut(launch: TileLaunch, F: Features, block_m: int, target: Target) -> bool:
    return fitting(launch, F, block_m, target) != launch


def _call(plan: Plan, schedule: str) -> KernelCall | None:
    """The launch of a schedule in a plan."""
    return next((call for call in plan.calls if call.kernel.fn.__name__ == KERNELS[schedule]), None)


@dataclass(frozen=True)
class Search:
    """A schedule's rows for one case: ``rows`` has the outcome of each of ``candidates``, the present row first."""

    schedule: str
    candidates: list[Candidate]
    rows: list[Row]

    def fastest(self) -> tuple[Candidate, Row] | None:
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
        if "x_present" not in row:
            return "the present row has no time"
        share = row["x_present"]
        tie = tie_of(row["op"])
        return f"x{share:.3f} of the present row" + (f", a tie up to {tie:.0%}" if share >= 1 - tie else "")


def search_case(
    case: BenchCase, schedule: str | None, clock: CpuClock, rounds: int, tell: Progress
) -> Iterator[Search]:
    """Search the rows of a schedule for a case; of None, those of each schedule that the case uses here.

    Raises:
        NotImplementedError: the case does not use the schedule, or nothing that has rows.
    """
    tell(f"{case.name}: rows")
    inputs = make_inputs(case, case.draw.lengths(clock.device), clock.device)
    todo = _todo(inputs, schedule)
    del inputs
    for name, tiles, candidates in todo:
        providers = tuple(_provider(candidate, tiles) for candidate in candidates)
        rows = measure_case(case, providers, clock, rounds, tell)
        for row in rows:
            if row["status"] == rows[0]["status"] == "ok":
                row["x_present"] = advantage(rows[0], row)
        yield Search(name, candidates, rows)


def _todo(inputs: Inputs, schedule: str | None) -> list[tuple[str, str, list[Candidate]]]:
    """Schedules, whose tiles a plan with them has, and rows to try."""
    function, args, options = call_of(inputs)
    said, problem = explain(function, *args, **options), prepare(function, *args, **options)
    tiles = {None: said.backend or "nothing", "hopper": "hopper"}.get(schedule, "triton")
    reason = said.reasons[tiles] if tiles in GPU_BACKENDS else f"runs on {tiles}, which has no rows"
    if reason is not None:
        raise NotImplementedError(reason)
    target = target_of(problem.q.device)
    plan = plan_of(problem, target, tiles)
    names = [schedule] if schedule else [name for name in KERNELS if _call(plan, name) is not None]
    return [(name, tiles, candidates_of(problem, target, name, tiles)) for name in names]


def _provider(candidate: Candidate, tiles: str) -> Provider:
    """Who launches calls with this row."""

    def planned(inputs: Inputs) -> Plan:
        function, args, options = call_of(inputs)
        problem = prepare(function, *args, **options)
        return plan_of(problem, target_of(problem.q.device), tiles, candidate.tuning)

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
