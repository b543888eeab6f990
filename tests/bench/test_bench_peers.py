"""The adapters of other libraries, against stand-ins that do what those libraries document."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import Enum
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swath import KVQuant, PagedKV, Window, attention, bounds, paged_attention
from swath.bench.case import BenchCase, Groups
from swath.bench.gate import Gate
from swath.bench.inputs import make_inputs
from swath.bench.masks import Chunks, Images
from swath.bench.providers import PROVIDERS
from swath.cache import PagedKeys
from swath.pages import PageTable

CPU = torch.device("cpu")
DECODE = BenchCase(name="d", op="decode", draw=Groups(((1, 1, 70), (1, 1, 33))), dtype=torch.float32, size=20)
STEPS = replace(DECODE, op="steps", draw=Groups(((1, 3, 70), (1, 3, 33))))
PREFILL = replace(DECODE, op="prefill", draw=Groups(((1, 30, 70), (1, 33, 33))))
MIXED = replace(DECODE, op="mixed", draw=Groups(((1, 30, 70), (2, 1, 33))))
DENSE = replace(PREFILL, dense=True)
FORMS = {"decode": DECODE, "steps": STEPS, "prefill": PREFILL, "mixed": MIXED, "dense": DENSE}
FORMS |= {f"{name}, full": replace(case, size=None) for name, case in FORMS.items()}
FORMS |= {"decode, sinks": replace(DECODE, sink="q"), "prefill, sinks": replace(PREFILL, sink="q")}
FORMS |= {f"{name}, narrow": replace(FORMS[name], head_dim=192, v_head_dim=128) for name in ("decode", "dense")}
FORMS["prefill, 512"] = replace(PREFILL, head_dim=512)
E4M3 = torch.float8_e4m3fn
FP8: dict[str, Any] = dict(dtype=E4M3, quant=KVQuant(E4M3, "head"), q_scale="tensor")
FORMS |= {f"{name}, fp8 q": replace(FORMS[name], **FP8) for name in ("decode", "steps", "prefill", "prefill, sinks")}
FORMS["all new, fp8 q made"] = replace(PREFILL, draw=Groups(((1, 30, 30), (1, 33, 33))), q_made=True, **FP8)
FORMS["fp8 q, a scale a row"] = replace(FORMS["prefill, fp8 q"], q_scale="token")
FORMS["e4m3"] = replace(DECODE, quant=KVQuant(torch.float8_e4m3fn, "tensor"))
FORMS["int8 token"] = replace(PREFILL, quant=KVQuant(torch.int8, "token"))
FORMS["chunks"] = replace(PREFILL, size=None, ranges=Chunks(8))
FORMS["chunks, dense"] = replace(DENSE, size=None, ranges=Chunks(8), draw=Groups(((1, 30, 30), (1, 33, 33))))
FORMS["images"] = replace(PREFILL, size=None, ranges=Images(5, 12, 9))
FORMS["images, dense"] = replace(DENSE, size=None, ranges=Images(5, 12))


def scaled(x: Tensor, unit: Tensor, cu: Tensor) -> Tensor:
    """Rows [T, H, D] times the scale [B, Hkv] of their sequence and kv head."""
    of_rows = unit.repeat_interleave(cu.diff(), 0).repeat_interleave(x.shape[1] // unit.shape[1], 1)
    return x.float() * of_rows[..., None]


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, causal: bool,
    window_size: tuple[int, int], sinks: Tensor | None = None, **descales: Tensor,
) -> Tensor:  # fmt: skip
    assert causal
    if q.dtype == E4M3:
        units = (descales[f"{name}_descale"] for name in "qkv")
        wide = [scaled(x, unit, cu) for x, unit, cu in zip((q, k, v), units, (cu_q, cu_k, cu_k), strict=True)]
        return flash_varlen(
            *wide, cu_q, cu_k, max_q, max_k, causal=True, window_size=window_size, sinks=sinks
        ).bfloat16()
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    window = Window.from_flash(window_size[0], 0, causal=True) if window_size != (-1, -1) else Window()
    return attention(q, k, v, cu_q, cu_k, window=window, sink=sinks)


def flash_kvcache(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int], cache_seqlens: Tensor,
    page_table: Tensor, cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None,
    sinks: Tensor | None = None, **descales: Tensor,
) -> Tensor:  # fmt: skip
    assert causal
    assert (q.dim() == 4) == (cu_seqlens_q is None) == (max_seqlen_q is None)
    window = Window.from_flash(window_size[0], 0, causal=True) if window_size != (-1, -1) else Window()
    cache, options = PagedKV.from_nhd(k, v), {}
    if q.dtype == E4M3:  # of all sequences alike
        scales = {f"{name}_scale": descales[f"{name}_descale"][0] for name in "qkv"}
        options["q_scale"] = scales.pop("q_scale")[0]
        cache = PagedKV.from_nhd(k, v, **scales)
    where = (page_table, cache_seqlens)
    return paged_attention(q, cache, *where, cu_seqlens_q=cu_seqlens_q, window=window, sink=sinks, **options)


def flash4_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int | None, int | None],
    learnable_sink: Tensor | None, cu_seqlens_q: Tensor, max_seqlen_q: int, max_seqlen_k: int, num_splits: int,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, page_table: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    assert num_splits in (0, 1)
    window = tuple(-1 if side is None else side for side in window_size)
    common: dict[str, Any] = dict(causal=causal, window_size=window, sinks=learnable_sink)
    if cu_seqlens_k is not None:
        return flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **common), None
    common |= dict(cache_seqlens=seqused_k, page_table=page_table, max_seqlen_q=max_seqlen_q)
    return flash_kvcache(q, k, v, cu_seqlens_q=cu_seqlens_q, **common), None


def unified(**o: Any) -> None:
    """vLLM's: q_descale None, scales of a tensor as [B, Hkv], of tokens as [n, p, Hkv], images [B, R, 2] to their last
    key, chunks as large as the window."""
    window = Window.from_flash(o["window_size"][0], 0, causal=True) if o["window_size"] != (-1, -1) else Window()
    cu, images = o["cu_seqlens_q"], o.get("mm_prefix_range")
    p = bounds.positions_of(o["seqused_k"], o["q"].shape[0], cu_seqlens_q=cu)
    if o.get("chunk_lookback", -1) == 0:
        window = Window(bounds=bounds.chunked(p, o["window_size"][0] + 1))
    if images is not None:
        spans = images + torch.tensor([0, 1], dtype=torch.int32) * (images[..., 1:] > 0)
        window = Window(bounds=bounds.blocks(p, spans, size=window.size, cu_seqlens_q=cu))
    scales: dict[str, Tensor] = {}
    mode = getattr(o.get("kv_quant_mode"), "name", None)
    if mode == "INT8_PER_TOKEN_HEAD":
        scales = {"k_scale": o["k_scale_cache"], "v_scale": o["v_scale_cache"]}
    elif mode == "FP8_PER_TENSOR":
        assert o["k_descale"].shape == (len(o["seqused_k"]), o["k"].shape[2])
        scales = {"k_scale": o["k_descale"][0, 0], "v_scale": o["v_descale"][0, 0]}
    assert o["softmax_segm_output"].shape[1:] == (o["q"].shape[1], o["num_par_softmax_segments"], o["q"].shape[2])
    cache = PagedKV.from_nhd(o["k"], o["v"], **scales)
    where = (o["block_table"], o["seqused_k"])
    paged_attention(
        o["q"], cache, *where, cu_seqlens_q=o["cu_seqlens_q"], window=window, scale=o["softmax_scale"],
        sink=o["sinks"], out=o["out"],
    )  # fmt: skip


class Wrapper:
    """FlashInfer's wrappers: ``plan`` takes the metadata, ``run`` the tensors."""

    def __init__(self, workspace: Tensor, layout: str, **options: Any) -> None:
        self.layout, self.options = layout, options

    def plan(self, *metadata: Any, **options: Any) -> None:
        self.metadata, self.options = metadata, self.options | options

    @property
    def window(self) -> Window:
        return (
            Window.from_flash(self.options["window_left"], 0, causal=True)
            if self.options["window_left"] >= 0
            else Window()
        )

    def paged(self, q: Tensor, kv: tuple[Tensor, Tensor], cu: Tensor | None, where: Any, **options: Any) -> Tensor:
        bounds, ids, last = where
        page_size = kv[0].shape[2]
        assert self.layout == "HND"
        assert self.options["kv_data_type"] == kv[0].dtype
        lens = ((bounds.diff() - 1) * page_size + last).int()
        scales = {name: torch.tensor(options.pop(name)) for name in ("k_scale", "v_scale") if name in options}
        cache = PagedKV(*kv, **scales)
        return paged_attention(q, cache, (ids, bounds), lens, cu_seqlens_q=cu, window=self.window, **options)


