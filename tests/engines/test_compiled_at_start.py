"""Steps of a served model launch nothing that the warm-up of their engine's adapter did not compile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_stub
import torch
import vllm_stub
from launch_keys import late, running, warming
from torch import Tensor, nn
from vllm_batch import cache_tensor, config_of

from swath import target
from swath.pages import page_count

pytestmark = pytest.mark.skipif(
    not target.has_triton() or target.interpreting(), reason="the interpreter compiles nothing"
)

PAGE, CONTEXT, MOST_SEQS, MOST_TOKENS = 64, 16_448, 72, 8192
E4M3, CONTIGUOUS = torch.float8_e4m3fn, torch.contiguous_format


@dataclass(frozen=True)
class Model:
    """A served model: its layers by the keys in their windows."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    stored: torch.dtype = torch.bfloat16
    sink: bool = False
    two_pools: bool = False


MODELS = {
    "gpt-oss": Model(64, 8, 64, (128, None), sink=True, two_pools=True),
    "gpt-oss, one pool": Model(64, 8, 64, (128, None), sink=True),
    "mistral": Model(32, 8, 128, (4096,)),
    "mistral, no window": Model(32, 8, 128, (None,)),
    "mistral fp8": Model(32, 8, 128, (None,), stored=E4M3),
    "gemma": Model(16, 8, 256, (1024, None)),
    "one kv head": Model(32, 1, 128, (1024, None)),
}

STEPS = {
    "a prompt": ((5,), (5,)),
    "a long prompt": ((8192,), (8192,)),
    "the second chunk of a prompt": ((8192,), (16_384,)),
    "a short prompt after a prefix": ((37,), (4037,)),
    "prompts": ((5, 33, 150, 1000, 4), (5, 33, 150, 1000, 4)),
    "prompts after prefixes": ((5, 33, 150, 2100), (69, 8000, 150, 16_384)),
    "many prompts": ((7,) * 65, (7,) * 65),
    "mixed": ((1, 1, 700, 1), (9000, 3, 700, 14_000)),
    "mixed, many": ((1,) * 60 + (2048,), (8192,) * 60 + (4096,)),
    **{f"decode of {n} at {kv_len}": ((1,) * n, (kv_len,) * n) for n in (1, 2, 7, 64, 70) for kv_len in (9, 900, 8200)},
}
"""Query tokens and keys of each sequence."""


