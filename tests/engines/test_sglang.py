"""SGLang's attention backend on swath: passes of every mode against float64, and what is refused.

Where SGLang is installed (``make test-sglang``) its own classes take the place of the stub's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_stub
import torch
from sglang_batch import FULL, WINDOWED, Batch, Served

from conftest import each_backend
from swath import PageTable
from swath.ops.signature import ALIGNMENT


@pytest.fixture(scope="module")
def sglang() -> Iterator[SimpleNamespace]:
    """The names of SGLang that tests use, and the modules of the adapter."""
    with sglang_stub.installed():
        names = {
            name: getattr(import_module(path), name) for path, names in sglang_stub.MODULES.items() for name in names
        }
        backend = import_module("swath.engines.sglang.backend")
        yield SimpleNamespace(**names, backend=backend, versions=import_module("swath.engines.sglang.versions"))


@pytest.fixture(autouse=True)
def server(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The settings of a server that is not there."""
    server = SimpleNamespace(deterministic=False, algorithm=None, topk=None, drafts=None)
    monkeypatch.setattr(sglang.versions, "settings", lambda runner: server)
    return server


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BATCHES = {
    "decode": Batch(),
    "decode, page 1": Batch(page_size=1, dtype=torch.float16),
    "decode, page 64, one pool": Batch(page_size=64, two_pools=False, kv_lens=(70, 1, 190)),
    "extend": Batch("EXTEND", (33, 20, 70), (33, 60, 129), sink=True),
    "extend, page 64": Batch("EXTEND", (33, 20, 70), (33, 160, 129), page_size=64, window=72, padded=5),
    "extend, page 1": Batch("EXTEND", (7, 40), (70, 40), page_size=1, softcap=5.0, dtype=torch.float32),
    "mixed": Batch("MIXED", (1, 33, 1, 4), (70, 129, 33, 90), softcap=5.0, dtype=torch.float32),
    "mixed, one pool": Batch("MIXED", (1, 33, 1, 4), (70, 129, 33, 90), two_pools=False, sink=True),
    "verify": Batch("TARGET_VERIFY", (4, 4, 4), dtype=torch.float16, sink=True),
    "verify, page 1": Batch("TARGET_VERIFY", (3, 3), (70, 9), page_size=1, dtype=torch.float32),
    "draft extend": Batch("DRAFT_EXTEND_V2", (4, 4, 4), dtype=torch.float32),
    "short": Batch("EXTEND", (5, 1), (5, 1), window=64),
    "fp8": Batch("EXTEND", (1, 33, 4), kv_dtype=E4M3),
    "fp8, scaled": Batch("DECODE", kv_dtype=E4M3, scales=True, sink=True),
    "fp8 e5m2": Batch("TARGET_VERIFY", (4, 4, 4), kv_dtype=E5M2, scales=True, two_pools=False),
    "narrow values": Batch("MIXED", (1, 33, 1), (70, 60, 33), head_dim=64, v_head_dim=32, sink=True),
    "deterministic": Batch("DECODE", kv_lens=(300, 310, 33), deterministic=True),
}


@each_backend("attention", but=("reference", "hopper"))
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str, sglang: SimpleNamespace, server: SimpleNamespace, impl: str, device: str) -> None:
    server.deterministic = BATCHES[name].deterministic
    served = Served(BATCHES[name], sglang, impl, device)
    served.write_old()
    forward_batch = served.forward_batch()
    served.backend.init_forward_metadata(forward_batch)
    served.attend(forward_batch)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BATCHES)
def test_batches_on_the_backend_that_a_gpu_takes(name: str, sglang: SimpleNamespace, server: SimpleNamespace) -> None:
    """Hopper's for prompts, where there is one."""
    test_batches(name, sglang, server, "auto", "cuda")


GRAPHS = {
    name: BATCHES[name] for name in ("decode", "decode, page 1", "verify", "draft extend", "fp8, scaled", "extend")
}


