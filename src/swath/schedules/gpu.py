"""What the Triton backend answers for attention, dense or paged: the operators re-export it."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from swath.problem import Problem
from swath.target import on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.schedules.launcher import Plan

NAME = "triton"


def why_not(problem: Problem) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(problem.q.device)


def plan(problem: Problem) -> str:
    """The launches in words."""
    return str(_plan(problem))


def warm(problem: Problem) -> None:
    """Compile what ``run`` would launch."""
    with on_device(problem.q.device):
        _plan(problem).compile(_kernels().operands_of(problem))


def run(problem: Problem) -> None:
    """Launch."""
    device = problem.q.device
    with on_device(device):
        _plan(problem).run(_kernels().operands_of(problem), device)


def _plan(problem: Problem) -> Plan:
    """The plan that was made for the first call of this signature."""
    memo = {} if problem.memo is None else problem.memo
    if NAME not in memo:
        memo[NAME] = _kernels().plan_of(problem, target_of(problem.q.device))
    made: Plan = memo[NAME]
    return made


@cache
def _kernels() -> ModuleType:
    from swath.schedules import kernels  # here, so that asking why_not needs no Triton

    return kernels
