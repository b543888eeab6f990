"""What is remembered of a call: its signature covers all that decides, and a later call gets its own tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_rows import HALVES, HEADS, OPTIONS, SEEN, named
from compile_variants import problem_of, tiles_of
from launches import Recorder, fresh_arguments, plain, recording
from torch import Tensor

from conftest import plan_for
from swath import KVQuant, PagedKV, Window, attention, paged_attention, target
from swath.backends.triton.heuristics.dequantise import SCRATCH_BYTES, copies
from swath.ops import append as append_call
from swath.ops import attention as attention_call
from swath.ops import paged as paged_call
from swath.ops import signature
from swath.ops.signature import Memory, coarse
from swath.target import Target
from swath.testing import Case, Inputs, pairwise

Prepare = Callable[..., Inputs]

has_triton = pytest.mark.skipif(not target.has_triton(), reason="Triton is not installed")
INT8 = KVQuant(torch.int8, "token")
SCALE = torch.ones(8, 128)
FAMILIES = [
    Case((170, 33, 129), size=30),
    Case((170, 33, 129), 3, split_size=64),
    Case((170, 33, 129), 1, quant=INT8, sink="fp32"),
    Case((60, 70, 50), (45, 1, 20), quant=INT8, dtype=torch.float16, group=8, num_kv_heads=1),
    Case((70, 100, 69), (5, 33, 40), size=40, dense=True),
]
"""Splits, splits at fixed places, 8-bit decode, a mixed batch that is dequantised, dense tiles."""


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_later_calls_are_right_whatever_changed(case: Case, prepare: Prepare, impl: str) -> None:
    """Same shapes throughout, so that whatever a plan wrongly kept would show."""
    lengths = tuple(n - 9 for n in case.kv_lens) if not isinstance(case.q_lens, tuple) else case.kv_lens
    changes: list[dict[str, Any]] = [
        {},
        {"kv_lens": lengths},
        {"size": 18},
        {"size": None},
        {"size": 18, "global_tokens": 4},
        {"size": 18, "global_tokens": (0, 3, 40)},
        {"scale": 0.03},
        {"scale": -0.25},
        {"strided": True},
        {"q_start": (30, 40, 3)},
        {},
    ]
    for seed, change in enumerate(changes):
        inputs = prepare(replace(case, **change), seed)
        out = inputs.canary().out if inputs.case.strided else None
        inputs.check(*inputs.run(impl, out=out))


@pytest.mark.parametrize("case", FAMILIES[:3], ids=str)
def test_tensors_at_other_alignments(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(case)
    for shift in (0, 1, 4, 8, 0):
        moved = torch.empty(inputs.q.numel() + 8, dtype=inputs.q.dtype, device=inputs.q.device)
        q = moved[shift : shift + inputs.q.numel()].view(inputs.q.shape).copy_(inputs.q)
        replace(inputs, q=q).check(*replace(inputs, q=q).run(impl))


def decode(**changes: Any) -> dict[str, Any]:
    """The arguments of a decode call, all tensors new."""
    pool = torch.zeros(4, 2, 16, 64)
    arguments: dict[str, Any] = dict(
        q=torch.zeros(3, 4, 64), cache=PagedKV(pool, pool.clone()), block_table=torch.zeros(3, 8, dtype=torch.int32),
        seq_lens=torch.full((3,), 100, dtype=torch.int32), max_kv_len=128, window=Window(40), scale=0.5,
    )  # fmt: skip
    return arguments | changes


def memo(**changes: Any) -> Any:
    return paged_call.prepare(**decode(**changes)).memo


def wide(*shape: int) -> Tensor:
    """Rows with a padded stride."""
    return torch.zeros(*shape[:-1], shape[-1] + 16)[..., :-16]


def shifted(*shape: int) -> Tensor:
    """A tensor that begins 4 bytes into an allocation."""
    return torch.zeros(torch.Size(shape).numel() + 1)[1:].view(shape)


LENS = torch.full((3,), 100, dtype=torch.int32)
DIFFERENT: dict[str, dict[str, Any]] = {
    "steps": {"q": torch.zeros(3, 1, 4, 64)},
    "heads": {"q": torch.zeros(3, 2, 64)},
    "q strides": {"q": wide(3, 4, 64)},
    "q alignment": {"q": shifted(3, 4, 64)},
    "cache strides": {"cache": PagedKV(wide(4, 2, 16, 64), wide(4, 2, 16, 64))},
    "v alignment": {"cache": PagedKV(torch.zeros(4, 2, 16, 64), shifted(4, 2, 16, 64))},
    "page size": {"cache": PagedKV(torch.zeros(4, 2, 32, 64), torch.zeros(4, 2, 32, 64))},
    "pages": {"cache": PagedKV(torch.zeros(5, 2, 16, 64), torch.zeros(5, 2, 16, 64))},
    "storage": {"cache": PagedKV.empty(INT8, 4, 2, 16, 64)},
    "table width": {"block_table": torch.zeros(3, 9, dtype=torch.int32)},
    "flat table": {"block_table": (torch.zeros(24, dtype=torch.int32), torch.arange(0, 25, 8, dtype=torch.int32))},
    "lens strides": {"seq_lens": torch.full((6,), 100, dtype=torch.int32)[::2]},
    "ragged": {"cu_seqlens_q": torch.arange(4, dtype=torch.int32)},
    "max_q_len": {"cu_seqlens_q": torch.arange(4, dtype=torch.int32), "max_q_len": 2},
    "max_kv_len": {"max_kv_len": 1024},
    "no window": {"window": None},
    "window size": {"window": Window(41)},
    "not causal": {"window": Window(40, causal=False)},
    "leading": {"window": Window(40, global_tokens=1)},
    "leading tensor": {"window": Window(40, global_tokens=LENS)},
    "leading bound": {"window": Window(40, global_tokens=LENS, max_global_tokens=7)},
    "scale": {"scale": 0.25},
    "scale sign": {"scale": -0.5},
    "softcap": {"softcap": 3.0},
    "sink": {"sink": torch.zeros(4)},
    "gqa": {"gqa": "interleaved"},
    "q_start": {"q_start": LENS},
    "out strides": {"out": wide(3, 4, 64)},
    "out alignment": {"out": shifted(3, 4, 64)},
    "lse": {"return_lse": True},
    "split_size": {"split_size": 64},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_decides_a_launch_is_in_the_signature(what: str) -> None:
    assert memo(**DIFFERENT[what]) is not memo()
    memos = [memo(**change) for change in DIFFERENT.values()]  # kept: a forgotten one's id may be given to another
    assert len(set(map(id, memos))) == len(DIFFERENT)


def test_other_tensors_and_contents_keep_the_signature() -> None:
    assert memo() is memo()
    assert memo() is memo(seq_lens=LENS - 70, q=torch.ones(3, 4, 64))
    assert memo() is memo(max_kv_len=127), "bounds count in steps, so that growing sequences stay known"


def test_a_changed_problem_forgets_what_was_remembered() -> None:
    problem = paged_call.prepare(**decode())
    assert problem.memo is not None
    assert replace(problem, window=Window(3)).memo is None


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"softcap": 1.0}, {"softcap": True}),
        ({"max_kv_len": 1}, {"max_kv_len": True}),
        ({"max_kv_len": 64}, {"max_kv_len": 64.0}),
        ({"return_lse": True}, {"return_lse": 1}),
        ({"scale": 1}, {"scale": True}),
        ({}, {"scale": [0.5]}),
        ({}, {"gqa": ["grouped"]}),
        ({}, {"window": 40.0}),
        ({}, {"q": torch.zeros(3, 4, 64, requires_grad=True)}),
        ({}, {"block_table": torch.zeros(3, 8, dtype=torch.int32).tolist()}),
        ({}, {"seq_lens": LENS.tolist()}),
        ({}, {"cache": (torch.zeros(4, 2, 16, 64),) * 2}),
    ],
    ids=str,
)
def test_what_equals_an_accepted_value_is_still_checked(good: dict[str, Any], bad: dict[str, Any]) -> None:
    paged_attention(**decode(**good), impl="reference")
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(bad))}: wanted"):
        paged_attention(**decode(**bad), impl="reference")


def test_grad_mode_is_part_of_it() -> None:
    q = torch.zeros(3, 4, 64, requires_grad=True)
    with torch.no_grad():
        paged_attention(**decode(q=q), impl="reference")
    with pytest.raises(ValueError, match=r"^q: wanted a tensor without grad"):
        paged_attention(**decode(q=q), impl="reference")


def test_dense_calls_are_remembered_too() -> None:
    q, k, cu = torch.zeros(8, 4, 64), torch.zeros(8, 2, 64), torch.tensor([0, 8], dtype=torch.int32)
    first = attention_call.prepare(q, k, k.clone(), cu, cu)
    assert attention_call.prepare(q.clone(), k.clone(), k, cu.clone(), cu).memo is first.memo
    assert attention_call.prepare(q, k, wide(8, 2, 64), cu, cu).memo is not first.memo
    with pytest.raises(ValueError, match=r"^v: wanted"):
        attention(q, k, k[:7], cu, cu)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "MOST_SIGNATURES", 3)
    memory, checked = Memory[int](), []

    def check(i: int) -> int:
        checked.append(i)
        return i

    calls = [0, 1, 2, 2, 0, 3, 3, 0]
    assert [memory.recall(check, (), {"i": i}) for i in calls] == calls
    assert checked == [0, 1, 2, 3, 0], "three are known, and the fourth makes room by forgetting them"


def test_what_cannot_be_a_key_is_not_remembered() -> None:
    class Subclass(Tensor):
        pass

    memory, checked = Memory[int](), []

    def check(x: Tensor) -> int:
        checked.append(x)
        return len(checked)

    unknown = torch.zeros(2).as_subclass(Subclass)
    assert [memory.recall(check, (unknown,), {}) for _ in range(2)] == [1, 2]


def test_bounds_are_rounded_up() -> None:
    assert [coarse(n) for n in (None, -1, 0, 1, 64, 65, True, 2.5)] == [None, -1, 0, 64, 64, 128, True, 2.5]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Plans that compile nothing and launch on a Recorder."""
    return recording(monkeypatch)