class Ragged(Wrapper):
    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.options["causal"]
        return attention(q, k, v, *self.metadata[:2], window=self.window)


class Paged(Wrapper):
    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], **scales: float) -> Tensor:
        assert self.options["causal"]
        return self.paged(q, kv, self.metadata[0], self.metadata[1:4], **scales)


class Sinks(Wrapper):
    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], sink: Tensor, scale: float) -> Tensor:
        return self.paged(q, kv, self.metadata[0], self.metadata[1:4], sink=sink, scale=scale)


class Decode(Wrapper):
    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], **scales: float) -> Tensor:
        steps = self.options["q_len_per_req"]
        assert steps == 1 or self.options["use_tensor_cores"]
        stacked = q if steps == 1 else q.view(-1, steps, *q.shape[1:])
        return self.paged(stacked, kv, None, self.metadata[:3], **scales)


def rows_of(indptr: Tensor, indices: Tensor, b: int) -> Tensor:
    return indices[int(indptr[b]) : int(indptr[b + 1])]


def sglang_decode(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, indptr: Tensor, indices: Tensor, partial: Tensor, lse: Tensor,
    splits: Tensor, max_splits: int, scale: float, k_scale: float, v_scale: float, *, sinks: Tensor | None,
) -> None:  # fmt: skip
    assert partial.shape == (*q.shape[:2], max_splits, v.shape[2])
    ends = torch.tensor([0, 1], dtype=torch.int32)
    for b in range(q.shape[0]):
        rows = rows_of(indptr, indices, b)
        keys = [x[rows].to(q.dtype) * unit for x, unit in ((k, k_scale), (v, v_scale))]
        out[b] = attention(q[b : b + 1], *keys, ends, ends * len(rows), scale=scale, sink=sinks)[0]


