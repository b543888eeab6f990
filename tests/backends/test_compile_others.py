"""The kernels of append_kv, quantise_q and merge_states compile for every target, without a GPU."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from compile_variants import TARGETS, StandIn
from own_process import printed

from swath import KVQuant, PagedKV
from swath.backends.triton import append, merge, quantise
from swath.backends.triton.kernels.append import append_kernel
from swath.ops import quantise as quantise_call
from swath.problem import AppendCase, MergeCase, QuantiseCase
from swath.target import Target

pytest.importorskip("triton", reason="Triton is not installed")

WIDE = [KVQuant(dtype) for dtype in (torch.bfloat16, torch.float32)]
NARROW = [
    KVQuant(dtype, k, v)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    for k, v in (("token", "channel"), ("head", "tensor"))
]


def appends() -> list[AppendCase]:
    """A call for every way of storing rows: what divides them, and how they are encoded. Some V have rows of 40."""
    cases = []
    for quant, v_dim in [(quant, 64) for quant in WIDE + NARROW] + [(WIDE[0], 40), (NARROW[0], 40)]:
        shapes = {"none": None, "tensor": (), "head": (2,), "token": (4, 2, 16)}
        wanted = shapes.get(quant.k, (2, 64)), shapes.get(quant.v_granularity, (2, v_dim))
        k_scale, v_scale = (None if shape is None else torch.ones(shape, dtype=torch.bfloat16) for shape in wanted)
        cache = PagedKV.empty(quant, 4, 2, 16, 64, v_head_dim=v_dim, k_scale=k_scale, v_scale=v_scale)
        k, v = (torch.zeros(3, 2, dim, dtype=torch.bfloat16) for dim in (64, v_dim))
        cases.append(AppendCase(cache, k, v, torch.arange(3)))
    return cases


def quantises() -> list[QuantiseCase]:
    """Queries of every type, under scales of their own and under a static one."""
    queries = [torch.zeros(5, 4, 80, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    return [quantise_call.prepare(q, scale) for q in queries for scale in (None, torch.ones(()))]


def stand_on(arch: str) -> None:
    """Let Triton compile for a target that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(StandIn(target))
    triton.knobs.compilation.always_compile = True


def main() -> None:
    """Compile them all for the target of the command line."""
    stand_on(sys.argv[1])
    target = Target(sys.argv[1])
    for case in appends():
        for call in append.plan_for(case, target).calls:  # ``warm`` would load them too, for which there is no GPU
            call.compile(append.operands_of(case))
    for case in quantises():
        for call in quantise.plan_for(case, target).calls:
            call.compile(quantise.operands_of(case))
    for dtype in (torch.bfloat16, torch.float32):
        out, lse = torch.zeros(5, 4, 80, dtype=dtype), torch.zeros(5, 4)
        for base2 in (False, True):
            merge.warm(MergeCase(out, lse, out, lse, out, lse, base2))


def at_once() -> None:
    """Compile appends of ``in_threads``, each asked for twice: once each, all loaded, and the code is the same."""
    from triton import compiler
    from triton.runtime import _async_compile

    from swath.ops.explain import in_threads

    stand_on("sm_90")
    loaded = []
    compiler.CompiledKernel.run = property(lambda kernel: loaded.append(kernel))  # there is no GPU to load them on
    cases = appends()[:4]
    here = threading.get_ident()
    compiling, compile_here = [], compiler.compile
    compiler.compile = lambda *args, **more: compiling.append(threading.get_ident()) or compile_here(*args, **more)
    with in_threads(torch.device("cpu")):
        for case in cases * 2:
            append.warm(case)
        assert not loaded
    assert here not in compiling
    assert len(loaded) == len({kernel.hash for kernel in loaded}) == len(cases)
    append.warm(cases[0])
    assert loaded[-1] in loaded[:-1]
    assert len(compiling) == len(cases)

    append_kernel.compile = lambda *args, **more: 1 // 0
    with pytest.raises(ZeroDivisionError), in_threads(torch.device("cpu")):
        append.warm(appends()[5])
    assert _async_compile.active_mode.get() is None


@pytest.mark.parametrize("arch", TARGETS)
def test_kernels_compile(arch: str) -> None:
    printed("test_compile_others", "main", arch)


def test_kernels_compile_in_threads() -> None:
    printed("test_compile_others", "at_once")