@each_backend("attention", but=("reference", "hopper"))
@pytest.mark.parametrize("name", GRAPHS)
def test_a_captured_pass_holds_for_other_batches(name: str, sglang: SimpleNamespace, impl: str, device: str) -> None:
    """Two requests more than the batch, lengths of 1 at capture, and another batch replayed before."""
    batch, spare = GRAPHS[name], 2
    served = Served(batch, sglang, impl, device)
    served.write_old()
    backend, real = served.backend, served.forward_batch()
    backend.init_cuda_graph_state(8, 64)
    bs, width = len(batch.kv_lens) + spare, 1 if batch.mode == "EXTEND" else batch.q_lens[0]
    tokens = sum(batch.q_lens) + spare if batch.mode == "EXTEND" else bs * width
    fill = backend.get_cuda_graph_seq_len_fill_value()

    def padded(x: torch.Tensor | None, value: int) -> torch.Tensor | None:
        return None if x is None else torch.nn.functional.pad(x, (0, spare), value=value)

    # The runner's own tensors, of which views are captured.
    of_runner = served.forward_batch(
        batch_size=bs, req_pool_indices=torch.zeros(bs, dtype=torch.int64, device=device),
        seq_lens=torch.full((bs,), fill, device=device), seq_lens_cpu=torch.full((bs,), fill),
        out_cache_loc=torch.zeros(tokens, dtype=torch.int64, device=device),
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        extend_seq_lens=None if real.extend_seq_lens is None else torch.full((bs,), width, device=device),
    )  # fmt: skip
    backend.init_forward_metadata_out_graph(of_runner, in_capture=True)
    captured = backend.forward_metadata
    stale = served.forward_batch(
        batch_size=bs, req_pool_indices=torch.randint(0, 9, (bs,), device=device),
        seq_lens=torch.randint(1, 200, (bs,), device=device), out_cache_loc=torch.arange(tokens, device=device),
        input_ids=of_runner.input_ids, extend_seq_lens=of_runner.extend_seq_lens,
    )  # fmt: skip
    backend.init_forward_metadata_out_graph(stale)
    slots = real.out_cache_loc  # of the batch alone in decode and verification
    if batch.mode == "DRAFT_EXTEND_V2":
        slots = padded(slots, 0)
        slots = torch.nn.functional.pad(slots, (0, tokens - slots.shape[0]))
    replay = SimpleNamespace(
        forward_mode=real.forward_mode, batch_size=bs, input_ids=of_runner.input_ids,
        req_pool_indices=padded(real.req_pool_indices, 0), seq_lens=padded(real.seq_lens, fill), seq_lens_cpu=None,
        out_cache_loc=slots, spec_info=real.spec_info, extend_seq_lens=padded(real.extend_seq_lens, 0),
    )  # fmt: skip
    backend.init_forward_metadata_out_graph(replay)
    assert backend.forward_metadata is captured
    served.attend(replay, spare=tokens - sum(batch.q_lens))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "decode, page 1", "verify", "fp8, scaled"])
def test_a_cuda_graph_replays_other_batches(name: str, sglang: SimpleNamespace) -> None:
    """What the host prepares before a replay is all that changes."""
    batch = GRAPHS[name]
    served = Served(batch, sglang, "auto", "cuda")
    served.write_old()
    backend, real = served.backend, served.forward_batch()
    rows = sum(batch.q_lens)
    q = torch.randn(rows, batch.num_heads * batch.head_dim, device="cuda").to(batch.dtype)
    k, v = torch.randn(2, rows, batch.num_kv_heads, batch.head_dim, device="cuda").to(batch.dtype)
    sink = torch.randn(batch.num_heads, device="cuda").to(batch.dtype) if batch.sink else None
    first = served.forward_batch(
        seq_lens=torch.ones_like(real.seq_lens), req_pool_indices=torch.zeros_like(served.rows)
    )
    backend.init_forward_metadata_out_graph(first, in_capture=True)

    def run() -> list[torch.Tensor]:
        return [backend.forward(q, k, v, layer, real, sinks=sink) for layer in served.layers]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    backend.init_forward_metadata_out_graph(served.forward_batch(seq_lens_cpu=None))
    graph.replay()
    for layer, out in zip(served.layers, outs, strict=True):
        served.check(layer, q, k, v, out, sink)