def sglang_extend(
    q: Tensor, new_k: Tensor, new_v: Tensor, out: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, indptr: Tensor,
    indices: Tensor, _mask: None, causal: bool, _bounds: None, max_q: int, *_scales: float, sm_scale: float,
    sliding_window_size: int, sinks: Tensor | None,
) -> None:  # fmt: skip
    assert causal
    window = Window.from_flash(sliding_window_size, 0, causal=True)
    for b, (start, end) in enumerate(zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False)):
        rows = rows_of(indptr, indices, b)
        keys = [torch.cat([old[rows], new[start:end]]) for old, new in ((k, new_k), (v, new_v))]
        lengths = (torch.tensor([0, n], dtype=torch.int32) for n in (end - start, len(keys[0])))
        out[start:end] = attention(q[start:end], *keys, *lengths, window=window, scale=sm_scale, sink=sinks)


class _Launch:
    def __getitem__(self, _grid: Any) -> Any:
        return lambda splits, *_args, **_options: splits.fill_(1)


STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn_interface": {"flash_attn_varlen_func": flash_varlen, "flash_attn_with_kvcache": flash_kvcache},
    "flash_attn.cute.interface": {"flash_attn_varlen_func": flash4_varlen},
    "flashinfer": {
        "BatchPrefillWithRaggedKVCacheWrapper": Ragged,
        "BatchPrefillWithPagedKVCacheWrapper": Paged,
        "BatchDecodeWithPagedKVCacheWrapper": Decode,
    },
    "flashinfer.attention": {"BatchAttentionWithAttentionSinkWrapper": Sinks},
    "vllm.v1.attention.ops.triton_unified_attention": {"unified_attention": unified},
    "vllm.v1.kv_cache_interface": {"KVQuantMode": Enum("KVQuantMode", ["FP8_PER_TENSOR", "INT8_PER_TOKEN_HEAD"])},
    "sglang.kernels.ops.attention.decode_attention": {"decode_attention_fwd": sglang_decode},
    "sglang.kernels.ops.attention.extend_attention": {"extend_attention_fwd": sglang_extend},
    "sglang.kernels.ops.attention.metadata": {"get_num_kv_splits_triton": _Launch()},
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in STAND_INS.items():
        *parents, _ = accumulate(name.split("."), "{}.{}".format)
        for parent in parents:
            if parent not in STAND_INS:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    core = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: core)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["fa3", "fa3-fp8", "fa3-fp8-dense", "fa4", "flashinfer", "vllm", "sglang"])
