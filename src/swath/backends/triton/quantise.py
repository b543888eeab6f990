"""quantise_q as one Triton kernel, byte-equal to its twin in torch (reference/quantise.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swath.backends.triton.arguments import Operands
from swath.problem import QuantiseCase, remembered
from swath.quant import LARGEST
from swath.target import Target, on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.backends.triton.ready import ReadyCall
    from swath.backends.triton.runtime import Plan

ELEMENTS = 4096
"""Of a program, which has as many rows of this many together."""


def why_not(case: QuantiseCase) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(case.q.device)


def plan(case: QuantiseCase) -> str:
    """The launch in words."""
    return str(plan_for(case, target_of(case.q.device)))


def warm(case: QuantiseCase) -> None:
    """Compile and load what ``run`` would launch."""
    with on_device(case.q.device):
        _plan(case).load(operands_of(case))


def run(case: QuantiseCase) -> None:
    """Launch."""
    device = case.q.device
    with on_device(device):
        _plan(case).run(operands_of(case), device)


def ready(case: QuantiseCase, arguments: Sequence[Any]) -> ReadyCall | None:
    """Further calls like one that ran, launched from their arguments (see ``dispatch.ready``)."""
    from swath.backends.triton.ready import ready_call

    return ready_call(_plan(case), operands_of(case), arguments, case.q.device, ("out", "q_scale"))


def _plan(case: QuantiseCase) -> Plan:
    """The launch that was planned for the first call of this signature."""
    made: Plan = remembered(case.memo, "triton", lambda: plan_for(case, target_of(case.q.device)))
    return made


def plan_for(case: QuantiseCase, target: Target) -> Plan:
    """The launch on a target that need not be here."""
    import torch

    from swath.backends.triton.kernels.quantise import quantise_q_kernel
    from swath.backends.triton.runtime import KernelCall, Plan

    steps, heads, head_dim = case.q.shape[-3:]
    strides = case.q.stride() if case.q.dim() == 4 else (0, *case.q.stride())
    rows = case.q.shape[:-1].numel()
    if rows == 0 and case.scale is None:
        return Plan()
    block_d = 1 << (head_dim - 1).bit_length()
    args: dict[str, Any] = {
        "num_rows": rows, "steps": steps, "q_seq": strides[0], "q_token": strides[1], "q_head": strides[2],
        "HEADS": heads, "D": head_dim, "BLOCK_D": block_d, "ROWS": max(ELEMENTS // block_d, 1),
        "LARGEST": LARGEST[case.out.dtype], "HARDWARE": target.has_pairs("e4m3"),
    }  # fmt: skip
    programs = max(-(-rows // args["ROWS"]), 1)  # one where there is no row, for the static scale
    return Plan([KernelCall(quantise_q_kernel, programs, args, {"num_warps": 4}, views={"out": torch.uint8})])


def operands_of(case: QuantiseCase) -> Operands:
    """The tensors of a call by the names of the kernel's parameters."""
    return {"q": case.q, "scale": case.scale, "out": case.out, "q_scale": case.q_scale}
