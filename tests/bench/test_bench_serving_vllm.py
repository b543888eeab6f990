"""``swath bench serve`` on vLLM: how it is started, and how its calls of attention are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from cli_calls import failure

import swath
from swath.bench.serving import vllm
from swath.cli.bench_serve import job_of


def test_vllm_compiles_only_where_a_job_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is nothing to say; a compiled job leaves vLLM its own modes of compilation and of graphs."""
    plain, compiled = (job_of("mistral-7b/bf16/swath", 8, compiled) for compiled in (False, True))
    assert compiled.case == f"{plain.case} compiled"
    assert vllm._platform(compiled) == {"enforce_eager": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = [vllm._platform(job) for job in (plain, compiled)]
    assert [x["attention_backend"] for x in options] == ["CUSTOM", "CUSTOM"]
    plainly, fully = (x["compilation_config"] for x in options)
    assert plainly == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"} | fully
    assert fully == {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
    assert "is for vllm" in failure("bench", "serve", "--engine", "sglang", "--compiled")


@pytest.mark.parametrize("ours", [True, False])
def test_a_call_of_vllm_is_read_from_its_layer(ours: bool) -> None:
    """swath's metadata has its own names, and its backend makes its own cache; others keep rows of K and V."""
    kv = torch.zeros(4, 2, 16, 32, dtype=torch.uint8)
    own = swath.PagedKV.empty(torch.bfloat16, num_pages=1, num_kv_heads=2, page_size=16, head_dim=16)
    metadata = SimpleNamespace(
        block_table="table", seq_lens="lens", **{"cu_seqlens_q" if ours else "query_start_loc": 0}
    )
    impl = SimpleNamespace(scale=0.5, sinks=None, cache=lambda *_: own)
    one = torch.ones(())
    layer = SimpleNamespace(
        impl=impl, sliding_window=24, head_size=16, kv_cache_dtype="fp8", _k_scale=one, _v_scale=one, _q_scale=one
    )
    query = torch.zeros(3, 4, 16, dtype=torch.float8_e4m3fn)
    call = vllm._call(layer, query, kv, metadata, torch.zeros(3, 64))
    assert call.out.shape == query.shape
    assert call.q_scale is one
    assert (call.size, call.scale, call.block_table) == (24, 0.5, "table")
    assert (call.cache is own) == ours
    assert call.cache.k.dtype == (torch.bfloat16 if ours else torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["int8_per_token_head", "fp8_per_token_head"])
def test_rows_with_token_scales_are_read_as_vllm_writes_them(name: str) -> None:
    """Of a row: K, the scale of K, V, the scale of V. Tokens of a page lie before its heads."""
    content = 2 * (16 + 4)
    kv = torch.zeros(4, 8, 2, content, dtype=torch.int8 if "int8" in name else torch.uint8).transpose(1, 2)
    scales = torch.rand(4, 2, 8, 2)
    kv[..., 16:20], kv[..., 36:] = (scales[..., i, None].view(kv.dtype) for i in range(2))
    kv[..., :16], kv[..., 20:36] = 3, 5
    cache = vllm._rows(SimpleNamespace(head_size=16, kv_cache_dtype=name), kv)
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    assert torch.equal(torch.stack([cache.k_scale, cache.v_scale], -1), scales)
    assert cache.quant.dtype == (torch.int8 if "int8" in name else torch.float8_e4m3fn)
    assert all((x.view(torch.uint8) == value).all() for x, value in ((cache.k, 3), (cache.v, 5)))
    assert cache.k.untyped_storage().data_ptr() == kv.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["int4_per_token_head", "fp8"])
def test_rows_of_another_kind_are_not_misread(name: str) -> None:
    layer = SimpleNamespace(head_size=16, kv_cache_dtype=name)
    with pytest.raises(NotImplementedError, match="2 x 16"):
        vllm._rows(layer, torch.zeros(4, 2, 16, 24 if "int4" in name else 40, dtype=torch.uint8))
