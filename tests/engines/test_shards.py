"""Steps over keys that ranks hold by turns, against one pass over all of them: real processes and gloo."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swath
from swath.engines.common import Layer, Step
from swath.engines.shards import Shard, attend_shared

KV_HEADS, GROUP, HEAD_DIM, PAGE = 2, 3, 32, 8


@dataclass(frozen=True)
class Shared:
    """A step: lengths of sequences and of their queries, the layer, and how keys are dealt out."""

    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...] | int = 1
    size: int | None = None
    leading: int | tuple[int, ...] = 0
    softcap: float = 0.0
    sink: bool = False
    interleave: int = 1
    padding: int = 0
    quant: torch.dtype = torch.float32
    span: tuple[int, int] | None = None  # an image, in the first sequence


CASES = {
    "decode": Shared((40, 3, 1)),
    "decode under a window, sinks": Shared((40, 150, 1), size=20, sink=True),
    "steps": Shared((40, 150, 4), 4, size=33, leading=3, interleave=4),
    "chunks, some of them whole prompts": Shared((40, 150, 9, 30), (40, 17, 0, 1), sink=True, padding=3),
    "chunks under a window, leading tokens of each": Shared(
        (40, 150, 9), (40, 17, 1), size=16, leading=(5, 0, 2), softcap=5.0, interleave=8
    ),
    "an image whose rows see one another": Shared((40, 9), (30, 1), size=12, span=(15, 34), interleave=2),
    "int8 rows": Shared((90, 33), (12, 1), size=50, quant=torch.int8),
}


def filled(case: Shared, shard: Shard, k: Tensor, v: Tensor) -> tuple[swath.PagedKV, Tensor]:
    """A cache of the tokens that a rank holds, of k and v [B, keys, Hkv, D], and the table of its pages."""
    num_seqs, most = k.shape[:2]
    width = -(-shard.most(most) // PAGE)
    cache = swath.PagedKV.empty(case.quant, num_seqs * width, KV_HEADS, PAGE, HEAD_DIM)
    for kept in (cache.k, cache.v):
        kept.view(torch.uint8).fill_(0x7F)  # NaN where nothing is written, or 127
    table = torch.randperm(num_seqs * width, generator=torch.Generator().manual_seed(shard.rank)).int()
    table = table.view(num_seqs, width)
    for b, length in enumerate(case.kv_lens):
        p = torch.arange(length)
        p = p[p // shard.interleave % shard.world_size == shard.rank]
        at = torch.arange(len(p))
        swath.append_kv(cache, k[b, p], v[b, p], table[b, at // PAGE].long() * PAGE + at % PAGE)
    return cache, table


def step_of(case: Shared, shard: Shard | None, table: Tensor) -> Step:
    lens, uniform = torch.tensor(case.kv_lens, dtype=torch.int32), isinstance(case.q_lens, int)
    q_lens = (case.q_lens,) * len(lens) if isinstance(case.q_lens, int) else case.q_lens
    cu = torch.tensor([0, *q_lens]).cumsum(0).int()
    leading = case.leading if isinstance(case.leading, int) else torch.tensor(case.leading, dtype=torch.int32)
    spans = None if case.span is None else torch.tensor([[case.span], *[[(0, 0)]] * (len(lens) - 1)], dtype=torch.int32)
    return Step(
        block_table=table, seq_lens=lens, slots=torch.empty(0, dtype=torch.int64), num_tokens=sum(q_lens),
        max_q_len=max(q_lens), max_kv_len=max(case.kv_lens), cu_seqlens_q=None if uniform else cu,
        global_tokens=leading, shard=shard, spans=spans,
    )  # fmt: skip


def error_of(case: Shared, rank: int, ranks: int) -> float:
    """The largest difference between what this rank makes and one pass over all keys with all heads."""
    torch.manual_seed(0)  # the same tensors on each rank
    k, v = torch.randn(2, len(case.kv_lens), max(case.kv_lens), KV_HEADS, HEAD_DIM)
    alone = Shard(0, 1)
    cache, table = filled(case, alone, k, v)
    whole = step_of(case, None, table)
    n = whole.num_tokens + case.padding
    q = torch.randn(n, KV_HEADS, ranks, GROUP, HEAD_DIM)
    sink = torch.randn(KV_HEADS, ranks, GROUP) if case.sink else None
    layer = Layer(case.size, HEAD_DIM**-0.5, case.softcap, None if sink is None else sink.flatten())
    wanted = whole.attend(layer, q.flatten(1, 3), cache).view(-1, KV_HEADS, ranks, GROUP, HEAD_DIM)[:, :, rank]
    shard = Shard(rank, ranks, case.interleave)
    cache, table = filled(case, shard, k, v)
    own = replace(layer, sink=None if sink is None else sink[:, rank].flatten())
    out = torch.full((n, KV_HEADS * GROUP, HEAD_DIM), 7.0)
    attend_shared(step_of(case, shard, table), own, q[:, :, rank].flatten(1, 2), cache, out, dist.group.WORLD)
    assert (out[whole.num_tokens :] == 7).all(), "padding rows"
    return float((out[: whole.num_tokens] - wanted.flatten(1, 2)).abs().nan_to_num(torch.inf).max())


def work(rank: int, ranks: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    try:
        answers.put({name: error_of(case, rank, ranks) for name, case in CASES.items()})
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def errors(request: pytest.FixtureRequest) -> list[dict[str, float]]:
    """Of each rank, by case."""
    ranks = request.param
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("spawn")
        answers = context.Queue()
        processes = [context.Process(target=work, args=(r, ranks, f"{folder}/store", answers)) for r in range(ranks)]
        for process in processes:
            process.start()
        try:
            return [answers.get(timeout=120) for _ in processes]
        finally:
            for process in processes:
                process.join(10)
                process.kill()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_pass(errors: list[dict[str, float]], name: str) -> None:
    assert max(found[name] for found in errors) < 2e-5


def test_attention_to_later_keys_is_refused() -> None:
    step = replace(step_of(CASES["decode"], Shard(0, 2), torch.zeros(3, 20, dtype=torch.int32)), causal=False)
    with pytest.raises(ValueError, match="causal"):
        step.window(None)


def test_a_shard_counts_as_bounds_do() -> None:
    shard = Shard(1, 3, 4)
    assert shard.held(torch.tensor([0, 4, 5, 8, 24])).tolist() == [0, 0, 1, 4, 8]
    assert [shard.most(n) for n in (0, 1, 12, 13)] == [0, 4, 4, 8]