ROWS = pairwise(OPTIONS) + named(HEADS + SEEN + HALVES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.values()))
def test_a_remembered_launch_passes_what_a_new_one_would(row: dict[str, str], recorder: Recorder) -> None:
    from swath.backends.triton.arguments import operands_of

    first, second = problem_of(row), problem_of(row)
    assert first.memo is second.memo
    for arch, tiles in (("gfx942", "triton"), *(("sm_90", tiles) for tiles in tiles_of(first, "sm_90"))):
        plan = plan_for(tiles, first, Target(arch, 132))
        plan.run(operands_of(first), first.q.device)
        assert not recorder.launches, "the first run compiles"
        plan.run(operands_of(second), second.q.device)
        expected = fresh_arguments(second, arch, tiles)
        assert {args[1:9] for args in recorder.launches} == {(1, 1, 7, 11, (4, 1, 0), None, None, None)}
        assert recorder.taken() == expected


def test_a_remembered_append_takes_its_own_tensors(recorder: Recorder) -> None:
    from swath.backends.triton import append

    def case() -> Any:
        cache = PagedKV.empty(INT8, 4, 2, 16, 64)
        k, v = torch.zeros(2, 3, 2, 64)
        return append_call.prepare(cache, k, v, torch.arange(3))

    first, second = case(), case()
    assert first.memo is second.memo
    append.run(first)
    assert not recorder.launches, "the first run compiles"
    append.run(second)
    ((grid, *values),) = recorder.taken()
    cache = second.cache
    tensors = (second.k, second.v, cache.k, cache.v, cache.k_scale, cache.v_scale, second.slot_mapping)
    assert grid == 1, "a program has more than these six rows"
    assert values[:9] == [*map(plain, tensors), 6, 64]
    assert values[9:13] == [128, 64, 128, 64]