def drawn(model: Model, sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v as parts of the rows that one product made, and each on its own."""
    tokens, kv = sum(sizes), model.num_kv_heads * model.head_dim
    rows = torch.empty(tokens, model.num_heads * model.head_dim + 2 * kv, dtype=torch.bfloat16)
    q, k, v = rows.split([rows.shape[1] - 2 * kv, kv, kv], -1)
    yield q, k, v
    yield q.contiguous(), k.contiguous(), v.contiguous()


class SglangModel:
    """A model in SGLang's hands, on a CPU."""

    def __init__(self, model: Model, sglang: SimpleNamespace) -> None:
        self.model, self.sglang = model, sglang
        common = dict(
            page_size=PAGE, dtype=model.stored, head_num=model.num_kv_heads, head_dim=model.head_dim, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
        numbers = range(len(model.windows))
        if model.two_pools:
            windowed = [i for i in numbers if model.windows[i]]
            others = [i for i in numbers if not model.windows[i]]
            self.pool = sglang.SWAKVPool(
                size=2 * PAGE, size_swa=2 * PAGE, swa_attention_layer_ids=windowed, full_attention_layer_ids=others,
                **common,
            )  # fmt: skip
            self.pool.register_mapping(torch.zeros(4 * PAGE, dtype=torch.int64))
        else:
            self.pool = sglang.MHATokenToKVPool(size=2 * PAGE, layer_num=len(numbers), **common)
        self.layers = [
            sglang.RadixAttention(
                model.num_heads, model.head_dim, model.head_dim**-0.5, model.num_kv_heads, i,
                sliding_window_size=-1 if window is None else window - 1,
            )
            for i, window in enumerate(model.windows)
        ]  # fmt: skip
        self.sinks = nn.Parameter(torch.zeros(model.num_heads).bfloat16(), requires_grad=False) if model.sink else None
        runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(MOST_SEQS + 1, CONTEXT, dtype=torch.int32)),
            token_to_kv_pool=self.pool, sliding_window_size=next(filter(None, model.windows), 0) - 1,
            model=nn.ModuleList(self.layers), use_mla_backend=False,
            model_config=sglang_stub.model_config(torch.bfloat16),
        )  # fmt: skip
        self.backend = sglang.backend.SwathBackend(runner)

    def warm(self) -> None:
        """What ``_warm`` does on a GPU."""
        for layer in self.layers:
            kept = self.backend._kept_of(layer, self.sinks)
            self.backend._warm_for(layer, kept)

    def run(self, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], graph: bool) -> None:
        """Forward passes: as decode where every sequence has one token, and as prefill."""
        modes = ["DECODE"] * (set(q_lens) == {1}) + ["MIXED" if 1 in q_lens else "EXTEND"] * (not graph)
        for mode in modes:
            batch = self.batch(self.sglang.ForwardMode[mode], q_lens, kv_lens)
            if graph:
                self.backend.init_forward_metadata_out_graph(batch, in_capture=True)
            else:
                self.backend.init_forward_metadata(batch)
            given = {} if self.sinks is None else {"sinks": self.sinks}
            for q, k, v in drawn(self.model, q_lens):
                for layer in self.layers:
                    self.backend.forward(q, k, v, layer, batch, **given)

    def batch(self, mode: Any, q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> Any:
        """What the backend reads of a ``ForwardBatch``, whose lengths are the first of longer tensors."""
        ragged = None if mode.is_decode() else torch.tensor(q_lens)
        return SimpleNamespace(
            forward_mode=mode, batch_size=len(q_lens), input_ids=torch.zeros(sum(q_lens), dtype=torch.int64),
            req_pool_indices=torch.zeros(MOST_SEQS, dtype=torch.int64), seq_lens_cpu=torch.tensor(kv_lens),
            seq_lens=torch.tensor(kv_lens), out_cache_loc=torch.zeros(sum(q_lens), dtype=torch.int64), spec_info=None,
            extend_seq_lens=ragged, extend_seq_lens_cpu=None if ragged is None else list(q_lens),
        )  # fmt: skip


class VllmModel:
    """A model in vLLM's hands, on a CPU."""

    def __init__(self, model: Model, vllm: SimpleNamespace) -> None:
        self.model = model
        kv_cache_dtype = "auto" if model.stored == torch.bfloat16 else "fp8"
        given = vllm.FullAttentionSpec(
            block_size=PAGE, num_kv_heads=model.num_kv_heads, head_size=model.head_dim,
            dtype=torch.bfloat16 if kv_cache_dtype == "auto" else torch.uint8,
            kv_quant_mode=vllm.KVQuantMode["NONE" if kv_cache_dtype == "auto" else "FP8_PER_TENSOR"],
        )  # fmt: skip
        spec = vllm.backend.SwathBackend.customize_spec(given)
        sinks = torch.zeros(model.num_heads).bfloat16() if model.sink else None
        scales = dict(_k_scale=torch.ones(()), _v_scale=torch.ones(()), _k_scale_float=1.0, _v_scale_float=1.0)
        self.layers = {
            str(i): SimpleNamespace(
                impl=vllm.backend.SwathImpl(
                    model.num_heads, model.head_dim, model.head_dim**-0.5, model.num_kv_heads, sliding_window=window,
                    kv_cache_dtype=kv_cache_dtype, sinks=sinks,
                ),
                **scales,
            )
            for i, window in enumerate(model.windows)
        }  # fmt: skip
        config = config_of(**self.layers)
        config.model_config.max_model_len, config.speculative_config = CONTEXT, None
        config.scheduler_config = SimpleNamespace(max_num_seqs=MOST_SEQS, max_num_batched_tokens=MOST_TOKENS)
        self.caches = [cache_tensor(spec, 2, "LBNHC", "cpu") for _ in self.layers]
        self.builder = vllm.backend.SwathBuilder(spec, list(self.layers), config, torch.device("cpu"))
        self.metadata = vllm.CommonAttentionMetadata
        self.table = torch.zeros(MOST_SEQS, page_count(CONTEXT, PAGE), dtype=torch.int32)

    def warm(self) -> None:
        """What a builder does on a GPU."""
        self.builder.warm()

    def run(self, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], graph: bool) -> None:
        """A forward pass, whose tensors are the first rows of longer ones."""
        bounds = torch.zeros(MOST_SEQS + 1, dtype=torch.int32)
        seq_lens = torch.zeros(MOST_SEQS, dtype=torch.int32)
        num_seqs, tokens = len(q_lens), sum(q_lens)
        bounds[: num_seqs + 1] = torch.tensor([0, *accumulate(q_lens)])
        metadata = self.metadata(
            query_start_loc=bounds[: num_seqs + 1], query_start_loc_cpu=bounds[: num_seqs + 1],
            seq_lens=seq_lens[:num_seqs], num_reqs=num_seqs, num_actual_tokens=tokens, max_query_len=max(q_lens),
            max_seq_len=CONTEXT if graph else max(kv_lens), block_table_tensor=self.table[:num_seqs],
            slot_mapping=torch.zeros(MOST_TOKENS, dtype=torch.int64)[:tokens], causal=True,
            mm_req_doc_ranges=None, rswa_prefix_lens=None,
        )  # fmt: skip
        build = self.builder.build_for_cudagraph_capture if graph else partial(self.builder.build, 0)
        step = build(metadata)
        for q, k, v in drawn(self.model, q_lens):
            q, k, v = (x.unflatten(-1, (-1, self.model.head_dim)) for x in (q, k, v))
            for layer, kv in zip(self.layers.values(), self.caches, strict=True):
                layer.impl.do_kv_cache_update(layer, k, v, kv, metadata.slot_mapping)
                layer.impl.forward(layer, q, k, v, kv, step, torch.empty_like(q, memory_format=CONTIGUOUS))


