"""What the Triton and Hopper backends answer for attention, dense or paged: the operators re-export it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from swath.problem import Problem
from swath.target import on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.schedules.launcher import Plan


@dataclass(frozen=True)
class Runner:
    """Plans, compiles and launches calls; ``tiles`` names whose tiles: "triton" or "hopper"."""

    tiles: str

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
        made: Plan = problem.remembered(self.tiles, lambda: _kernels().plan_of(problem, target, self.tiles))
        return made


@cache
def _kernels() -> ModuleType:
    from swath.schedules import kernels  # here, so that asking why_not needs no Triton

    return kernels


def why_not(problem: Problem) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(problem.q.device)


_runner = Runner("triton")
plan, warm, run = _runner.plan, _runner.warm, _runner.run
