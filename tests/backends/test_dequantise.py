"""Long sequences over an 8-bit cache: tiles walk a 16-bit copy of those that have room, the cache of the others."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from compile_variants import problem_of

from conftest import Prepare, plan_for
from swath import KVQuant, PagedKV, target
from swath.backends.hopper import heuristics as hopper
from swath.backends.triton.heuristics import dequantise as launch
from swath.backends.triton.heuristics.dequantise import CopyTypes
from swath.backends.triton.heuristics.splits import MAX_STEPS
from swath.cache import PagedKeys
from swath.ops import explain as tooling
from swath.ops import paged as paged_call
from swath.problem import Problem
from swath.testing import Case, Inputs

on_gpu_backends = pytest.mark.parametrize("impl", ["triton", "hopper"], indirect=True)

INT8_TOKEN, INT8_CHANNEL = KVQuant(torch.int8, "token"), KVQuant(torch.int8, "channel")
MIXED = Case((90, 70, 0, 130, 30, 40, 85, 66), (80, 1, 0, 75, 17, 16, 70, 3), num_kv_heads=1, quant=INT8_TOKEN)
LONG = {0, 3, 4, 6}
"""Sequences of ``MIXED`` that are for tiles; the others have no more query tokens than splits take."""
CASES = {
    "token scales": MIXED,
    "channel scales, flat table, holes": replace(MIXED, quant=INT8_CHANNEL, table="flat", holes=True),
    "fp8 by head, fp16": replace(MIXED, quant=KVQuant(torch.float8_e4m3fn, "head"), dtype=torch.float16, page_size=8),
    "window and leading tokens": replace(
        MIXED, quant=INT8_CHANNEL, size=30, global_tokens=(0, 3, 20, 5, 1, 40, 7, 2), holes=True, spiked=True
    ),
    "positions, padding rows": replace(
        MIXED, q_start=(0, 5, 0, -9, 200, 7, 30, 63), tail=5, strided=True, sink="fp32", size=50
    ),
    "values narrower than keys, and elsewhere": replace(
        MIXED, quant=KVQuant(torch.int8, "token", "channel"), head_dim=96, v_head_dim=40, layout="apart", size=30
    ),
    "fp8 queries": replace(
        MIXED, quant=KVQuant(torch.float8_e4m3fn, "head", "token"), dtype=torch.float8_e4m3fn, q_scale="token", group=8
    ),
    "int8 products": replace(MIXED, quant=INT8_CHANNEL, compute="int8", group=8, size=60, holes=True),
    "fast": replace(MIXED, quant=INT8_CHANNEL, compute="fast", group=8, size=60, page_size=64, holes=True),
    "fast, fp8 queries": replace(
        MIXED,
        quant=KVQuant(torch.float8_e4m3fn, "head", "channel"),
        dtype=torch.float8_e4m3fn,
        q_scale="token",
        compute="fast",
        group=8,
        page_size=128,
        sink="fp32",
        spiked=True,
    ),
    "as many tokens each": replace(MIXED, kv_lens=(90, -2, 100), q_lens=64, group=8),
}


def leave_room(inputs: Inputs, rows: int, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """Bound the scratch to ``rows`` sequences of the call, forget what was planned before, and prepare the call."""
    problem = tooling.prepare(inputs.op, *inputs.args, **inputs.options)
    keys = problem.keys
    assert isinstance(keys, PagedKeys)
    row = launch.row_bytes(problem, keys, hopper.copies(problem) or CopyTypes())
    table = 4 * problem.num_seqs * launch.table_pages(problem, keys)
    monkeypatch.setattr(launch, "SCRATCH_BYTES", rows * row + table)
    monkeypatch.setattr(paged_call.STAGES.memory, "_known", {})
    return tooling.prepare(inputs.op, *inputs.args, **inputs.options)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", CASES)
@on_gpu_backends
def test_sequences_beyond_the_scratch(
    name: str, rows: int, prepare: Prepare, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prepare(CASES[name])
    leave_room(inputs, rows, monkeypatch)
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


@on_gpu_backends
def test_keys_beyond_the_pages_of_a_flat_table_are_not_seen(prepare: Prepare, impl: str) -> None:
    """The copy has a table of its own, as wide for each sequence: what a sequence's own table lacks stays unseen."""
    inputs = prepare(replace(MIXED, quant=INT8_CHANNEL, table="flat"))
    ids, indptr = inputs.block_table
    rows = [ids[a : max(a, b - 2)] for a, b in pairwise(indptr.tolist())]
    ends = torch.tensor([0, *accumulate(len(row) for row in rows)], dtype=torch.int32, device=ids.device)
    short = replace(inputs, block_table=(torch.cat(rows), ends))
    short.check(*short.run(impl))


