"""vLLM's attention backend on swath: what it says it can do, and batches of every kind against float64.

Where vLLM is installed (``make test-vllm``) its own classes take the place of the stub's.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import vllm_stub
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_batch import Batch, cache_tensor, config_of, metadata_of, run, spec_of

import swath.engines.vllm
from conftest import each_backend, python_environment
from swath.engines import warmup
from swath.engines.warmup import Traffic


@pytest.fixture(scope="module")
def vllm() -> Iterator[SimpleNamespace]:
    """The names of vLLM that tests use, and the modules of the adapter."""
    with vllm_stub.installed():
        names = {
            name: getattr(import_module(path), name)
            for path, names in vllm_stub.MODULES.items()
            for name in names
            if hasattr(import_module(path), name)
        }
        backend = import_module("swath.engines.vllm.backend")
        yield SimpleNamespace(**names, backend=backend, versions=import_module("swath.engines.vllm.versions"))


BATCHES = {
    "decode": Batch(window=24),
    "verify": Batch(q_lens=(4, 4, 4), window=24, dtype=torch.float16),
    "chunked": Batch(q_lens=(32,), kv_lens=(150,), window=40, sink=True),
    "mixed": Batch(q_lens=(1, 33, 20, 4), kv_lens=(70, 33, 129, 90), window=24, padded=True),
    "full": Batch(q_lens=(1, 33, 20), softcap=5.0, padded=True),
    "not causal": Batch(q_lens=(1, 33, 20), window=24, causal=False),
    "leading": Batch(q_lens=(1, 5, 20), rswa=24, leading=(20, 33, 7), window=64, padded=True),
    "images": Batch(
        q_lens=(1, 60, 33), window=24, spans=((), ((3, 30), (40, 59)), ((96, 120),)), kv_lens=(70, 60, 129)
    ),
    "clamped images": Batch(q_lens=(5, 60), window=24, spans=((), ((3, 40),)), kv_lens=(70, 60), clamped=True),
    "images, no window": Batch(q_lens=(5, 60), spans=((), ((3, 40),)), kv_lens=(70, 60), padded=True),
    "images, leading": Batch(
        q_lens=(5, 60), rswa=24, leading=(20, 7), spans=((), ((3, 40),)), kv_lens=(70, 60), padded=True
    ),
    "narrow values": Batch(q_lens=(1, 33, 4), v_dim=32, kv_cache_dtype="int8_per_token_head"),
    "float32": Batch(q_lens=(1, 33, 20), window=24, sink=True, dtype=torch.float32, layout="LBHNC"),
}
CACHES = {
    "int8_per_token_head": Batch(q_lens=(1, 33, 4), window=24, layout="BLNHC"),
    "fp8_per_token_head": Batch(q_lens=(1, 33, 4), sink=True, layout="LBHNC"),
    "fp8": Batch(q_lens=(1, 33, 4), window=24, layout="BLHNC"),
    "fp8_e5m2": Batch(q_lens=(1, 33, 4), softcap=5.0),
    "int8": Batch(q_lens=(1, 33, 4), window=24),
    "fp8_e4m3": Batch(q_lens=(1, 33, 4), v_dim=40),
}
BATCHES |= {name: replace(batch, kv_cache_dtype=name) for name, batch in CACHES.items()}


@each_backend("attention", but=("reference", "hopper"))
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str, vllm: SimpleNamespace, impl: str, device: str) -> None:
    run(BATCHES[name], vllm, impl, device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BATCHES)
def test_batches_on_the_backend_that_a_gpu_takes(name: str, vllm: SimpleNamespace) -> None:
    """Hopper's for prompts, where there is one."""
    run(BATCHES[name], vllm, "auto", "cuda")


@each_backend("attention", but=("reference", "hopper"))
@pytest.mark.parametrize("name", ["decode", "verify", "leading", "int8_per_token_head"])
def test_a_captured_graph_holds_for_other_lengths(name: str, vllm: SimpleNamespace, impl: str, device: str) -> None:
    """Bounds of the longest context, lengths of 1 at capture, two requests of padding."""
    run(replace(BATCHES[name], padded=True), vllm, impl, device, graph=True)