@has_triton
@pytest.mark.parametrize("queries", ["ragged", "long ragged"])
@pytest.mark.parametrize("storage", OPTIONS["storage"])
def test_a_mixed_batch_takes_three_kernels_and_a_few_more_over_8_bits(storage: str, queries: str) -> None:
    """One that copies, on Hopper one that rounds queries for int8 products, and one for sequences without room in the
    scratch, unless the host knows that all have."""

    row = {name: values[0] for name, values in OPTIONS.items()}
    mixed = problem_of(row | {"queries": queries, "storage": storage})
    int8 = storage == "int8 compute"
    copied = copies(mixed) is not None
    assert copied == (storage not in ("bf16", "fp16", "fp32") and not int8)
    for tiles in tiles_of(mixed, "sm_90"):
        has_copies = copied or (int8 and tiles == "hopper")
        first = ["split_kernel", "reduce_kernel", *["dequantise_kernel"] * has_copies]
        first += ["quantise_kernel"] * (has_copies and int8)
        others = ["tile_kernel"] * (has_copies and queries == "long ragged" and not int8)  # V alone has room
        plan = plan_for(tiles, mixed, Target("sm_90", 132))
        tile = "tile_kernel" if tiles == "triton" else "hopper_tile_kernel"
        assert [call.kernel.fn.__name__ for call in plan.calls] == [*first, tile, *others]
        assert [call.sources.get("claimed") for call in plan.calls[len(first) :]] == (
            ["copied", "others"] if others else [None]
        )


