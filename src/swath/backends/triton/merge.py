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
    return f"merge_kernel x {case.lse_a.numel()}"


def warm(case: MergeCase) -> None:
    """Compile what ``run`` would launch."""
    _launch(case, warm=True)


def run(case: MergeCase) -> None:
    """Launch."""
    _launch(case, warm=False)


def _launch(case: MergeCase, warm: bool) -> None:
    import triton

    from swath.backends.triton.kernels.merge import merge_kernel

    rows, head_dim = case.lse_a.numel(), case.out_a.shape[-1]
    if rows == 0:
        return
    inputs: list[Any] = [x.contiguous() for x in (case.out_a, case.lse_a, case.out_b, case.lse_b)]
    constants = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "num_warps": 1} | FUSED
    if warm:
        merge_kernel.warmup(*inputs, case.out, case.lse, **constants, grid=(rows,))
    else:
        with on_device(case.out.device):
            merge_kernel[(rows,)](*inputs, case.out, case.lse, **constants)