def test_the_table_of_requests_is_read_in_place(sglang: SimpleNamespace) -> None:
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    served.backend.init_forward_metadata(served.forward_batch())
    full, window, _ = served.backend.forward_metadata
    assert isinstance(full.block_table, PageTable)
    assert full.block_table.entries is served.requests
    assert window.block_table.shape == (3, 3)  # 24 keys touch three pages of 16, whatever the context
    assert window.max_kv_len == 24 - 1 + 1 + 16 - 1


def test_a_windows_table_has_no_page_before_its_first_key(sglang: SimpleNamespace) -> None:
    """In deterministic mode it begins at a cut, so that cuts lie where they would in the table of all keys."""
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    served.backend.init_forward_metadata(served.forward_batch())
    _, window, _ = served.backend.forward_metadata
    for b, kv_len in enumerate(served.batch.kv_lens):
        first = max(kv_len - served.batch.window, 0) // 16
        assert window.seq_lens[b] == kv_len - 16 * first
        assert torch.equal(
            window.block_table[b, : len(served.tables[WINDOWED][b]) - first].long(), served.tables[WINDOWED][b][first:]
        )


def test_results_of_a_deterministic_server_do_not_depend_on_the_batch(
    sglang: SimpleNamespace, server: SimpleNamespace
) -> None:  # fmt: skip
    server.deterministic = True
    served = Served(BATCHES["deterministic"], sglang, "auto", "cpu")
    served.write_old()
    assert served.backend.split_size == 256
    q = torch.randn(3, 256).bfloat16()
    k, v = torch.randn(2, 3, 2, 64).bfloat16()
    results = []
    for some in (slice(0, 3), slice(1, 2)):
        real = served.forward_batch()
        part = served.forward_batch(
            batch_size=some.stop - some.start,
            **{
                name: getattr(real, name)[some]
                for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "input_ids")
            },
        )
        served.backend.init_forward_metadata(part)
        for layer in served.layers:
            results.append(served.backend.forward(q[some], k[some], v[some], layer, part))
    for whole, alone in zip(results[:2], results[2:], strict=True):
        assert torch.equal(whole[1:2], alone)


WRONG_LAYERS = {
    "is_cross_attention": dict(is_cross_attention=True),
    "attn_type": "ENCODER_ONLY",
    "logit_capping_method": dict(logit_capping_method="atan"),
    "pos_encoding_mode": dict(pos_encoding_mode="ALIBI"),
    "use_irope": dict(use_irope=True),
    "head_dim": dict(v_head_dim=128),
    "sliding_window_size": dict(sliding_window_size=24),
}


@pytest.mark.parametrize("attribute", WRONG_LAYERS)
def test_layers_are_refused_while_the_server_starts(attribute: str, sglang: SimpleNamespace) -> None:
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    given = WRONG_LAYERS[attribute]
    given = dict(attn_type=sglang.AttentionType[given]) if isinstance(given, str) else given
    runner = runner_of(
        served, [sglang.RadixAttention(4, 64, 0.125, 2, WINDOWED, **dict(sliding_window_size=23) | given)]
    )
    with pytest.raises(ValueError, match=attribute):
        sglang.backend.SwathBackend(runner)


def test_gemma_3_is_causal_though_its_layers_say_otherwise(sglang: SimpleNamespace) -> None:
    """0.5.15 calls them bidirectional, and only its own Triton backend could ever read that."""
    both_ways = dict(attn_type=sglang.AttentionType.DECODER_BIDIRECTIONAL, sliding_window_size=23)
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    runner = runner_of(served, [sglang.RadixAttention(4, 64, 0.125, 2, WINDOWED, **both_ways)])
    runner.model_config = sglang_stub.model_config(torch.bfloat16, model_type="gemma3_text")
    sglang.backend.SwathBackend(runner)
    for config in (dict(model_type="llama"), dict(model_type="gemma3_text", use_bidirectional_attention=True)):
        runner.model_config = sglang_stub.model_config(torch.bfloat16, **config)
        with pytest.raises(ValueError, match="attn_type"):
            sglang.backend.SwathBackend(runner)


