"""The small sweep that ``make memcheck`` runs under compute-sanitizer: each kernel, and each way it forms addresses.

NaN around what may be read shows most stray reads everywhere else; memcheck shows those that land outside any tensor.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_append import SLOTS, empty_cache, tokens
from test_dequantise import MIXED, leave_room

from conftest import Prepare, plan_for
from swath import KVQuant, append_kv, merge_states, quantise_q
from swath.backends.hopper import attention as hopper
from swath.ops import explain as tooling
from swath.target import Target, has_triton
from swath.testing import Case, make

ROOT = Path(__file__).parents[2]

INT8_TOKEN, INT8_CHANNEL = KVQuant(torch.int8, "token"), KVQuant(torch.int8, "channel")
E4M3 = torch.float8_e4m3fn

TRITON = [
    Case(strided=True, size=18, global_tokens=4),
    Case((1500, 5), table="flat"),
    Case(page_size=1, head_dim=96, holes=True),
    Case(head_dim=80, page_size=48, quant=INT8_CHANNEL, layout="padded"),
    Case(q_lens=3, quant=INT8_TOKEN, scale_dtype=torch.bfloat16, layout="packed"),
    Case(quant=KVQuant(E4M3, "token"), dtype=E4M3, q_scale="token", layout="nhd"),
    Case((15, 16, 17), 4, q_start=(0, -2, 100), group=7, sink="fp32"),
    Case((193, 5), 2, split_size=64, group=64, num_kv_heads=1),
    Case(q_lens=(1, 0, 70), tail=3, size=18, global_tokens=(0, 3, 40)),
    Case((-2, 193, 5), (5, 33, 60), size=64, table="flat", holes=True),
    Case(q_lens=20, quant=INT8_CHANNEL, compute="int8"),
    Case((300, 90), (200, 60), group=4, quant=INT8_TOKEN),
    Case(q_lens=(5, 33, 60), dense=True, dtype=torch.float32, head_dim=192),
    Case(q_lens=(5, 33, 60), dense=True, causal=False, size=9, gqa="interleaved", strided=True),
]
HOPPER = [
    Case((300, 200, 40), (300, 130, 1), dense=True, size=100, strided=True, head_dim=128),
    Case((300, 200, 40), (300, 130, 1), table="flat", holes=True, page_size=8),
    Case((300, 200, 40), (300, 0, 20), tail=30, group=8, size=64, page_size=544),
    Case((300, 90), (200, 60), group=4, quant=INT8_CHANNEL, size=150, global_tokens=20),
    Case((-2, 193, 5), (20, 33, 60), head_dim=256, layout="nhd"),
    Case((-2, 193, 5), (20, 33, 60), head_dim=192, v_head_dim=128),
    Case((1400, 90), (200, 60), group=4, head_dim=128, quant=INT8_CHANNEL, compute="int8"),
    Case((300, 90), (200, 60), group=4, dtype=E4M3, quant=KVQuant(E4M3, "head"), q_scale="token"),
    Case((300, 200, 40), (300, 130, 1), head_dim=512, layout="nhd", size=100),
    Case((300, 90), (200, 60), group=4, head_dim=512, quant=INT8_CHANNEL),
    Case((1400, 90), (200, 60), group=4, head_dim=256, quant=INT8_CHANNEL, compute="fast"),
    Case((1400, 90), (200, 60), head_dim=128, page_size=64, dtype=E4M3, quant=KVQuant(E4M3, "head"), q_scale="tensor",
         compute="fast", size=300),
]  # fmt: skip
CALLS = [("triton", case) for case in TRITON] + [("hopper", case) for case in HOPPER]


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "case"), CALLS, indirect=["impl"], ids=str)
def test_gpu_attention(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(case)
    inputs.check(*inputs.run(impl, out=inputs.canary().out if case.strided else None))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "hopper"], indirect=True)
def test_gpu_beyond_the_scratch(prepare: Prepare, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prepare(MIXED)
    leave_room(inputs, 2, monkeypatch)
    inputs.check(*inputs.run(impl))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["hnd", "packed"])
@pytest.mark.parametrize("quant", [KVQuant(torch.bfloat16), INT8_TOKEN], ids=str)
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_gpu_append(quant: KVQuant, layout: str, impl: str, device: str) -> None:
    """To slots inside and outside the cache."""
    caches = [empty_cache(quant, layout, device) for _ in range(2)]
    for cache, name in zip(caches, (impl, "reference"), strict=True):
        append_kv(cache, *tokens(torch.bfloat16, device), torch.tensor(SLOTS, device=device), impl=name)
    got, want = (torch.stack((cache.k, cache.v)).view(torch.uint8) for cache in caches)
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_gpu_quantise(head_dim: int, static: bool, impl: str, device: str) -> None:
    """Rows that end where the tensor does."""
    torch.manual_seed(0)
    q = torch.randn(5, 3, head_dim, dtype=torch.bfloat16, device=device)
    scale = torch.tensor(0.02, device=device) if static else None
    (got, unit), (want, wanted) = (quantise_q(q, scale, impl=name) for name in (impl, "reference"))
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(unit, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_gpu_merge(impl: str, device: str) -> None:
    torch.manual_seed(0)
    out, lse = torch.randn(5, 3, 80, device=device), torch.randn(5, 3, device=device)
    got, _ = merge_states(out, lse, out, lse, impl=impl)
    torch.testing.assert_close(got, out)


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_each_attention_kernel_is_among_them() -> None:

    launched, wrong = set(), []
    for impl, case in CALLS:
        inputs = make(case)
        problem = tooling.prepare(inputs.op, *inputs.args, **inputs.options)
        launched |= {call.kernel.fn.__name__ for call in plan_for(impl, problem, Target("sm_90", 132)).calls}
        if impl == "hopper" and hopper.why_not_tiles(problem, 132) is not None:
            wrong.append(str(case))
    kernels = {"split_kernel", "reduce_kernel", "tile_kernel", "dequantise_kernel", "quantise_kernel"}
    assert launched == kernels | {"hopper_tile_kernel"}
    assert not wrong, "the backend cannot run these"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_memcheck_says_what_is_missing() -> None:
    ran = subprocess.run(
        ["make", "memcheck", "SANITIZER=no-such-sanitizer"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode != 0
    assert "no-such-sanitizer is not installed" in ran.stderr
