"""The cpu backend: float32 accuracy over many blocks and spans, the int8 twin, work and memory bounds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from options import DENSE, PAGED, in_pairs
from pools import in_a_large_pool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swath import PagedKV, explain, paged_attention
from swath.backends.cpu import attention as blocks
from swath.ops import attention as attention_call
from swath.ops import paged as paged_call
from swath.quant import KVQuant
from swath.testing import Arithmetic, Case, Inputs, lse_budget, make, out_budget
from swath.testing.budget import UNIT

F32 = torch.float32
SWEEP = random.Random(0).sample(in_pairs(PAGED) + in_pairs(DENSE, dense=True), 100)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 query tokens and spans of 40 keys, so that small cases have many of both."""
    monkeypatch.setattr(blocks, "span_keys", lambda problem: 40)
    monkeypatch.setattr(blocks, "MIN_ROWS", 5)
    monkeypatch.setattr(blocks, "MAX_ROWS", 5)


def over_budget(inputs: Inputs) -> int:
    """Elements further from the truth than float32 arithmetic and one rounding to the output's type explain.

    ``Inputs.check`` lets p and dequantised keys be rounded to 16 bits; this backend rounds nothing on the way.
    """
    truth, compute = inputs.truth(), inputs.case.compute
    wanted = (truth.out, truth.lse)
    out, lse = (x.reshape(-1, *t.shape[1:])[truth.rows] for x, t in zip(inputs.run("cpu"), wanted, strict=True))
    rounding = UNIT[out.dtype] * truth.out.abs().clamp(min=torch.finfo(out.dtype).smallest_normal)
    allowed = out_budget(truth, F32, Arithmetic(compute=compute)) + rounding
    allowed_lse = lse_budget(truth, F32, Arithmetic(compute=compute))
    right = (out - truth.out).abs() <= allowed  # a NaN is never right
    right_lse = (lse == truth.lse) | ((lse - truth.lse).abs() <= allowed_lse)
    return int((~right).sum() + (~right_lse).sum())


@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_many_blocks_and_spans(case: Case, small_blocks: None) -> None:
    assert over_budget(make(case)) == 0


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
@pytest.mark.parametrize("size", [None, 7, 64, 200])
def test_whole_blocks(size: int | None, dense: bool) -> None:
    """The block and span sizes in use, over several blocks of a long sequence."""
    case = Case((700, 5), (700, 5), dense=dense, dtype=F32, size=size, global_tokens=9, spiked=True)
    assert over_budget(make(case)) == 0


def test_the_reference_agrees() -> None:
    """Float64 rounded once against float32: some units in the last place, with the root of the sum's length."""
    quant = KVQuant(torch.int8, "token")
    inputs = make(Case((900,), (300,), dtype=F32, size=400, quant=quant, softcap=20.0, sink="fp32"))
    out, lse = inputs.run("cpu")
    want, want_lse = inputs.run("reference")
    unit = 2 * UNIT[F32] * 400**0.5
    assert float((out - want).abs().max()) <= unit * float(want.abs().max())
    assert float((lse - want_lse).abs().max()) <= unit * float(want_lse.abs().max())


def test_a_sink_of_minus_infinity_is_none() -> None:
    inputs = make(Case((90, 0), 3, sink="fp32", size=30))
    inputs.sink.fill_(-torch.inf)
    for got, want in zip(inputs.run("cpu"), inputs.run("cpu", sink=None), strict=True):
        assert torch.equal(got, want)