def runner_of(served: Served, layers: list[torch.nn.Module]) -> SimpleNamespace:
    """A runner with the pools of ``served``, and other layers."""
    return SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=served.requests), token_to_kv_pool=served.pool,
        sliding_window_size=23, model=torch.nn.ModuleList(layers), use_mla_backend=False,
        model_config=sglang_stub.model_config(torch.bfloat16),
    )  # fmt: skip


def test_models_and_pools_of_other_kinds_are_refused(sglang: SimpleNamespace, server: SimpleNamespace) -> None:
    served = Served(BATCHES["decode, page 64, one pool"], sglang, "auto", "cpu")
    of_others = type("OtherPool", (sglang.MHATokenToKVPool,), {})
    page_major = small_pool(sglang.MHATokenToKVPool)
    page_major.kv_cache_layout = "page_major"
    for name, change in {
        "encoder": dict(model_config=sglang_stub.model_config(torch.bfloat16, is_encoder_decoder=True)),
        "MLA": dict(use_mla_backend=True),
        "page_major": dict(token_to_kv_pool=page_major),
        "OtherPool": dict(token_to_kv_pool=small_pool(of_others)),
    }.items():
        runner = SimpleNamespace(**vars(runner_of(served, [])) | change)
        with pytest.raises(ValueError, match=name):
            sglang.backend.SwathBackend(runner)
    for name, asked in (("speculative_eagle_topk", ("EAGLE", 4)), ("speculative_algorithm", ("NGRAM", 1))):
        server.algorithm, server.topk = asked
        with pytest.raises(ValueError, match=name):
            sglang.backend.SwathBackend(runner_of(served, []))


