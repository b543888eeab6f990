"""The real vLLM on swath with decode context parallelism, on a CPU: part of ``make test-vllm``.

Two ranks of tensor parallelism hold every key twice, or by turns: then answers must be the same. Each rank is a process
of this test. vLLM numbers slots of shared contexts on GPUs only (in Triton), so ``slots_of_own_keys`` does it here.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
from tiny_models import save
from torch import Tensor

RANKS = 2
NEW_TOKENS = 16
PROMPTS = (5, 40, 200, 1)
"""Tokens of each; those of a step are 128 at most, so that the longest is cut."""
LOGPROB_BUDGET = {"auto": 2e-5, "int8_per_token_head": 0.1}
"""What float32 sums in another order do to a logprob here. Over int8, keys that differ in their last bits are now and
then rounded to another step."""
Answers = list[tuple[list[int], list[dict[int, float]]]]
"""Of each prompt: its tokens, and the logprobs of the likeliest ones at each."""

HEADS: dict[str, Any] = dict(num_attention_heads=8, num_key_value_heads=1)
"""One kv head for two ranks: without it vLLM shares no context."""
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(num_hidden_layers=3)),
    "gemma3": ("Gemma3TextConfig", dict(num_hidden_layers=6, sliding_window=40, query_pre_attn_scalar=64)),
}
"""Gemma has layers with a window. Ranks share their keys where vLLM keeps them like those of other layers: without its
hybrid manager."""


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all ranks load."""
    config, own = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, config, HEADS | own)
    return folder


def slots_of_own_keys(
    cu: Tensor, positions: Tensor, table: Tensor, block_size: int, ranks: int, rank: int, interleave: int
) -> Tensor:
    """Where a rank writes the tokens of a step: -1 for those of other ranks."""
    n = int(cu[-1])
    p, row = positions[:n], torch.searchsorted(cu[1:].long().contiguous(), torch.arange(n), right=True)
    block, at = p // (block_size * ranks), p % (block_size * ranks)
    slot = table[row, block].long() * block_size + at // (interleave * ranks) * interleave + at % interleave
    return slot.where(at // interleave % ranks == rank, -1)


def number_slots_here(numbered: list[int]) -> None:
    """Let vLLM number slots so where ranks share a context, and count the own ones of each step."""
    from vllm.utils import cpu_triton_utils as vllm_cpu

    plain = vllm_cpu._compute_slot_mapping_kernel_impl

    def number(
        num_tokens: int, max_num_tokens: int, cu: Tensor, positions: Tensor, table: Tensor, stride: int, out: Tensor,
        block_size: int, ranks: int = 1, rank: int = 0, interleave: int = 1, *others: Any,
    ) -> None:  # fmt: skip
        if ranks == 1:
            plain(num_tokens, max_num_tokens, cu, positions, table, stride, out, block_size)
            return
        own = slots_of_own_keys(cu, positions, table, block_size, ranks, rank, interleave)
        out[: len(own)], out[len(own) : max_num_tokens] = own, -1
        numbered.append(int((own >= 0).sum()))

    vllm_cpu._compute_slot_mapping_kernel_impl = number


def work(rank: int, port: int, model: str, options: dict[str, Any], answers: Any) -> None:
    """A rank: vLLM in this process, launched from outside."""
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import vllm_environment  # noqa: F401 - before vLLM

    numbered: list[int] = []
    number_slots_here(numbered)
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, dtype="float32", tensor_parallel_size=RANKS, distributed_executor_backend="external_launcher",
        attention_backend="CUSTOM", enforce_eager=True, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=128,
        block_size=16, seed=0, skip_tokenizer_init=True, disable_hybrid_kv_cache_manager=True,
        **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompts = [dict(prompt_token_ids=torch.randint(3, 500, (n,), generator=generator).tolist()) for n in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=4, ignore_eos=True, detokenize=False)
    found = [output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=False)]
    said = [(list(x.token_ids), [{k: v.logprob for k, v in step.items()} for step in x.logprobs]) for x in found]
    answers.put((said, sum(numbered)))


@cache
def generated(model: Path, **options: Any) -> list[tuple[Answers, int]]:
    """What each rank answers, and how many keys it wrote, as far as they were counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=work, args=(r, port, str(model), options, answers)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    found: list[tuple[Answers, int]] = []
    try:
        while len(found) < RANKS:
            try:
                found.append(answers.get(timeout=1))
            except Empty:
                if any(process.exitcode for process in ranks):
                    raise RuntimeError("a rank has died: its output says why") from None
    finally:
        for process in ranks:
            process.join(20 if len(found) == RANKS else 0)
            process.kill()
    return found


@pytest.mark.parametrize(("kv_cache_dtype", "interleave"), [("auto", 1), ("auto", 8), ("int8_per_token_head", 16)])
def test_ranks_that_share_a_context_answer_as_ranks_that_do_not(
    model: Path, kv_cache_dtype: str, interleave: int
) -> None:
    (wanted, _), _ = generated(model, kv_cache_dtype=kv_cache_dtype)
    shared = generated(
        model, kv_cache_dtype=kv_cache_dtype, decode_context_parallel_size=RANKS, cp_kv_cache_interleave_size=interleave
    )
    keys = sum(PROMPTS) + len(PROMPTS) * (NEW_TOKENS - 1)
    written = [count for _, count in shared]
    assert keys <= sum(written) < 1.5 * keys, "each key once, and those of the steps that warm the engine up"
    assert min(written) > keys // 3
    budget = LOGPROB_BUDGET[kv_cache_dtype]
    for answers, _ in shared:
        for (tokens, steps), (same, wanted_steps) in zip(answers, wanted, strict=True):
            assert tokens == same
            for step, other in zip(steps, wanted_steps, strict=True):
                assert all(abs(p - other[t]) < budget for t, p in step.items() if t in other)