@pytest.mark.parametrize("rows", [1, 3, 8])
@on_gpu_backends
def test_each_launch_takes_its_own(rows: int, prepare: Prepare, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that also takes sequences of another writes the right rows all the same, and takes longer."""
    from swath.backends.triton.arguments import operands_of

    problem = leave_room(prepare(MIXED), rows, monkeypatch)
    plan = plan_for(impl, problem, target.target_of(problem.q.device))
    operands = {**operands_of(problem), **plan.scratch.tensors(problem.q.device)}
    bounds = list(pairwise(accumulate(MIXED.row_counts, initial=0)))
    written = []
    for call in plan.calls:
        problem.out.fill_(torch.nan)
        call.launch(operands)
        written.append({b for b, (first, end) in enumerate(bounds) if not problem.out[first:end].isnan().all()})
    kernels = [call.kernel.fn.__name__ for call in plan.calls]
    at = kernels.index("dequantise_kernel")
    assert set().union(*written[:at]) == {b for b, n in enumerate(MIXED.row_counts) if n} - LONG
    assert written[at] == set()
    expected = [set(sorted(LONG)[:rows]), set(sorted(LONG)[rows:])]
    assert written[at + 1 :] == (expected if rows < MIXED.num_seqs else expected[:1])


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@on_gpu_backends
def test_static_scales_of_any_sign(granularity: str, prepare: Prepare, impl: str) -> None:
    """The sign of K's scale is in the copy, its size in the scores; masked scores stay so, also under a scale of 0."""
    inputs = prepare(replace(MIXED, num_kv_heads=2, quant=KVQuant(torch.int8, granularity, "channel"), size=30))
    cache = inputs.cache
    for factor in (-1.0, 0.0) if granularity == "tensor" else ((-1.0, 0.0), (1e-30, -1e-36)):
        k_scale = cache.k_scale * torch.tensor(factor, device=cache.k.device)
        signed = replace(inputs, keys=PagedKV(cache.k, cache.v, k_scale, -cache.v_scale))
        signed.check(*signed.run(impl))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_the_copy_is_exact(stored: torch.dtype, dtype: torch.dtype, prepare: Prepare, impl: str) -> None:
    """Where scales can be applied later, the copy has the stored values: each of them is one of 16 bits."""
    from swath.backends.triton.arguments import operands_of

    case = Case((32,), (32,), group=16, num_kv_heads=1, dtype=dtype, quant=KVQuant(stored, "head", "channel"))
    inputs = prepare(case)
    every = torch.arange(256, device=inputs.q.device).to(torch.uint8).view(stored)
    every = torch.where(every.float().isfinite(), every.float(), 0).to(stored)
    pages = inputs.block_table[0, :2].long()
    for x in (inputs.cache.k, inputs.cache.v):
        x[pages, 0] = every.repeat(8).view(2, 16, 64)
    problem = tooling.prepare(inputs.op, *inputs.args, **inputs.options)
    plan = plan_for(impl, problem, target.target_of(problem.q.device))
    operands = {**operands_of(problem), **plan.scratch.tensors(problem.q.device)}
    (call,) = (call for call in plan.calls if call.kernel.fn.__name__ == "dequantise_kernel")
    call.launch(operands)
    for name, x in (("new_k", inputs.cache.k), ("new_v", inputs.cache.v)):
        assert operands[name].dtype == dtype
        assert torch.equal(operands[name][:2, 0].float(), x[pages, 0].float())


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("q_lens", [32, (40, 24)], ids=str)
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_what_int8_tiles_multiply(q_lens: int | tuple[int, ...], granularity: str, prepare: Prepare, impl: str) -> None:
    """K stays where it is. A row of q has K's scales, 127 in its largest place, and a factor that makes scores."""
    from swath.backends.triton.arguments import operands_of

    storage = KVQuant(torch.int8, granularity)
    inputs = prepare(
        Case((1400, 70), q_lens, group=16, head_dim=128, quant=storage, compute="int8", gqa="interleaved", strided=True)
    )
    problem = tooling.prepare(inputs.op, *inputs.args, **inputs.options)
    plan = plan_for("hopper", problem, target.target_of(problem.q.device))
    operands = {**operands_of(problem), **plan.scratch.tensors(problem.q.device)}
    for call in plan.calls[-3:-1]:
        call.launch(operands)
    assert [call.kernel.fn.__name__ for call in plan.calls[-3:]] == [
        "dequantise_kernel", "quantise_kernel", "hopper_tile_kernel",
    ]  # fmt: skip
    assert plan.calls[-1].arguments(operands)["k_desc"].base.data_ptr() == inputs.cache.k.data_ptr()
    scale = inputs.cache.k_scale.reshape(-1, 1) if granularity != "channel" else inputs.cache.k_scale
    scaled = inputs.q.float() * scale.expand(2, 128).tile(16, 1) * problem.score_unit  # [.., Hq, D], heads by turns
    new_q, factor = operands["new_q"], operands["new_q_scale"]
    assert (new_q.abs().amax(-1) == 127).all()
    assert ((new_q * factor[..., None] - scaled).abs() <= 0.5001 * factor[..., None]).all()


@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_what_fast_products_have_for_values(prepare: Prepare, impl: str) -> None:
    """Bytes as they are stored, of a page of 128 keys the columns one after the other. Keys are in wgmma's order within
    16, which is written out here."""
    from swath.backends.triton.arguments import operands_of

    e4m3, d, count = torch.float8_e4m3fn, 128, 2
    case = Case((200, 70), (40, 24), head_dim=d, group=16, page_size=128, dtype=e4m3, compute="fast")
    inputs = prepare(replace(case, quant=KVQuant(e4m3, "head"), q_scale="token"))
    problem = tooling.prepare(inputs.op, *inputs.args, **inputs.options)
    plan = plan_for("hopper", problem, target.target_of(problem.q.device))
    operands = {**operands_of(problem), **plan.scratch.tensors(problem.q.device)}
    (call,) = (call for call in plan.calls if call.kernel.fn.__name__ == "dequantise_kernel")
    call.launch(operands)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    pages, new_v = inputs.block_table[0, :count].long(), operands["new_v"][:count]
    want = inputs.cache.v[pages].view(torch.uint8)
    want = want.unflatten(2, (8, 16))[:, :, :, order].flatten(2, 3).mT
    assert (new_v.dtype, new_v.shape) == (e4m3, (count, 2, d, 128))
    copied = new_v.view(torch.uint8)
    assert torch.equal(copied[:-1], want[:-1])
    assert torch.equal(copied[-1, ..., :64], want[-1, ..., :64]), "of the last page, which ends within its second half"
    assert "new_k" not in operands


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_what_fp8_tiles_multiply(boxes: bool, prepare: Prepare, impl: str) -> None:
    """Queries and K are read where they lie, V by the table of its copy. K that no box fits is copied as it is."""
    from swath.backends.triton.arguments import operands_of

    fp8 = torch.float8_e4m3fn
    inputs = prepare(Case((40, 70), 32, group=16, dtype=fp8, quant=KVQuant(fp8, "head"), q_scale="token", strided=True))
    k = inputs.cache.k
    if not boxes:
        k = k.new_empty(*k.shape[:-1], 72)[..., :64].copy_(k)
        inputs = replace(inputs, keys=replace(inputs.cache, k=k))
    problem = tooling.prepare(inputs.op, *inputs.args, **inputs.options)
    plan = plan_for("hopper", problem, target.target_of(problem.q.device))
    operands = {**operands_of(problem), **plan.scratch.tensors(problem.q.device)}
    copying, tiles = plan.calls
    copying.launch(operands)
    taken = tiles.arguments(operands)
    pages, table = inputs.block_table[:, :2].long(), operands["new_table"]
    for b in range(2):
        copied = operands["new_v"][table[b, :2].long()].float()
        assert torch.equal(copied.nan_to_num(7), inputs.cache.v[pages[b]].float().nan_to_num(7))
    if boxes:
        assert "new_k" not in operands
        assert taken["k_desc"].base.data_ptr() == k.data_ptr()
        assert taken["table"].data_ptr() == inputs.block_table.data_ptr()
        assert (taken["v_table"] is table, taken["v_table_width"]) == (True, table.shape[1])
    else:
        assert torch.equal(operands["new_k"][table[0, :2].long()].view(torch.uint8), k[pages[0]].view(torch.uint8))
        assert (taken["table"] is table, taken["v_table"]) == (True, None)
    assert taken["q_desc"].base.data_ptr() == inputs.q.data_ptr()
    assert taken["q_scale"] is inputs.q_scale
    assert taken["k_scale"] is inputs.cache.k_scale


@pytest.mark.parametrize("impl", ["triton"], indirect=True)
def test_sequences_are_ranked_among_hundreds(prepare: Prepare, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 are looked at together. The long ones are the first of all, the last and first beside that edge, the last."""
    from swath.backends.triton.arguments import operands_of

    long = (0, 255, 256, 299)
    kv_lens, q_lens = zip(*((70, 70) if b in long else (5, 1) for b in range(300)), strict=True)
    problem = leave_room(prepare(replace(MIXED, kv_lens=kv_lens, q_lens=q_lens)), 3, monkeypatch)
    plan = plan_for(impl, problem, target.target_of(problem.q.device))
    operands = {**operands_of(problem), **plan.scratch.tensors(problem.q.device)}
    operands["new_table"].fill_(-7)
    (call,) = (call for call in plan.calls if call.kernel.fn.__name__ == "dequantise_kernel")
    call.launch(operands)
    assert operands["copied"].tolist() == [MAX_STEPS, 0, 299]
    assert operands["others"].tolist() == [MAX_STEPS, 299, 300]
    pages = launch.scratch_pages(problem, problem.keys)
    expected = torch.full((300, operands["new_table"].shape[1]), -7, dtype=torch.int32)
    for rank, b in enumerate(long[:3]):
        expected[b, :5] = rank * pages + torch.arange(5, dtype=torch.int32)
    assert torch.equal(operands["new_table"].cpu(), expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"storage": "int8 fast"}, CopyTypes("int8", k_stays=True)),
        ({"storage": "int8 fast", "head_dim": "64"}, CopyTypes()),
        ({"storage": "int8 fast", "window": "size"}, CopyTypes()),
        ({"storage": "int8 fast", "window": "bounds"}, CopyTypes("int8", k_stays=True)),
        ({"storage": "queries fast"}, CopyTypes("e4m3", k_stays=True)),  # sums are too long
        ({"storage": "queries fast", "window": "size"}, CopyTypes("e4m3", v_e4m3=True, k_stays=True)),
        ({"storage": "queries fast", "window": "size+count"}, CopyTypes("e4m3", v_e4m3=True, k_stays=True)),
        ({"storage": "queries fast", "window": "size+tensor"}, CopyTypes("e4m3", k_stays=True)),  # counts may be any
        ({"storage": "queries fast", "window": "size", "paging": "544"}, CopyTypes("e4m3", k_stays=True)),
        ({"storage": "queries fast", "window": "size", "head_dim": "64"}, CopyTypes("e4m3", k_stays=True)),  # slower
        ({"storage": "queries fast", "window": "size", "head_dim": "256"}, CopyTypes("e4m3", k_stays=True)),  # slower
        ({"storage": "queries fast", "window": "bounds"}, CopyTypes("e4m3", k_stays=True)),
        ({"storage": "queries fast", "queries": "decode"}, None),
    ],
)
def test_fast_products_where_they_fit(row: dict[str, str], expected: CopyTypes | None) -> None:
    plain = {"head_dim": "128", "window": "none", "scoring": "plain", "queries": "ragged", "paging": "64"}
    assert hopper.copies(problem_of(plain | row)) == expected
