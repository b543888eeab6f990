"""Host bounds: whatever true one a call gives, it launches and allocates what its tensors have room for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_variants import tiles_of
from torch import Tensor

from conftest import plan_for
from swath import KVQuant, PagedKV, Window, target
from swath.ops import attention as attention_call
from swath.ops import paged as paged_call
from swath.problem import Problem
from swath.target import Target
from swath.window import LARGEST_SIZE

pytestmark = pytest.mark.skipif(not target.has_triton(), reason="Triton is not installed")

NUM_SEQS, KV_HEADS, GROUP, PAGE_SIZE, PAGES = 64, 2, 8, 16, 8
CAPACITY = PAGES * PAGE_SIZE
ABSURD = (1 << 20, LARGEST_SIZE, 1 << 40)
LENS = torch.ones(NUM_SEQS, dtype=torch.int32)


def paged(storage: torch.dtype, tokens: tuple[int, ...], **options: Any) -> Problem:
    """Queries [*tokens, Hq, 128] over tables of 128 keys; as ragged ones with ``cu_seqlens_q``."""
    granularity = "none" if storage == torch.bfloat16 else "token"
    cache = PagedKV.empty(KVQuant(storage, granularity), 4, KV_HEADS, PAGE_SIZE, 128)
    q = torch.empty(*tokens, KV_HEADS * GROUP, 128, dtype=torch.bfloat16)
    return paged_call.prepare(q, cache, torch.zeros(NUM_SEQS, PAGES, dtype=torch.int32), LENS, **options)


def dense(tokens: int, **options: Any) -> Problem:
    """As many queries as keys, in 64 sequences."""
    q, kv = (torch.empty(tokens, heads, 128, dtype=torch.bfloat16) for heads in (KV_HEADS * GROUP, KV_HEADS))
    cu = torch.zeros(NUM_SEQS + 1, dtype=torch.int32)
    return attention_call.prepare(q, kv, kv, cu, cu, **options)


RAGGED = {"cu_seqlens_q": torch.zeros(NUM_SEQS + 1, dtype=torch.int32)}
CALLS: dict[str, tuple[Any, dict[str, int]]] = {
    "decode": (lambda **b: paged(torch.bfloat16, (NUM_SEQS,), **b), {"max_kv_len": CAPACITY, "max_q_len": 1}),
    "decode, split_size": (
        lambda **b: paged(torch.bfloat16, (NUM_SEQS,), split_size=64, **b),
        {"max_kv_len": CAPACITY, "max_q_len": 1},
    ),
    "decode under a window": (
        lambda **b: paged(torch.bfloat16, (NUM_SEQS,), window=Window(100, global_tokens=LENS), **b),
        {"max_kv_len": CAPACITY, "max_q_len": 1},
    ),
    "steps over int8": (
        lambda **b: paged(torch.int8, (NUM_SEQS, 4), **b),
        {"max_kv_len": CAPACITY, "max_q_len": 4},
    ),
    "many steps over int8": (
        lambda **b: paged(torch.int8, (NUM_SEQS, 80), **b),
        {"max_kv_len": CAPACITY, "max_q_len": 80},
    ),
    "mixed batch": (
        lambda **b: paged(torch.bfloat16, (600,), **RAGGED, **b),
        {"max_kv_len": CAPACITY, "max_q_len": 600},
    ),
    "mixed batch over int8": (
        lambda **b: paged(torch.int8, (600,), **RAGGED, **b),
        {"max_kv_len": CAPACITY, "max_q_len": 600},
    ),
    "mixed batch, split_size": (
        lambda **b: paged(torch.int8, (600,), split_size=64, **RAGGED, **b),
        {"max_kv_len": CAPACITY, "max_q_len": 600},
    ),
    "dense": (lambda **b: dense(600, **b), {"max_kv_len": 600, "max_q_len": 600}),
}
"""Calls, and what their tensors have room for."""


def launches(problem: Problem) -> list[Any]:
    """All that a plan of each backend says, for an H200, but how many leading keys the kernel is told of."""
    said: list[Any] = []
    for tiles in tiles_of(problem, "sm_90"):
        plan = plan_for(tiles, problem, Target("sm_90", 132))
        for call in plan.calls:
            args = {p: call.args[p] for p in call.kernel.arg_names if p in call.args and p != "lead"}
            said.append((tiles, str(call), call.grid, args, call.options, call.sources, call.views))
        said.append((plan.scratch.nbytes, plan.scratch.offsets()))
    return said


@pytest.mark.parametrize("bound", ["max_kv_len", "max_q_len"])
@pytest.mark.parametrize("name", CALLS)
def test_any_true_bound_launches_what_there_is_room_for(name: str, bound: str) -> None:
    prepare, room = CALLS[name]
    expected = launches(prepare())
    for value in (room[bound], room[bound] + 1, *ABSURD):
        assert launches(prepare(**{bound: value})) == expected
    assert launches(prepare(**dict.fromkeys(room, LARGEST_SIZE))) == expected


@pytest.mark.parametrize("name", ["decode", "decode, split_size", "mixed batch over int8"])
def test_a_closer_bound_launches_less(name: str) -> None:
    """So that the comparisons above could differ."""
    prepare, _room = CALLS[name]
    assert launches(prepare(max_kv_len=64)) != launches(prepare())


def windowed(counts: Tensor | int, most: int | None, storage: torch.dtype, **options: Any) -> Problem:
    return paged(storage, window=Window(20, global_tokens=counts, max_global_tokens=most), **options)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "options",
    [{"tokens": (NUM_SEQS,)}, {"tokens": (NUM_SEQS,), "split_size": 64}, {"tokens": (600,), **RAGGED}],
    ids=["decode", "split_size", "mixed batch"],
)
def test_any_true_bound_of_leading_keys_does_too(options: dict[str, Any], storage: torch.dtype) -> None:
    expected = launches(windowed(LENS, None, storage, **options))
    for most in (CAPACITY, CAPACITY + 1, *ABSURD):
        assert launches(windowed(LENS, most, storage, **options)) == expected


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tokens", [NUM_SEQS, 600])
def test_more_leading_keys_than_there_is_room_for_launch_no_more(tokens: int, storage: torch.dtype) -> None:
    ragged = RAGGED if tokens == 600 else {}
    expected = launches(windowed(CAPACITY, None, storage, tokens=(tokens,), **ragged))
    for count in (CAPACITY + 1, LARGEST_SIZE):
        assert launches(windowed(count, None, storage, tokens=(tokens,), **ragged)) == expected