@has_triton
@pytest.mark.parametrize(
    ("rows", "num_seqs", "split_size", "mixed"),
    [
        (2048, 1, None, False),  # more rows than a sequence of a few has
        (17, 1, None, False),
        (2048, 1, 256, True),  # whether there are more decides no bit
        (4096, 2, None, False),
        (2048 + 17, 2, None, False),
        (2048 + 16, 2, None, True),
        (3 * 2048 + 17, 4, None, False),
        (3 * 2048 + 16, 4, None, True),
    ],
)
def test_no_splits_where_none_can_be_short(rows: int, num_seqs: int, split_size: int | None, mixed: bool) -> None:
    cache = PagedKV.empty(torch.bfloat16, 2, 8, 16, 128)
    cu, table = torch.zeros(num_seqs + 1, dtype=torch.int32), torch.zeros(num_seqs, 1024, dtype=torch.int32)
    q = torch.empty(rows, 32, 128, dtype=torch.bfloat16)
    longest = min(rows, 2048)
    call = paged_call.prepare(q, cache, table, cu[1:], cu_seqlens_q=cu, max_q_len=longest, split_size=split_size)
    for tiles, kernel in (("triton", "tile_kernel"), ("hopper", "hopper_tile_kernel")):
        plan = plan_for(tiles, call, Target("sm_90", 132))
        first = ["split_kernel", "reduce_kernel"] if mixed else []
        assert [call.kernel.fn.__name__ for call in plan.calls] == [*first, kernel]
        assert (plan.calls[-1].args["claimed"] > 0) == mixed


@has_triton
def test_chunks_among_decodes_have_room() -> None:
    """Two chunks of 2,048 tokens beside 62 decodes, all at 16,384 keys: as many rows of scratch as it may have."""

    cache = PagedKV.empty(KVQuant(torch.int8, "channel"), 2, 8, 16, 128, k_scale=SCALE, v_scale=SCALE)
    cu, table = torch.zeros(65, dtype=torch.int32), torch.zeros(64, 1024, dtype=torch.int32)
    q = torch.empty(2 * 2048 + 62, 32, 128, dtype=torch.bfloat16)
    mixed = paged_call.prepare(q, cache, table, cu[1:], cu_seqlens_q=cu, max_q_len=2048)
    plan = plan_for("hopper", mixed, Target("sm_90", 132))
    kernels = [call.kernel.fn.__name__ for call in plan.calls]
    assert kernels == ["split_kernel", "reduce_kernel", "dequantise_kernel", "hopper_tile_kernel", "tile_kernel"]
    assert plan.calls[2].grid == 7 * 1024 * 8, "rows x pages x kv heads"
    made = plan.scratch.tensors("meta")
    assert made["new_k"].shape == made["new_v"].shape == (7 * 1024, 8, 16, 128)
    assert made["new_table"].shape == (64, 1024)
    assert sum(made[name].nbytes for name in ("new_k", "new_v", "new_table")) <= SCRATCH_BYTES
    assert str(plan).endswith(str(plan.calls[-1])), "explain says what there is"


def test_a_launch_hook_gets_every_launch(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profilers hook Triton's launches: while one listens, launches go the way that tells it."""
    from triton import knobs

    from swath.backends.triton.arguments import operands_of

    problem = problem_of({name: values[0] for name, values in OPTIONS.items()})
    plan = plan_for("triton", problem, Target("sm_90", 132))
    plan.run(operands_of(problem), problem.q.device)
    listener = lambda metadata: None  # noqa: E731 -- the chain compares it by identity
    knobs.runtime.launch_enter_hook.add(listener)
    try:
        plan.run(operands_of(problem), problem.q.device)
        assert not recorder.launches
    finally:
        knobs.runtime.launch_enter_hook.remove(listener)
    plan.run(operands_of(problem), problem.q.device)
    assert recorder.launches


@has_triton
@pytest.mark.parametrize("steps", [2, 30])
def test_float32_queries_multiply_in_int8_by_tiles_that_int8_takes(steps: int) -> None:
    """An int8 product takes 32 keys or more; tiles for float32 products have 16."""
    cache = PagedKV.empty(KVQuant(torch.int8, "channel"), 2, 8, 16, 128, k_scale=SCALE, v_scale=SCALE)
    q, table = torch.empty(2, steps, 32, 128), torch.zeros(2, 64, dtype=torch.int32)
    problem = paged_call.prepare(q, cache, table, torch.zeros(2, dtype=torch.int32), compute="int8")
    for arch in ("sm_90", "gfx942"):
        assert plan_for("triton", problem, Target(arch, 132)).calls[0].args["BLOCK_N"] >= 32
