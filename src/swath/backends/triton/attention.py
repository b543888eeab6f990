"""Attention in Triton, dense or paged: plans are made once for each signature, then launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from swath.backends.triton.arguments import operands_of
from swath.backends.triton.heuristics import TRITON, Heuristics
from swath.problem import Problem
from swath.target import Target, on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.backends.triton.plan import Tiles
    from swath.backends.triton.ready import ReadyCall
    from swath.backends.triton.runtime import Plan

H = TypeVar("H", bound=Heuristics)


@dataclass(frozen=True)
class Runner(Generic[H]):
    """Plans, compiles and launches calls for a backend.

    name: the backend, under which a call remembers its plan.
    heuristics: how its kernels are launched.
    tiles: imports the planner of its tiles, so that asking ``why_not`` needs no Triton.
    """

    name: str
    heuristics: H
    tiles: Callable[[], Tiles[H]]

    def plan(self, problem: Problem) -> str:
        """The launches in words."""
        return str(self._plan(problem))

    def warm(self, problem: Problem) -> None:
        """Compile and load what ``run`` would launch."""
        with on_device(problem.q.device):
            self._plan(problem).load(operands_of(problem))

    def run(self, problem: Problem) -> None:
        """Launch."""
        device = problem.q.device
        with on_device(device):
            self._plan(problem).run(operands_of(problem), device)

    def ready(self, problem: Problem, arguments: Sequence[Any]) -> ReadyCall | None:
        """Further calls like one that ran, launched from their arguments (see ``dispatch.ready``)."""
        from swath.backends.triton.ready import ready_call

        return ready_call(self._plan(problem), operands_of(problem), arguments, problem.q.device)

    def _plan(self, problem: Problem) -> Plan:
        """The plan that was made for the first call of this signature."""
        target = target_of(problem.q.device)
        made: Plan = problem.remembered(self.name, lambda: self.plan_for(problem, target, self.heuristics))
        return made

    def plan_for(self, problem: Problem, target: Target, heuristics: H) -> Plan:
        """A new plan for a call on a target, by its own heuristics or by others."""
        from swath.backends.triton.plan import plan_of

        return plan_of(problem, target, heuristics, self.tiles())


def why_not(problem: Problem) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(problem.q.device)


def _tiles() -> Tiles[Heuristics]:
    from swath.backends.triton.plan import triton_tiles

    return triton_tiles


runner = Runner("triton", TRITON, _tiles)
plan, warm, run, ready = runner.plan, runner.warm, runner.run, runner.ready