def small_pool(kind: Any) -> Any:
    """A pool of two pages."""
    return kind(
        size=32, page_size=16, dtype=torch.float32, head_num=2, head_dim=64, layer_num=2, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip


WRONG_PASSES = {
    "speculative_eagle_topk": ("TARGET_VERIFY", dict(spec_info=SimpleNamespace(draft_token_num=1, topk=4))),
    "topk": ("TARGET_VERIFY", dict(spec_info=SimpleNamespace(draft_token_num=1, tree_topk=-1))),  # n-gram trees
    "ragged_verify_layout": (
        "TARGET_VERIFY",
        dict(spec_info=SimpleNamespace(draft_token_num=1, topk=1, ragged_verify_layout=object())),
    ),
    "forward_mode": ("DLLM_EXTEND", {}),
}


@pytest.mark.parametrize("name", WRONG_PASSES)
def test_passes_that_are_not_causal_chains_are_refused(name: str, sglang: SimpleNamespace) -> None:
    mode, change = WRONG_PASSES[name]
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    forward_batch = served.forward_batch(forward_mode=sglang.ForwardMode[mode], **change)
    with pytest.raises(ValueError, match=name):
        served.backend.init_forward_metadata(forward_batch)


@pytest.mark.parametrize("layer_id", [WINDOWED, FULL])
@pytest.mark.parametrize("name", ["decode", "verify", "mixed", "decode, page 64, one pool"])
def test_what_is_compiled_at_the_start_looks_like_a_pass(
    name: str, layer_id: int, sglang: SimpleNamespace, server: SimpleNamespace
) -> None:  # fmt: skip
    server.drafts = 4
    batch = BATCHES[name]
    served = Served(batch, sglang, "auto", "cpu")
    served.backend.init_forward_metadata(served.forward_batch())
    steps, windowed = served.backend.forward_metadata, batch.two_pools and layer_id == WINDOWED
    real = steps.window if windowed else steps.full
    like = served.backend._steps_like(
        windowed, len(batch.kv_lens), sum(batch.q_lens), max(batch.q_lens), max(batch.kv_lens)
    )  # fmt: skip
    assert looks(real) in map(looks, like)


def test_what_a_server_may_be_sent_is_compiled_at_the_start(
    sglang: SimpleNamespace, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """On a GPU, and not while a graph is captured."""
    server.drafts = 4
    served = Served(BATCHES["verify"], sglang, "auto", "cpu")
    kept = served.backend._kept_of(served.layers[WINDOWED], None)
    warmed: list[Any] = []
    monkeypatch.setattr(sglang.backend, "warm", lambda *given: warmed.append(given) or 1)
    served.warm(served.layers[WINDOWED], kept)
    assert not warmed
    capturing = [True, False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.pop(0))
    on_gpu = kept._replace(cache=SimpleNamespace(k=SimpleNamespace(is_cuda=True)))
    for _ in range(2):
        served.warm(served.layers[WINDOWED], on_gpu)
    [(layers, dtype, traffic, steps_of)] = warmed
    assert layers == [(kept.layer, on_gpu.cache, 4)]
    assert dtype == torch.float16
    assert (traffic.max_seqs, traffic.max_kv_len, traffic.steps) == (8, 320, (1, 4))
    for sizes in list(traffic.shapes())[::50]:
        assert {step.num_tokens for step in steps_of(*sizes)} == {sizes[1]}


def looks(step: Any) -> Any:
    """What kernels are compiled for, of a step."""
    table = step.block_table
    entries, rows = (table.entries, table.rows) if isinstance(table, PageTable) else (table, None)
    tensors = (entries, rows, step.seq_lens, step.slots, step.cu_seqlens_q)
    return (
        [None if x is None else (x.dtype, x.shape, x.data_ptr() % ALIGNMENT) for x in tensors],
        step.num_tokens,
        step.max_q_len,
        step.max_kv_len,
    )


def test_unknown_options_of_a_layers_call_are_refused(sglang: SimpleNamespace) -> None:
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    forward_batch = served.forward_batch()
    served.backend.init_forward_metadata(forward_batch)
    q, k = torch.zeros(3, 256).bfloat16(), torch.zeros(3, 2, 64).bfloat16()
    served.backend.forward(q, k, k, served.layers[FULL], forward_batch, score_mod=None)
    with pytest.raises(ValueError, match="score_mod"):
        served.backend.forward(q, k, k, served.layers[FULL], forward_batch, score_mod=len)


def test_keys_are_not_written_where_sglang_wrote_them(sglang: SimpleNamespace) -> None:
    served = Served(BATCHES["decode"], sglang, "auto", "cpu")
    forward_batch = served.forward_batch()
    served.backend.init_forward_metadata(forward_batch)
    before = served.pool.get_key_buffer(FULL).clone()
    q, k = torch.zeros(3, 256).bfloat16(), torch.zeros(3, 2, 64).bfloat16()
    served.backend.forward(q, k, k, served.layers[FULL], forward_batch, save_kv_cache=False)
    served.backend.forward(q, None, None, served.layers[FULL], forward_batch, save_kv_cache=False)
    assert torch.equal(before, served.pool.get_key_buffer(FULL)) or before.isnan().any()
    torch.testing.assert_close(before, served.pool.get_key_buffer(FULL), equal_nan=True, rtol=0, atol=0)


def test_a_pool_that_is_laid_anew_is_seen(sglang: SimpleNamespace) -> None:
    """At the same address with more slots, or with other scales."""
    served = Served(replace(BATCHES["fp8, scaled"], two_pools=False), sglang, "auto", "cpu")
    layer, backend = served.layers[FULL], served.backend
    kept = backend._kept_of(layer, None)
    assert backend._kept_of(layer, None) is kept
    whole = served.pool.k_buffer[FULL]
    served.pool.k_buffer[FULL] = whole[:32]
    served.pool.v_buffer[FULL] = served.pool.v_buffer[FULL][:32]
    assert backend._kept_of(layer, None).cache.num_pages == 2
    layer.k_scale = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
    assert backend._kept_of(layer, None).cache.k_scale == 2