@pytest.mark.usefixtures("stand_ins")
def test_adapters_ask_for_the_case(name: str, form: str) -> None:
    case, provider = FORMS[form], PROVIDERS[name]
    reason = provider.why_not(case)
    if reason is not None:
        narrow, large = ("decode, narrow", "dense, narrow"), "prefill, 512"
        ranges = ("chunks", "chunks, dense", "images", "images, dense")
        if name.startswith("fa3-fp8") or "fp8 q" in form:
            takes = [f for f in FORMS if "fp8 q" in f and not f.endswith("a row")] if name == "fa3-fp8" else []
            assert form not in takes + ["all new, fp8 q made"] * (name == "fa3-fp8-dense"), reason
            return
        assert form in {
            "fa3": ("e4m3", "int8 token", large, "chunks", "images", "images, dense"),
            "fa4": ("e4m3", "int8 token", large, *narrow, *ranges),
            "flashinfer": ("int8 token", large, *narrow, *ranges),
            "vllm": ("dense", "dense, full", *narrow, "chunks, dense", "images, dense"),
            "sglang": ("int8 token", *ranges),
        }[name], reason  # fmt: skip
        return
    inputs = make_inputs(case.drawn(CPU), CPU)
    verdict = Gate(inputs).check(provider.prepare(inputs)(), p_e4m3=provider.p_e4m3)
    assert verdict.passed, verdict


@pytest.mark.parametrize("form", ["dense", "dense, full", "images, dense"])
def test_flex_masks_as_the_window_says(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention as flex

    build = flex.create_block_mask
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, _compile, **options: build(*args, **options))
    case = replace(FORMS[form], global_tokens=0 if FORMS[form].ranges else 3)
    inputs = make_inputs(case.drawn(CPU), CPU)
    assert Gate(inputs).check(PROVIDERS["flex"].prepare(inputs)()).passed


def test_fused_sdpa_takes_square_causal_cases() -> None:
    square = replace(DENSE, draw=Groups(((2, 33, 33),)), size=None)
    assert PROVIDERS["sdpa-flash"].why_not(square) is None
    for other in (replace(square, size=5), FORMS["dense, full"], replace(square, dense=False)):
        assert PROVIDERS["sdpa-flash"].why_not(other)
    inputs = make_inputs(square.drawn(CPU), CPU)
    assert Gate(inputs).check(PROVIDERS["sdpa-flash"].prepare(inputs)()).passed


def test_gathered_sequences_are_what_the_cache_holds() -> None:
    case = FORMS["int8 token"]
    inputs = make_inputs(case.drawn(CPU), CPU)
    _, k, _ = inputs.of_sequence(1)
    keys = PagedKeys(inputs.cache, PageTable(inputs.pages), inputs.seq_lens)
    want, _ = keys.slice(1, 0, 33).dequantised(torch.float32)
    assert torch.equal(k, want.transpose(0, 1))
    assert inputs.cache.quant == KVQuant(torch.int8, "token")