@contextmanager
def sglang_model(model: Model) -> Iterator[SglangModel]:
    """In SGLang's hands, or its stub's."""
    with sglang_stub.installed():
        backend = import_module("swath.engines.sglang.backend")
        yield SglangModel(model, SimpleNamespace(**names_of(sglang_stub.MODULES), backend=backend))


@contextmanager
def vllm_model(model: Model) -> Iterator[VllmModel]:
    """In vLLM's hands, or its stub's."""
    with vllm_stub.installed():
        backend = import_module("swath.engines.vllm.backend")
        yield VllmModel(model, SimpleNamespace(**names_of(vllm_stub.MODULES), backend=backend))


def names_of(modules: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The names of an engine that tests use."""
    found = ((import_module(path), name) for path, names in modules.items() for name in names)
    return {name: getattr(module, name) for module, name in found if hasattr(module, name)}


def random_steps(number: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Decode, prompts, chunks, and decode beside a chunk."""
    draw = random.Random(0)
    for _ in range(number):
        n = draw.choice((1, 2, 3, 8, draw.randint(1, MOST_SEQS), draw.randint(1, MOST_SEQS)))
        longest = [int(2 ** draw.uniform(0, 13)) for _ in range(n)]
        prompts = tuple(min(q_len, MOST_TOKENS // n) for q_len in longest)
        beside = (1,) * (n - 1) + (min(longest[0], MOST_TOKENS - n + 1),)
        q_lens = draw.choice(((1,) * n, prompts, beside))
        yield q_lens, tuple(min(CONTEXT, q_len + int(2 ** draw.uniform(0, 14))) for q_len in q_lens)


ENGINES = {"sglang": sglang_model, "vllm": vllm_model}
SERVED = [
    (engine, name) for name, model in MODELS.items() for engine in ENGINES if engine == "sglang" or not model.two_pools
]


@pytest.mark.parametrize(("engine", "name"), SERVED)
def test_steps_launch_what_was_compiled(engine: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ENGINES[engine](MODELS[name]) as served:
        with warming(monkeypatch) as compiled:
            served.warm()
        with running(monkeypatch) as launched:
            for q_lens, kv_lens in (*STEPS.values(), *random_steps(40)):
                served.run(q_lens, kv_lens, graph=False)
            for size in (1, 2, 4, 8, 16, 32, 64):
                served.run((1,) * size, (1,) * size, graph=True)
    assert launched
    assert late(compiled, launched) == []
