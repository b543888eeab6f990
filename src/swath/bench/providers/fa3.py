"""FlashAttention-3.

``window_size=(left, right)`` excludes the query's own key: a window of W visible keys is ``(W - 1, 0)``, none is
``(-1, -1)``. Queries are the last keys. Its sinks are logits in bf16, as swath's. Chunks are sequences of their own, as
vLLM's servers make them for it.

Its fp8 kernels take queries, keys and values of e4m3, each with a scale for a sequence and kv head. They round p to
e4m3 too, and are held to an error budget of that (``p_e4m3``). Over contiguous keys they are faster than over pages:
``fa3-fp8-dense`` has copies, made beforehand, of prefills whose keys are all new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from swath.bench.case import BenchCase, Groups
from swath.bench.inputs import Inputs, bounds_of
from swath.bench.masks import Chunks
from swath.bench.providers.provider import Provider, features, first_of
from swath.ops.quantise import quantise_q


def _why_not(case: BenchCase) -> str | None:
    narrow = (case.head_dim, case.v_dim) == (192, 128)
    return features(case, sink=True, narrow=narrow, ranges=Chunks) or first_of(
        (bool(case.ranges) and not (case.dense and case.row_counts == case.kv_lens), f"has no {case.ranges} over pages")
    )


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    from flash_attn_interface import flash_attn_varlen_func, flash_attn_with_kvcache

    window = inputs.case.size
    options: dict[str, Any] = {"causal": True, "window_size": (-1, -1) if window is None else (window - 1, 0)}
    if inputs.sink is not None:
        options["sinks"] = inputs.sink
    if inputs.case.dense:
        lengths = (inputs.cu_q, inputs.cu_k, inputs.max_q, inputs.max_kv)
        if isinstance(inputs.case.ranges, Chunks):
            size = inputs.case.ranges.size
            chunks = [min(size, n - first) for n in inputs.case.kv_lens for first in range(0, n, size)]
            cu = bounds_of(chunks, inputs.q.device)
            lengths = (cu, cu, max(chunks), max(chunks))
        return lambda: _out(flash_attn_varlen_func(inputs.q, *inputs.dense, *lengths, **options))
    k, v = inputs.nhd
    options |= {"cache_seqlens": inputs.seq_lens, "page_table": inputs.pages}
    if inputs.case.is_decode:
        return lambda: _out(flash_attn_with_kvcache(inputs.q_steps, k, v, **options))
    options |= {"cu_seqlens_q": inputs.cu_q, "max_seqlen_q": inputs.max_q}
    return lambda: _out(flash_attn_with_kvcache(inputs.q, k, v, **options))


def _why_not_fp8(case: BenchCase) -> str | None:
    stored = ("e4m3 none", "e4m3 tensor", "e4m3 head")
    return features(case, sink=True, stored=stored, fp8_q=True, computes=("float", "fast")) or first_of(
        (not case.e4m3, "multiplies queries, keys and values that are all e4m3"),
        (case.q_scale == "token", "has a scale of queries for a sequence and kv head, not for each row"),
    )


def _why_not_fp8_dense(case: BenchCase) -> str | None:
    groups = case.draw.groups if isinstance(case.draw, Groups) else ()
    new = bool(groups) and all(q == kv for _, q, kv in groups)
    return _why_not_fp8(case) or first_of((not new, "has keys that were cached before"))


def _prepare_fp8(inputs: Inputs) -> Callable[[], Tensor]:
    from flash_attn_interface import flash_attn_with_kvcache

    k, v = inputs.nhd
    options = _options_fp8(inputs) | {"cache_seqlens": inputs.seq_lens, "page_table": inputs.pages}
    if inputs.case.is_decode:
        return _with_queries(inputs, lambda q: flash_attn_with_kvcache(q, k, v, **options), inputs.q_steps.shape)
    options |= {"cu_seqlens_q": inputs.cu_q, "max_seqlen_q": inputs.max_q}
    return _with_queries(inputs, lambda q: flash_attn_with_kvcache(q, k, v, **options), inputs.q.shape)


def _prepare_fp8_dense(inputs: Inputs) -> Callable[[], Tensor]:
    from flash_attn_interface import flash_attn_varlen_func

    keys, options = inputs.gathered, _options_fp8(inputs)
    lengths = (inputs.cu_q, inputs.cu_k, inputs.max_q, inputs.max_kv)
    return _with_queries(inputs, lambda q: flash_attn_varlen_func(q, *keys, *lengths, **options), inputs.q.shape)


def _options_fp8(inputs: Inputs) -> dict[str, Any]:
    case, window, cache = inputs.case, inputs.case.size, inputs.cache
    scales = {"q": inputs.call.q_scale, "k": cache.k_scale, "v": cache.v_scale}
    options: dict[str, Any] = {"causal": True, "window_size": (-1, -1) if window is None else (window - 1, 0)}
    for name, scale in scales.items():
        if scale is not None:
            options[f"{name}_descale"] = scale.float().expand(case.num_seqs, case.num_kv_heads).contiguous()
    return options if inputs.sink is None else options | {"sinks": inputs.sink}


def _with_queries(inputs: Inputs, call: Callable[[Tensor], Any], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """The call with its fp8 queries, or where they are made within the time, by swath's ``quantise_q``: it has no such
    kernel of its own."""
    if not inputs.case.q_made:
        q = inputs.q.view(shape)
        return lambda: _out(call(q))
    wide, scale = inputs.wide_q, inputs.call.q_scale
    return lambda: _out(call(quantise_q(wide, scale)[0].view(shape)))


def _out(result: Any) -> Tensor:
    """Some releases return (out, lse)."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


_PACKAGE: dict[str, Any] = {"module": "flash_attn_interface", "package": "tokenspeed-fa3"}
PROVIDERS = (
    Provider("fa3", _why_not, _prepare, **_PACKAGE),
    Provider("fa3-fp8", _why_not_fp8, _prepare_fp8, p_e4m3=True, **_PACKAGE),
    Provider("fa3-fp8-dense", _why_not_fp8_dense, _prepare_fp8_dense, p_e4m3=True, **_PACKAGE),
)
