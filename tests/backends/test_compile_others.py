"""The kernels of append_kv and merge_states compile for every target, without a GPU, as attention does elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compile_variants import TARGETS, _Driver

from conftest import python_environment
from swath import KVQuant, PagedKV
from swath.backends.triton import append, merge
from swath.problem import AppendCase, MergeCase

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


def main() -> None:
    """Compile them all for the target of the command line."""
    import triton
    from triton.backends.compiler import GPUTarget

    arch = sys.argv[1]
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(_Driver(target))
    triton.knobs.compilation.always_compile = True
    for case in appends():
        for call in append._plan(case).calls:  # ``warm`` would load them too, for which there is no GPU
            call.compile(append._operands(case))
    for dtype in (torch.bfloat16, torch.float32):
        out, lse = torch.zeros(5, 4, 80, dtype=dtype), torch.zeros(5, 4)
        for base2 in (False, True):
            merge.warm(MergeCase(out, lse, out, lse, out, lse, base2))


@pytest.mark.parametrize("arch", TARGETS)
def test_kernels_compile(arch: str) -> None:
    command = [sys.executable, "-c", "import test_compile_others; test_compile_others.main()", arch]
    environment = python_environment()
    environment["PYTHONPATH"] += f":{Path(__file__).parent}:{Path(__file__).parents[1]}"
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
