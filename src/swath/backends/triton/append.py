"""append_kv as one Triton kernel, byte-equal to its twin in torch (reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from swath.backends.triton.arguments import Operands
from swath.backends.triton.features import cache_features, kernel_dtype, kernel_scale, token_strides
from swath.problem import AppendCase, remembered
from swath.quant import LARGEST
from swath.target import Target, on_device, target_of, why_no_triton

if TYPE_CHECKING:
    from swath.backends.triton.ready import ReadyCall
    from swath.backends.triton.runtime import Plan

ELEMENTS = 1024
"""Of K that a program copies, in rows. With twice as many, appends of prompts to int8 caches take 0.81 to 0.85 of the
time, and those of decode to 8-bit caches 1.2 to 1.35 (on an H200; docs/notes/prefill.md)."""


def why_not(case: AppendCase) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(case.k.device)


def plan(case: AppendCase) -> str:
    """The launch in words."""
    return str(plan_for(case, target_of(case.k.device)))


def warm(case: AppendCase) -> None:
    """Compile and load what ``run`` would launch."""
    with on_device(case.k.device):
        _plan(case).load(operands_of(case))


def run(case: AppendCase) -> None:
    """Launch."""
    device = case.k.device
    with on_device(device):
        _plan(case).run(operands_of(case), device)


def ready(case: AppendCase, arguments: Sequence[Any]) -> ReadyCall | None:
    """Further calls like one that ran, launched from their arguments (see ``dispatch.ready``)."""
    from swath.backends.triton.ready import ready_call

    return ready_call(_plan(case), operands_of(case), arguments, case.k.device)


def _plan(case: AppendCase) -> Plan:
    """The launch that was planned for the first call of this signature."""
    made: Plan = remembered(case.memo, "triton", lambda: plan_for(case, target_of(case.k.device)))
    return made


def plan_for(case: AppendCase, target: Target) -> Plan:
    """The launch on a target that need not be here."""
    from swath.backends.triton.kernels.append import append_kernel
    from swath.backends.triton.runtime import KernelCall, Plan

    cache, k, v = case.cache, case.k, case.v
    rows = k.shape[0] * cache.num_kv_heads
    if rows == 0:
        return Plan()
    features = cache_features(cache)
    args: dict[str, Any] = {
        "num_rows": rows,
        "num_slots": cache.num_pages * cache.page_size,
        "F": features,
        "ROWS": ELEMENTS // features.block_d,
        "LARGEST": LARGEST.get(cache.k.dtype, 1.0),
        "HARDWARE": target.has_pairs("e4m3"),
    }
    args |= _strides("k_token k_head", k) | _strides("v_token v_head", v)
    args |= _strides("page_stride head_stride token_stride", cache.k)
    for name, scale in (("ks", cache.k_scale), ("vs", cache.v_scale)):
        args |= dict(zip((f"{name}_page", f"{name}_head", f"{name}_token"), token_strides(scale), strict=True))
    views = {name: kernel_dtype(cache.k.dtype) for name in ("cache_k", "cache_v")}
    return Plan([KernelCall(append_kernel, -(-rows // args["ROWS"]), args, {"num_warps": 4}, views=views)])


def _strides(names: str, x: Tensor) -> dict[str, int]:
    return dict(zip(names.split(), x.stride(), strict=False))


def operands_of(case: AppendCase) -> Operands:
    """The tensors of a call by the names of the kernel's parameters."""
    cache = case.cache
    return {
        "k": case.k,
        "v": case.v,
        "cache_k": cache.k,
        "cache_v": cache.v,
        "k_scale": kernel_scale(cache.k_scale),
        "v_scale": kernel_scale(cache.v_scale),
        "slots": case.slot_mapping.contiguous(),
    }
