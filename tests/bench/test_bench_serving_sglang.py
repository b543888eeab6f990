"""``swath bench serve`` on SGLang: whose turn it is, what it serves, and how its calls of attention are read."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

import swath
from swath.bench.serving import check, sglang
from swath.bench.serving.engine import Call, Job
from swath.cli.bench_serve import job_of


def a_job(backend: str = "swath", model: str = "mistral-7b") -> Job:
    return job_of(f"{model}/bf16/{backend}", 8)


def test_a_thread_has_its_turns() -> None:
    said: list[str] = []

    def run() -> None:
        for i in range(2):
            said.append(f"it {i}")
            turns.give_back()
        raise ValueError("no more")

    turns = sglang.Turns(run)
    for i in range(2):
        turns.give()
        said.append(f"we {i}")
    assert said == ["it 0", "we 0", "it 1", "we 1"]
    with pytest.raises(RuntimeError, match="has ended") as raised:
        turns.give()
    assert str(raised.value.__cause__) == "no more"


def test_sglangs_jobs_are_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral has no window there, and gpt-oss takes swath under the name of another backend only."""
    import swath.engines.sglang as adapter

    monkeypatch.setenv(adapter.STAND_IN, "")
    registered: list[str] = []
    monkeypatch.setattr(adapter, "register", lambda: registered.append(os.environ[adapter.STAND_IN]))
    job = sglang.served(a_job())
    assert job.model.config(8)["sliding_window"] is None
    assert "no window" in job.model.in_words(8)
    assert sglang.served(a_job(model="gpt-oss-20b")).model.window == 128
    assert [sglang.registered(x) for x in (a_job("fa3"), job, a_job(model="gpt-oss-20b"))] == ["fa3", "swath", "triton"]
    assert [sglang.most_requests(x) for x in (job, a_job(model="gpt-oss-20b"))] == [sglang.MOST_REQUESTS, None]
    assert registered == ["", "triton"]


@pytest.mark.parametrize("windowed", [False, True])
def test_a_call_of_sglang_is_read_from_its_pools(windowed: bool) -> None:
    """Slots of tokens become pages; a layer of the window's pool has numbers of its own, and pages may be left over."""
    kv = torch.arange(3 * sglang.PAGE + 5).float().view(-1, 1, 1).repeat(1, 2, 16)
    requests = torch.zeros(3, 4 * sglang.PAGE, dtype=torch.int32)
    requests[1] = torch.arange(4 * sglang.PAGE) % (2 * sglang.PAGE) + sglang.PAGE
    pool = SimpleNamespace(
        get_kv_buffer=lambda _: (kv, kv), layers_mapping={0: (0, windowed)},
        translate_loc_from_full_to_swa=lambda slots: slots - sglang.PAGE,
    )  # fmt: skip
    runner = SimpleNamespace(
        token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=requests), attn_backend=None
    )
    layer = SimpleNamespace(
        layer_id=0, tp_q_head_num=4, head_dim=16, v_head_dim=16, sliding_window_size=31 if windowed else -1, scaling=0.5
    )
    batch = SimpleNamespace(
        seq_lens=torch.tensor([sglang.PAGE + 3]), req_pool_indices=torch.tensor([1]), extend_seq_lens=torch.tensor([3])
    )
    call = sglang._call(runner, layer, batch, (torch.zeros(3, 64),) * 3, torch.zeros(3, 64), None)
    assert call.q.shape == call.out.shape == (3, 4, 16)
    assert call.block_table.tolist() == ([[0, 1]] if windowed else [[1, 2]])
    assert call.cu_seqlens_q.tolist() == [0, 3]
    assert call.cache.k.shape[0] == 3
    assert call.size == (32 if windowed else None)
    batch.extend_seq_lens = None
    call = sglang._call(runner, layer, batch, (torch.zeros(1, 64),) * 3, torch.zeros(1, 64), None)
    assert call.cu_seqlens_q.tolist() == [0, 1]
    runner.attn_backend = type(sglang.TRITON, (), {})()
    assert sglang._call(runner, layer, batch, (torch.zeros(1, 64),) * 3, torch.zeros(1, 64), None).left_out == 1
    batch.extend_seq_lens = torch.tensor([1])
    assert sglang._call(runner, layer, batch, (torch.zeros(1, 64),) * 3, torch.zeros(1, 64), None).left_out == 0