def test_register_is_lazy_and_may_be_called_again(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    custom, cpu = vllm.AttentionBackendEnum.CUSTOM, vllm.AttentionBackendEnum.CPU_ATTN
    before = cpu.get_path()
    monkeypatch.delenv(swath.engines.vllm.ON_CPU, raising=False)
    for _ in range(2):
        swath.engines.vllm.register()
    assert custom.get_path() == swath.engines.vllm.BACKEND
    assert cpu.get_path() == before
    module, _, name = custom.get_path().rpartition(".")
    assert getattr(import_module(module), name) is vllm.backend.SwathBackend
    monkeypatch.setenv(swath.engines.vllm.ON_CPU, "1")
    swath.engines.vllm.register()
    assert cpu.get_path() == swath.engines.vllm.BACKEND


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What swath says in vLLM's log, which hands nothing on to the root logger."""
    logger = swath.engines.vllm.logger
    logger.addHandler(caplog.handler)
    with caplog.at_level("INFO", logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def test_on_a_cpu_the_log_says_that_swath_is_not_asked(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """There vLLM goes on with its own backend, whatever --attention-backend names."""
    for on_cpu, asked, said in ((True, "0", True), (True, "1", False), (False, "0", False)):
        log.clear()
        monkeypatch.setattr(type(vllm.current_platform), "is_cpu", lambda self, answer=on_cpu: answer)
        monkeypatch.setenv(swath.engines.vllm.ON_CPU, asked)
        swath.engines.vllm.register()
        assert ("serves no layer" in log.text) == said


def test_a_builder_says_which_layers_swath_serves(vllm: SimpleNamespace, log: pytest.LogCaptureFixture) -> None:
    kinds = [dict(sliding_window=40), {}, dict(sliding_window=40)]
    layers = {
        f"layer{i}": SimpleNamespace(impl=vllm.backend.SwathImpl(4, 64, 0.125, 2, **own)) for i, own in enumerate(kinds)
    }
    for rswa_window, windows in ((None, "40, None"), (24, "24")):
        log.clear()
        vllm.backend.SwathBuilder(None, list(layers), config_of(rswa_window, **layers), torch.device("cpu"))
        assert f"serves 3 layers from layer0 on: window {windows}; KV cache auto; on cpu" in log.text


def test_importing_the_plugin_imports_neither_vllm_nor_torch() -> None:
    """vLLM loads the entry points of every package in every process, also where swath is not asked for."""
    code = "import sys, swath.engines.vllm; assert not {'vllm', 'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=python_environment())


def test_ranks_that_share_a_context_have_steps_over_their_own_keys(vllm: SimpleNamespace) -> None:
    """Decode context parallel; what such a step makes is held to one pass in ``test_shards.py``."""
    assert vllm.backend.SwathImpl.supports_dcp
    impl = vllm.backend.SwathImpl(4, 64, 0.125, 2)
    impl.dcp_rank, impl.dcp_world_size = 1, 2
    config = config_of(one=SimpleNamespace(impl=impl, _k_scale_float=0.5, _v_scale_float=0.5))
    config.model_config.get_total_num_kv_heads = lambda: 2
    config.parallel_config = SimpleNamespace(
        decode_context_parallel_size=2, cp_kv_cache_interleave_size=4, tensor_parallel_size=4
    )
    builder = vllm.backend.SwathBuilder(spec_of(vllm, "auto"), ["one"], config, torch.device("cpu"))
    metadata = metadata_of(BATCHES["decode"], vllm, None, "cpu", graph=False)
    step = builder.build(0, metadata)
    assert step.shard == (1, 2, 4)
    assert step.held.tolist() == step.shard.held(metadata.seq_lens).tolist()
    assert builder.get_cudagraph_support(config, None) == vllm.AttentionCGSupport.NEVER
    config.parallel_config.tensor_parallel_size = 6  # the kv head of three ranks, of which two share a context
    with pytest.raises(ValueError, match="a divisor of 3"):
        builder.shard_here()
    config.parallel_config.tensor_parallel_size = 4
    config.model_config.get_total_num_kv_heads = lambda: 8  # two for each rank
    with pytest.raises(ValueError, match="a divisor of 1"):
        builder.shard_here()
    config.model_config.get_total_num_kv_heads = lambda: 2
    builder.layers[0].attention_chunk_size = 64
    with pytest.raises(ValueError, match="chunks"):
        builder.shard_here()


def test_an_older_vllm_is_refused(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM shows the reason where it chooses a backend."""
    monkeypatch.delattr(import_module("vllm.v1.kv_cache_interface"), "KVCacheLayout")
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or newer"):
        runpy.run_path(str(vllm.backend.__file__))


def test_what_the_backend_says_it_can_do(vllm: SimpleNamespace) -> None:
    backend = vllm.backend.SwathBackend
    assert backend.get_name() == vllm.AttentionBackendEnum.CUSTOM.name
    assert [n for n in (32, 60, 64, 96, 256, 512, 520) if backend.supports_head_size(n)] == [32, 64, 96, 256, 512]
    assert [backend.get_preferred_block_size(n) for n in (16, 128)] == [64, 128]
    kinds = [kind for kind in vllm.AttentionType if backend.supports_attn_type(kind)]
    assert kinds == [vllm.AttentionType.DECODER]
    assert backend.supports_kv_cache_dtype("int8_per_token_head")
    assert not backend.supports_kv_cache_dtype("int4_per_token_head")
    assert backend.supports_dtype(torch.bfloat16)
    assert backend.supports_mm_prefix()
    assert not backend.supports_alibi_sqrt()
    assert not backend.is_mla()
    others = (16, False, False, False, False, None)
    assert backend.supports_combination(64, torch.bfloat16, "bfloat16", *others) is None
    assert "float16" in backend.supports_combination(64, torch.bfloat16, "float16", *others)


WRONG = {
    "alibi_slopes": dict(alibi_slopes=[1.0]),
    "attn_type": dict(attn_type="encoder_only"),
    "head_size": dict(head_size=60),
    "kv_cache_dtype": dict(kv_cache_dtype="int4_per_token_head"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_layer_refuses_what_it_cannot_do(argument: str, vllm: SimpleNamespace) -> None:
    """Where vLLM's platform asks no questions, as on a CPU, the engine fails as it starts and says why."""
    given = dict(num_heads=4, head_size=64, scale=0.125, num_kv_heads=2)
    with pytest.raises(ValueError, match=argument):
        vllm.backend.SwathImpl(**given | WRONG[argument])


def test_values_wider_than_keys_are_refused(vllm: SimpleNamespace) -> None:
    spec = vllm.FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=128, head_size_v=192, dtype=torch.bfloat16
    )  # fmt: skip
    with pytest.raises(ValueError, match="head_size_v"):
        vllm.backend.SwathBackend.customize_spec(spec)


def test_a_causal_flag_for_each_request_is_refused(vllm: SimpleNamespace) -> None:
    metadata = metadata_of(BATCHES["decode"], vllm, None, "cpu", graph=False)
    metadata.causal = torch.tensor([True, False, True])
    with pytest.raises(ValueError, match="causal"):
        vllm.backend.SwathBuilder(None, [], config_of(), torch.device("cpu")).build(0, metadata)


def test_pages_of_token_scales_hold_two_floats_more(vllm: SimpleNamespace) -> None:
    spec = vllm.FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.int8)
    customize = vllm.backend.SwathBackend.customize_spec
    assert customize(spec) is spec
    quantised = replace(spec, kv_quant_mode=vllm.KVQuantMode.INT8_PER_TOKEN_HEAD)
    assert customize(quantised).state_content_bytes == 2 * 64 + 8


def test_layers_share_a_step_and_groups_its_lengths(vllm: SimpleNamespace) -> None:
    """Another group of pages takes the same step with a table of its own."""
    builder = vllm.backend.SwathBuilder(None, [], config_of(), torch.device("cpu"))
    assert builder.supports_update_block_table
    step = builder.build(0, metadata_of(BATCHES["decode"], vllm, None, "cpu", graph=False))
    table, slots = torch.zeros(3, 4).int(), torch.zeros(3).long()
    other = builder.update_block_table(step, table, slots)
    assert other.block_table is table
    assert other.slots is slots
    assert other.seq_lens is step.seq_lens


@pytest.mark.parametrize("name", ["decode", "verify", "mixed"])
def test_a_step_is_made_without_work_for_the_device(name: str, vllm: SimpleNamespace) -> None:
    """Between two steps' graphs the GPU waits for whatever a builder launches, and the host for what it calls."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, function: object, *others: object, **named: object) -> None:
            raise AssertionError(f"a builder called {function}")

    builder = vllm.backend.SwathBuilder(None, [], config_of(), torch.device("cpu"))
    metadata = metadata_of(BATCHES[name], vllm, None, "cpu", graph=False)
    with Nothing():
        builder.build(0, metadata)


def test_metadata_may_be_copied_field_by_field(vllm: SimpleNamespace) -> None:
    """As vLLM does for layers that share a cache and skip part of a prefill: into a class with a constructor of its
    own."""
    builder = vllm.backend.SwathBuilder(None, [], config_of(), torch.device("cpu"))
    step = builder.build(0, metadata_of(BATCHES["decode"], vllm, None, "cpu", graph=False))

    class Wrapped(type(step)):  # type: ignore[misc]
        def __init__(self, metadata: object) -> None:
            for field in fields(metadata.__class__):  # type: ignore[arg-type]
                setattr(self, field.name, getattr(metadata, field.name))

    table, slots = torch.zeros(3, 4).int(), torch.zeros(3).long()
    other = builder.update_block_table(Wrapped(step), table, slots)
    assert type(other) is Wrapped
    assert other.block_table is table
    assert other.slots is slots
    assert other.seq_lens is step.seq_lens


def test_a_cache_is_viewed_once(vllm: SimpleNamespace) -> None:
    """Until vLLM hands over another tensor, or other scales."""
    spec = vllm.FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.uint8)
    attention = vllm.backend.SwathImpl(4, 64, 0.125, 2, kv_cache_dtype="fp8")
    layer = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.5))
    kv = cache_tensor(spec, 3, "LBNHC", "cpu")
    view = attention.cache(layer, kv)
    assert attention.cache(layer, kv) is view
    layer._k_scale = torch.tensor([2.0, 4.0])  # one for each head
    assert attention.cache(layer, kv).quant.k == "head"


def test_a_profiling_run_has_no_metadata(vllm: SimpleNamespace) -> None:
    attention = vllm.backend.SwathImpl(4, 64, 0.125, 2)
    out = torch.full((3, 4, 64), torch.nan)
    assert (attention.forward(None, out, None, None, torch.empty(0), None, out) == 0).all()


def test_batch_invariance_cuts_keys_at_fixed_places(vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm.backend.SwathImpl(4, 64, 0.125, 2).layer.split_size is None
    monkeypatch.setattr(import_module("vllm.envs"), "VLLM_BATCH_INVARIANT", True)
    assert vllm.backend.SwathImpl(4, 64, 0.125, 2).layer.split_size == 256


def test_static_int8_is_registered_where_vllm_takes_it(vllm: SimpleNamespace) -> None:
    """Once; its mode has a number of its own, which CUSTOM has not in 0.33."""
    if not hasattr(vllm, "register_kv_cache_dtype"):
        pytest.skip("this vLLM has no register_kv_cache_dtype")
    for _ in range(2):
        vllm.versions.register_int8()
    assert vllm.KV_CACHE_DTYPES.count("int8") == 1


def test_static_int8_needs_calibrated_scales(vllm: SimpleNamespace) -> None:
    impl = vllm.backend.SwathImpl(4, 64, 0.125, 2, kv_cache_dtype="int8")
    layer = SimpleNamespace(impl=impl, _k_scale_float=1.0, _v_scale_float=0.02)
    with pytest.raises(ValueError, match="k_scale and v_scale"):
        vllm.backend.SwathBuilder(None, ["one"], config_of(one=layer), torch.device("cpu"))
    layer._k_scale_float = 0.03
    vllm.backend.SwathBuilder(None, ["one"], config_of(one=layer), torch.device("cpu"))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8_per_token_head", "fp8"])
def test_a_builder_warms_the_layers_that_differ(
    kv_cache_dtype: str, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shape of the traffic once for each kind of layer; nothing is compiled on a CPU."""
    monkeypatch.setattr(warmup, "_warmed", set())
    spec = vllm.backend.SwathBackend.customize_spec(spec_of(vllm, kv_cache_dtype))
    layers = {}
    for i, window in enumerate((40, None, 40)):
        impl = vllm.backend.SwathImpl(4, 64, 0.125, 2, sliding_window=window, kv_cache_dtype=kv_cache_dtype)
        scales = dict(_k_scale=torch.ones(()), _v_scale=torch.ones(()), _k_scale_float=1.0, _v_scale_float=1.0)
        layers[f"layer{i}"] = SimpleNamespace(impl=impl, **scales)
    builder = vllm.backend.SwathBuilder(spec, list(layers), config_of(24, **layers), torch.device("cpu"))
    shapes = list(Traffic(8, 128, 512, (1, 4)).shapes())
    assert builder.warm() == 2 * len(shapes)
    step = builder.step_of(*shapes[0])
    assert step.size == 24
    assert isinstance(step.global_tokens, torch.Tensor)


def test_graphs_of_models_with_images_are_for_decode(vllm: SimpleNamespace) -> None:
    support = vllm.backend.SwathBackend.get_builder_cls().get_cudagraph_support
    assert support(config_of(), None) is vllm.AttentionCGSupport.ALWAYS
    assert support(config_of(is_mm_prefix_lm=True), None) is vllm.AttentionCGSupport.UNIFORM_BATCH


def test_single_tokens_need_no_spans(vllm: SimpleNamespace) -> None:
    batch = replace(BATCHES["images"], q_lens=(1, 1, 1))
    builder = vllm.backend.SwathBuilder(None, [], config_of(is_mm_prefix_lm=True), torch.device("cpu"))
    assert builder.build(0, metadata_of(batch, vllm, None, "cpu", graph=False)).spans is None
    batch = replace(BATCHES["images"], spans=((), (), ()))
    assert builder.build(0, metadata_of(batch, vllm, None, "cpu", graph=False)).spans is None
