"""The real vLLM on swath, on a CPU: run by ``make test-vllm`` in an environment of its own.

Tiny models with random weights generate through vLLM's scheduler (chunked prefill, mixed batches, a cached prefix) and
are held to Transformers' eager attention; over quantised caches, to Transformers on swath's PagedCache, whose reference
backend computes in float64. ``real_vllm_model.py`` has a language model.
"""

from __future__ import annotations

import ast
import gc
import inspect
from dataclasses import fields
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import vllm_environment  # noqa: F401 - first of all
import vllm_stub
from tiny_models import VOCABULARY, save
from torch import Tensor

import swath
import swath.engines.vllm
import swath.hf
from swath import KVQuant

ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024,
    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=48)),
    "gemma2": ("Gemma2Config", dict(sliding_window=40, query_pre_attn_scalar=64, attn_logit_softcapping=5.0)),
    "gemma3": ("Gemma3TextConfig", dict(num_hidden_layers=6, sliding_window=40, query_pre_attn_scalar=64)),
    "gpt_oss": (
        "GptOssConfig",
        dict(sliding_window=32, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE),
    ),
}
NEW_TOKENS = 12
# What float32 sums in another order do to a logprob here; one lost key in a window of 32 does a thousand times as much.
LOGPROB_BUDGET = 2e-5
# Of what quantising changes: keys and values that differ in their last bits are now and then rounded to another step.
QUANTISED_BUDGET = 0.1


class Answer(NamedTuple):
    """Tokens that were generated after a prompt, and the logprobs of the likeliest ones at each."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models, saved as checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    for name, (config, own) in CONFIGS.items():
        save(folder / name, config, own)
    return folder


def prompts() -> list[list[int]]:
    """Short and long ones, and three with a common beginning of several pages."""
    generator = torch.Generator().manual_seed(1)
    texts: list[Tensor] = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (5, 33, 150, 80)]
    *alone, base = [x.tolist() for x in texts]
    return [*alone, *([*base, *end] for end in ([7, 8, 9], [10, 11], [12]))]


def generate(path: Path, **options: Any) -> list[Answer]:
    """Greedy tokens of vLLM on swath: all prompts at once, but the last one after them, when its pages are cached."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.attention import Attention

    given = dict(
        model=str(path), skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=64, dtype="float32", seed=0, block_size=32, kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    llm = LLM(**given | options)
    how = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5, detokenize=False
    )  # fmt: skip
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    results = [r for batch in (asked[:-1], asked[-1:]) for r in llm.generate(batch, how, use_tqdm=False)]
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    used = {type(layer.impl).__module__ for layer in layers if isinstance(layer, Attention)}
    assert used == {"swath.engines.vllm.impl"}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [
        Answer(
            list(r.outputs[0].token_ids),
            [{int(k): v.logprob for k, v in d.items()} for d in r.outputs[0].logprobs],
            r.num_cached_tokens,
        )
        for r in results
    ]


def worst_of(path: Path, answers: list[Answer], quant: KVQuant | str | None = None) -> tuple[float, bool]:
    """How far logprobs are from those of Transformers, and whether all tokens are its own likeliest ones.

    It runs on eager attention, or on swath's reference over a quantised cache.
    """
    implementation = "eager"
    if quant is not None:
        implementation = "swath-reference"
        swath.hf.register(implementation, impl="reference")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=implementation
    )
    worst, same = 0.0, True
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids = torch.tensor([prompt + answer.tokens[:-1]])
        cache = None if quant is None else swath.hf.PagedCache(model.config, quant=quant)
        with torch.no_grad():
            scores = model(ids, past_key_values=cache).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
        same &= answer.tokens == scores.argmax(-1).tolist()
        for row, likeliest in zip(scores, answer.logprobs, strict=True):
            worst = max(worst, *(abs(row[token].item() - p) for token, p in likeliest.items()))
    return worst, same


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(models: Path, name: str) -> None:
    answers = generate(models / name)
    worst, same = worst_of(models / name, answers)
    print(f"\n{name}: logprobs within {worst:.1e}, {[a.cached for a in answers]} tokens of the prompts cached")
    assert same
    assert worst <= LOGPROB_BUDGET
    assert answers[-1].cached >= 64  # the prefix was not computed again


