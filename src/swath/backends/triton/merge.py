"""merge_states as one Triton kernel."""

from __future__ import annotations

from typing import Any

from swath.backends.triton.features import FUSED, block_of
from swath.problem import MergeCase
from swath.target import on_device, why_no_triton

ELEMENTS = 1024
"""Of a program, in rows."""


def why_not(case: MergeCase) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(case.out_a.device)


def plan(case: MergeCase) -> str:
    """The launch in words."""
    grid, constants = _grid(case)
    return f"merge_kernel x {grid} (ROWS {constants['ROWS']}, warps {constants['num_warps']})"


def warm(case: MergeCase) -> None:
    """Compile what ``run`` would launch."""
    _launch(case, warm=True)


def run(case: MergeCase) -> None:
    """Launch."""
    _launch(case, warm=False)


def _launch(case: MergeCase, warm: bool) -> None:
    from swath.backends.triton.kernels.merge import merge_kernel

    grid, constants = _grid(case)
    if grid == 0:
        return
    inputs: list[Any] = [x.contiguous() for x in case.states]
    arguments = (*inputs, case.out, case.lse, len(inputs[-1]), case.lse.numel())
    if warm:
        merge_kernel.warmup(*arguments, **constants, grid=(grid,))
    else:
        with on_device(case.out.device):
            merge_kernel[(grid,)](*arguments, **constants)


def _grid(case: MergeCase) -> tuple[int, dict[str, Any]]:
    """How many programs, and what they are compiled for."""
    head_dim = case.out.shape[-1]
    block_d = block_of(head_dim, least=1)
    rows = max(ELEMENTS // block_d, 1)
    constants = {"D": head_dim, "BLOCK_D": block_d, "ROWS": rows, "BASE2": case.base2, "num_warps": 4}
    return -(-case.lse.numel() // rows), constants | FUSED
