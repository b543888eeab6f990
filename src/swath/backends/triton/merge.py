"""merge_states as one Triton kernel."""

from __future__ import annotations

from typing import Any

from swath.backends.triton.features import FUSED
from swath.problem import MergeCase
from swath.target import on_device, why_no_triton


def why_not(case: MergeCase) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(case.out_a.device)


def plan(case: MergeCase) -> str:
    """The launch in words."""
    return f"merge_kernel x {case.lse.numel()}"


def warm(case: MergeCase) -> None:
    """Compile what ``run`` would launch."""
    _launch(case, warm=True)


def run(case: MergeCase) -> None:
    """Launch."""
    _launch(case, warm=False)


def _launch(case: MergeCase, warm: bool) -> None:
    import triton

    from swath.backends.triton.kernels.merge import merge_kernel

    rows, head_dim = case.lse.numel(), case.out.shape[-1]
    if rows == 0:
        return
    inputs: list[Any] = [x.contiguous() for x in case.states]
    arguments = (*inputs, case.out, case.lse, len(inputs[-1]))
    constants = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BASE2": case.base2}
    options = {"num_warps": 1} | FUSED
    if warm:
        merge_kernel.warmup(*arguments, **constants, **options, grid=(rows,))
    else:
        with on_device(case.out.device):
            merge_kernel[(rows,)](*arguments, **constants, **options)