E4M3, E5M2 = KVQuant(torch.float8_e4m3fn), KVQuant(torch.float8_e5m2)  # scales of 1, as vLLM has without calibration
CACHES = {"int8_per_token_head": "int8", "fp8_per_token_head": "fp8", "fp8": E4M3, "fp8_e5m2": E5M2}


@pytest.mark.parametrize("kv_cache_dtype", CACHES)
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_quantised_caches(models: Path, name: str, kv_cache_dtype: str) -> None:
    answers = generate(models / name, kv_cache_dtype=kv_cache_dtype)
    worst, _ = worst_of(models / name, answers, CACHES[kv_cache_dtype])
    effect, _ = worst_of(models / name, answers)
    print(f"\n{name}, {kv_cache_dtype}: within {worst:.1e} of the same quantisation, {effect:.1e} of none")
    assert worst <= QUANTISED_BUDGET * effect


def test_speculation_changes_no_token(models: Path) -> None:
    """Drafts of three tokens are verified at once; the likeliest tokens are those of plain decode."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    worst, same = worst_of(models / "mistral", generate(models / "mistral", speculative_config=speculation))
    assert same
    assert worst <= LOGPROB_BUDGET


SELECTION = dict(
    head_size=64, dtype=torch.bfloat16, kv_cache_dtype="int8_per_token_head", block_size=16, use_mla=False,
    has_sink=True, use_sparse=False, use_mm_prefix=True, use_per_head_quant_scales=True, device_capability=None,
    attn_type="decoder", has_sliding_window=True, use_non_causal=True, use_batch_invariant=True, use_rswa=True,
)  # fmt: skip
REFUSED = {
    "head_size": dict(head_size=60),
    "kv_cache_dtype": dict(kv_cache_dtype="int4_per_token_head"),
    "block_size": dict(block_size=8),
    "MLA": dict(use_mla=True),
    "sparse": dict(use_sparse=True),
    "attention type": dict(attn_type="encoder_only"),
    "PCP": dict(use_pcp=True),
    "float16 queries": dict(kv_cache_dtype="float16"),
}


def test_what_vllm_is_told_when_it_chooses() -> None:
    """Its own question, as the platform for CUDA asks it."""
    validate = import_module("swath.engines.vllm.backend").SwathBackend.validate_configuration
    assert validate(**SELECTION) == []
    assert validate(**SELECTION | dict(use_dcp=True, use_non_causal=False)) == []
    for reason, change in REFUSED.items():
        (said,) = validate(**SELECTION | change)
        assert reason in said


def test_the_stub_is_like_vllm() -> None:
    """Names, the parameters of functions, the fields of dataclasses, the values of enums: what a stub has, vLLM has."""
    for path, names in vllm_stub.MODULES.items():
        for name in names:
            if name in NEWER and not hasattr(import_module(path), name):
                continue
            ours, theirs = getattr(vllm_stub, name), getattr(import_module(path), name)
            if isinstance(ours, vllm_stub.Platform):
                ours, theirs = type(ours), type(theirs)
            if not isinstance(ours, type):
                assert type(ours) is type(theirs), name
                same_parameters(ours, theirs)
                continue
            for member, value in vars(ours).items():
                if isinstance(ours, type) and issubclass(ours, Enum) and isinstance(value, ours):
                    assert theirs[member].value == value.value, f"{name}.{member}"
                elif callable(value) or isinstance(value, classmethod):
                    same_parameters(getattr(ours, member), getattr(theirs, member))
                elif not member.startswith("__"):
                    assert hasattr(theirs, member) or member in {f.name for f in fields(theirs)}, f"{name}.{member}"


NEWER = ("KV_CACHE_DTYPES", "register_kv_cache_dtype")
"""Names that 0.33 has and 0.32 has not."""


def same_parameters(ours: Any, theirs: Any) -> None:
    """Every parameter of a stub's function is one of the real function's, in the same order."""
    if not callable(ours) or isinstance(ours, type):
        return
    mine, real = (list(inspect.signature(f).parameters) for f in (ours, theirs))
    assert [p for p in real if p in mine] == mine, f"{ours}: {mine}, vLLM has {real}"


def test_what_the_adapter_imports_is_in_the_stub() -> None:
    imported = set()
    for path in Path(swath.engines.vllm.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                imported |= {(node.module, alias.name) for alias in node.names}
    known = {(path, name) for path, names in vllm_stub.MODULES.items() for name in names}
    known |= {tuple(path.rsplit(".", 1)) for path in vllm_stub.MODULES}
    assert imported - known == set()