def over_e4m3(backend: str, q: torch.Tensor, prefills: bool, cached: bool = True) -> tuple[torch.Tensor, swath.PagedKV]:
    """What 3 query tokens of 2 heads read; their own keys and values are 7 and 9, those before them 3 and 2 x 0.5."""
    k, v = (torch.full((2 * sglang.PAGE, 1, 128), x).to(torch.float8_e4m3fn if cached else q.dtype) for x in (3.0, 2.0))
    layer = SimpleNamespace(
        layer_id=0, tp_q_head_num=2, head_dim=128, v_head_dim=128, k_scale=None, v_scale=torch.tensor(0.5)
    )
    batch = SimpleNamespace(extend_seq_lens=torch.tensor([3]) if prefills else None, out_cache_loc=torch.arange(3) + 70)
    pool = SimpleNamespace(get_kv_buffer=lambda _: (k, v))
    given = (q.flatten(1), torch.full((3, 128), 7.0), torch.full((3, 128), 9.0))
    return sglang._read(type(backend, (), {})(), pool, layer, batch, given)


def test_queries_that_a_backend_rounds_count_as_rounded() -> None:
    """As those do that vLLM hands over in e4m3."""
    q = torch.randn(3, 2, 128)
    for backend in (sglang.FA3, sglang.TRITON, "SwathBackend"):
        found, cache = over_e4m3(backend, q, prefills=False)
        assert found.dtype == (q.dtype if backend == "SwathBackend" else torch.float8_e4m3fn)
        assert cache.k.dtype == torch.float8_e4m3fn
        assert over_e4m3(backend, q, prefills=False, cached=False)[0].dtype == q.dtype
    assert over_e4m3(sglang.FA3, q, prefills=True)[0].dtype == torch.float8_e4m3fn


def test_triton_reads_a_steps_own_keys_before_they_are_stored() -> None:
    """With queries as they came, and the cache with queries in e4m3: a product over both halves of the channels."""
    q = torch.randn(3, 2, 128)
    found, cache = over_e4m3(sglang.TRITON, q, prefills=True)
    scores = found @ cache.k[:, 0].flatten(0, 1).T
    torch.testing.assert_close(scores[..., 70], 7 * q.sum(-1))
    torch.testing.assert_close(scores[..., 69], 3 * q.to(torch.float8_e4m3fn).float().sum(-1))
    values = cache.v[:, 0].flatten(0, 1)
    assert values[[69, 70, 72, 73], 0].tolist() == [1.0, 9.0, 9.0, 1.0]
    seen = torch.arange(64, 73) < torch.tensor([71, 72, 73]).view(3, 1, 1)
    weights = (scores[..., 64:73] * 0.1).masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights @ values[64:73]).bfloat16()
    call = Call(found, out, cache, torch.tensor([[1]]), torch.tensor([9]), torch.tensor([0, 3]), None, 0.1)
    checker = check.Checker()
    for _ in range(check.EVERY):
        checker.look(call)
    assert checker.looked == 1
    assert checker.error < 1e-2


def test_answers_of_sglang_have_the_chosen_token_first() -> None:
    said = SimpleNamespace(
        output_top_logprobs_idx=[[5, 7], [9, 2]], output_top_logprobs_val=[[-0.1, -2.0], [-0.3, -0.4]],
        output_token_logprobs_val=[-2.0, -0.3],
    )  # fmt: skip
    answer = sglang._by_token(SimpleNamespace(logprob=said, output_ids=[7, 9]))
    assert [list(step.items()) for step in answer] == [[(7, -2.0), (5, -0.1)], [(9, -0.3), (2, -0.4)]]
