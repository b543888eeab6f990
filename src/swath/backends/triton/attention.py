"""Attention in Triton, dense or paged: plans are made once for each signature, then launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, cast

from swath.backends.triton.tuning import UNTUNED, Tuning
from swath.problem import Problem
from swath.target import Target, on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.backends.triton.plan import AddTiles
    from swath.backends.triton.runtime import Plan


@dataclass(frozen=True)
class Runner:
    """Plans, compiles and launches calls for a backend.

    name: the backend, under which a call remembers its plan.
    prefill: imports the backend's own planner of prefill tiles; None takes Triton's tiles.
    """

    name: str
    prefill: Callable[[], AddTiles] | None = None

    def plan(self, problem: Problem) -> str:
        """The launches in words."""
        return str(self._plan(problem))

    def warm(self, problem: Problem) -> None:
        """Compile what ``run`` would launch."""
        with on_device(problem.q.device):
            self._plan(problem).compile(_kernels().operands_of(problem))

    def run(self, problem: Problem) -> None:
        """Launch."""
        device = problem.q.device
        with on_device(device):
            self._plan(problem).run(_kernels().operands_of(problem), device)

    def _plan(self, problem: Problem) -> Plan:
        """The plan that was made for the first call of this signature."""
        target = target_of(problem.q.device)
        made: Plan = problem.remembered(self.name, lambda: self.plan_for(problem, target))
        return made

    def plan_for(self, problem: Problem, target: Target, tuning: Tuning = UNTUNED) -> Plan:
        """A new plan for a call on a target."""
        prefill = None if self.prefill is None else self.prefill()
        return cast("Plan", _kernels().plan_of(problem, target, prefill, tuning))


@cache
def _kernels() -> ModuleType:
    from swath.backends.triton import plan as kernels  # here, so that asking why_not needs no Triton

    return kernels


def why_not(problem: Problem) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(problem.q.device)


runner = Runner("triton")
plan, warm, run = runner.plan, runner.warm, runner.run