def int8_twin(q: Tensor, k: Tensor, v: Tensor, k_unit: Tensor, v_unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``compute="int8"`` of one query row q [D] over stored k, v [N, D], with scales [D].

    Returns out [D], the LSE, and how far the elements of out may move because a p stands next to a rounding tie.
    """
    scaled = q * k_unit
    step = scaled.abs().max() / 127  # in float32, whose products and quotients round the same everywhere
    s = len(q) ** -0.5 * step.double() * (k.long() @ (scaled / step).round().long())
    m, total, acc, slack = s.new_tensor(-torch.inf), s.new_zeros(()), v_unit.new_zeros(len(q)).double(), 0.0
    for some_s, some_v in zip(s.split(blocks.EXACT_INT8_KEYS), v.split(blocks.EXACT_INT8_KEYS), strict=True):
        before, m = m, torch.maximum(m, some_s.max())
        fade, p = torch.exp(before - m), 127 * torch.exp(some_s - m)
        tie = ((p % 1 - 0.5).abs() < 1e-3).double()
        total = total * fade + p.sum() / 127
        acc = acc * fade + (p.round().long() @ some_v.long()) / 127
        slack = slack * fade + (tie @ some_v.double().abs()) / 127
    return v_unit * acc / total, m + total.log(), v_unit * slack / total


@pytest.mark.parametrize("num_keys", [1, 300, 2500])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_int8_compute_is_its_twin(granularity: str, num_keys: int) -> None:
    """q in 127ths of its row's largest, p in 127ths of the running maximum, which rises until the last span."""
    dim, page_size = 64, 16
    torch.manual_seed(0)
    q, pages = torch.randn(1, 3, dim), -(-num_keys // page_size)
    k, v = (torch.randint(-127, 128, (pages, 1, page_size, dim)).to(torch.int8) for _ in range(2))
    k = k * torch.linspace(0.3, 1, k[..., 0].numel()).view(*k.shape[:3], 1)
    shape = {"tensor": (), "head": (1,), "channel": (1, dim)}[granularity]
    k_scale, v_scale = torch.rand(shape) * 0.02 + 0.01, torch.rand(shape) * 0.02 + 0.01
    cache = PagedKV(k.to(torch.int8), v, k_scale=k_scale, v_scale=v_scale)
    table, lengths = torch.arange(pages, dtype=torch.int32)[None], torch.tensor([num_keys], dtype=torch.int32)
    out, lse = paged_attention(q, cache, table, lengths, compute="int8", return_lse=True, impl="cpu")
    rows = (x.flatten(0, 2)[:num_keys] for x in (cache.k, cache.v))
    units = (x.reshape(-1).expand(dim) for x in (k_scale, v_scale))
    k_rows, v_rows, k_unit, v_unit = *rows, *units
    for h in range(3):
        want, want_lse, slack = int8_twin(q[0, h], k_rows, v_rows, k_unit, v_unit)
        error, size = (out[0, h] - want).abs(), 127 * v_unit
        assert (error <= slack + 64 * UNIT[F32] * size).all()
        assert float((lse[0, h] - want_lse).abs()) <= 64 * UNIT[F32] * float(1 + want_lse.abs())


class Work(TorchDispatchMode):
    """Counts the elements of all tensors that torch operations make, and the bytes of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        for x, declared in zip(made, func._schema.returns, strict=False):
            if isinstance(x, Tensor) and declared.alias_info is None:
                self.elements += x.numel()
                self.largest_bytes = max(self.largest_bytes, x.numel() * x.element_size())
        return result


def work(case: Case) -> Work:
    return work_of(make(case))


def work_of(inputs: Inputs) -> Work:
    """Of a call, from the checked problem on."""
    case = inputs.case
    problem = (attention_call if case.dense else paged_call).prepare(*inputs.args, **inputs.options)
    with Work() as counted:
        blocks.run(problem)
    inputs.check(problem.out.reshape(inputs.q.shape), None)
    return counted


@pytest.mark.parametrize("q_lens", [1, 4, (1, 70)], ids=str)
@pytest.mark.parametrize("quant", [None, KVQuant(torch.int8, "token")], ids=["plain", "int8"])
@pytest.mark.parametrize("table", ["rectangular", "flat"])
def test_work_follows_the_window(q_lens: int | tuple[int, ...], quant: KVQuant | None, table: str) -> None:
    """Eight times the context, not an element more; every page out of the window is freed, its entry hostile."""
    short = Case((1024, 1024), q_lens, size=100, global_tokens=3, quant=quant, table=table)
    long = replace(short, kv_lens=(8192, 8192))
    of_long, of_short = work(long), work(short)
    assert of_long.elements == of_short.elements
    assert of_long.largest_bytes == of_short.largest_bytes
    assert of_long.elements < work(replace(long, size=None)).elements / 4


def test_the_size_of_the_pool_costs_nothing() -> None:
    inputs = make(Case(q_lens=(60, 1, 100), quant=KVQuant(torch.int8, "channel")))
    of_huge, of_own = work_of(in_a_large_pool(inputs, 4000)), work_of(inputs)
    assert (of_huge.elements, of_huge.largest_bytes) == (of_own.elements, of_own.largest_bytes)


@pytest.mark.parametrize("case", [
    Case((40_000,), 1, dtype=F32),
    Case((40_000,), 1, num_kv_heads=1, group=64, quant=KVQuant(torch.int8, "token")),
    Case((1000,), (1000,), dense=True, size=700, group=8, num_kv_heads=1),
], ids=str)  # fmt: skip
def test_memory_is_bounded(case: Case) -> None:
    """No tensor is larger than a span, the scores of a block, or the query rows in float32."""
    query_bytes = 4 * torch.Size(case.q_shape).numel()
    assert work(case).largest_bytes <= max(blocks.SPAN_BYTES, blocks.SCORE_BYTES, query_bytes)


def test_a_sequence_keeps_its_bits() -> None:
    """Whatever the others hold, and in whatever order."""
    inputs = make(Case((300, 77, 150), (40, 7, 150), size=50, dtype=F32))
    out, lse = inputs.run("cpu")
    first = slice(0, 40)
    inputs.q[40:] = torch.nan
    inputs.seq_lens[1:] = torch.tensor([75, 0])
    again, again_lse = inputs.run("cpu")
    assert torch.equal(again[first], out[first])
    assert torch.equal(again_lse[first], lse[first])
    assert again[40:47].isnan().all()


def test_lengths_beyond_the_keys() -> None:
    """cu_seqlens_k that promises more keys than there are: those that exist are seen, as by the reference."""
    inputs = make(Case((200,), (20,), dense=True, dtype=F32))
    k, v = (x[:150] for x in inputs.keys)
    call = replace(inputs, keys=(k, v))
    for got, want in zip(call.run("cpu"), call.run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tensors_elsewhere_are_refused() -> None:
    q, cu = torch.empty(4, 2, 64, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    said = explain("attention", q, q, q, cu, cu)
    assert said.reasons["cpu"] == "takes CPU tensors only, q is on meta"


def test_the_plan_names_blocks_and_spans() -> None:
    inputs = make(Case((3000,), (3000,), dense=True, dtype=F32, size=64))
    launch = explain("attention", *inputs.args, **inputs.options, impl="cpu").launch
    assert launch == "torch, float32, blocks of 64 query tokens over spans of up to 4096 visible keys"
