"""What the Triton backend answers for attention, dense or paged: the operators re-export it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swath.problem import Problem
from swath.target import on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.schedules.launcher import KernelCall


def why_not(problem: Problem) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(problem.q.device)


def plan(problem: Problem) -> str:
    """The launches in words."""
    return "; ".join(map(str, _calls(problem)))


def warm(problem: Problem) -> None:
    """Compile what ``run`` would launch."""
    for call in _calls(problem):
        call.compile()


def run(problem: Problem) -> None:
    """Launch."""
    with on_device(problem.q.device):
        for call in _calls(problem):
            call.run()


def _calls(problem: Problem) -> list[KernelCall]:
    from swath.schedules.kernels import calls_of  # here, so that asking why_not needs no Triton

    return calls_of(problem, target_of(problem.q.device))
