"""append_kv as one Triton kernel, byte-equal to its twin in torch (reference.py)."""

from __future__ import annotations

from typing import Any

from swath.backends.triton.features import FUSED, cache_features, kernel_dtype, kernel_scale, token_strides
from swath.problem import AppendCase
from swath.quant import LARGEST
from swath.target import on_device, why_no_triton


def why_not(case: AppendCase) -> str | None:
    """Needs Triton and a GPU, or the interpreter."""
    return why_no_triton(case.k.device)


def plan(case: AppendCase) -> str:
    """The launch in words."""
    return f"append_kernel x {case.k.shape[0] * case.cache.num_kv_heads}"


def warm(case: AppendCase) -> None:
    """Compile what ``run`` would launch."""
    _launch(case, warm=True)


def run(case: AppendCase) -> None:
    """Launch."""
    _launch(case, warm=False)


def _launch(case: AppendCase, warm: bool) -> None:
    import triton

    from swath.backends.triton.kernels.append import append_kernel

    cache, k, v = case.cache, case.k, case.v
    grid = (k.shape[0] * cache.num_kv_heads,)
    if grid[0] == 0:
        return
    scales = (cache.k_scale, cache.v_scale)
    args: list[Any] = [
        k,
        v,
        *(x.view(kernel_dtype(x.dtype)) for x in (cache.k, cache.v)),
        *map(kernel_scale, scales),
        case.slot_mapping,
    ]
    args += [cache.num_pages * cache.page_size, *k.stride()[:2], *v.stride()[:2], *cache.k.stride()[:3]]
    args += [*token_strides(cache.k_scale), *token_strides(cache.v_scale)]
    constants = {
        "F": cache_features(cache),
        "BLOCK_D": triton.next_power_of_2(cache.head_dim),
        "LARGEST": LARGEST.get(cache.k.dtype, 1.0),
        "num_warps": 1,
    } | FUSED
    if warm:
        append_kernel.warmup(*args, **constants, grid=grid)
    else:
        with on_device(k.device):
            append_kernel[grid](*args, **constants)
