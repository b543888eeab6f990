"""FlashInfer: its fa2 kernels in decode and n-step decode, fa3 in prefill; ``plan`` is not timed.

``window_left`` excludes the query's own key: a window of W visible keys is ``W - 1``, none is -1. Queries are the last
keys. Sinks need its wrapper ``BatchAttentionWithAttentionSinkWrapper`` (paged only): the others ignore them. It takes
the scales of an fp8 cache as two host numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider, features, first_of

WORKSPACE_BYTES = 256 << 20
TENSOR_CORE_GROUP = 4
"""From so many query heads of a kv head on, its tensor-core decode is the faster one."""


def _why_not(case: BenchCase) -> str | None:
    return features(case, sink=True, stored=("e4m3 tensor",)) or first_of(
        (case.has_sink and case.dense, "has sinks over paged keys only"),
        (case.has_sink and case.storage.is_quantised, "has sinks over 16-bit caches only"),
    )


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    if inputs.case.dense:
        return _ragged(inputs)
    if inputs.sink is not None:
        return _with_sinks(inputs, inputs.sink)
    return _decode(inputs) if inputs.case.is_decode else _paged(inputs)


def _ragged(inputs: Inputs) -> Callable[[], Tensor]:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(inputs), "NHD", backend="fa3")
    case = inputs.case
    wrapper.plan(
        inputs.cu_q, inputs.cu_k, case.num_q_heads, case.num_kv_heads, case.head_dim, causal=True, **_types(inputs),
    )  # fmt: skip
    return lambda: wrapper.run(inputs.q, *inputs.dense)


def _decode(inputs: Inputs) -> Callable[[], Tensor]:
    import flashinfer

    case, (ids, bounds, last) = inputs.case, inputs.flat_pages
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(inputs), "HND", use_tensor_cores=case.op == "steps" or case.group >= TENSOR_CORE_GROUP, backend="fa2"
    )
    heads = (case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size)
    wrapper.plan(bounds, ids, last, *heads, q_len_per_req=inputs.max_q, **_types(inputs))
    return _runs(wrapper, inputs)


def _paged(inputs: Inputs) -> Callable[[], Tensor]:
    import flashinfer

    backend = "fa2" if inputs.case.storage.is_quantised else "fa3"
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(inputs), "HND", backend=backend)
    _plan_paged(wrapper, inputs)
    return _runs(wrapper, inputs)


def _with_sinks(inputs: Inputs, sink: Tensor) -> Callable[[], Tensor]:
    from flashinfer.attention import BatchAttentionWithAttentionSinkWrapper

    case, window_left = inputs.case, _window_left(inputs)
    wrapper = BatchAttentionWithAttentionSinkWrapper(
        _workspace(inputs), "HND", backend="fa2" if case.is_decode else "fa3",
        q_data_type=inputs.q.dtype, kv_data_type=inputs.q.dtype, head_dim_qk=case.head_dim,
        head_dim_vo=case.head_dim, window_left=window_left,
    )  # fmt: skip
    _plan_paged(wrapper, inputs)
    cache, logits, scale = (inputs.cache.k, inputs.cache.v), sink.float(), case.head_dim**-0.5
    return lambda: wrapper.run(inputs.q, cache, logits, scale)


def _plan_paged(wrapper: Any, inputs: Inputs) -> None:
    case, (ids, bounds, last) = inputs.case, inputs.flat_pages
    heads = (case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size)
    wrapper.plan(inputs.cu_q, bounds, ids, last, *heads, causal=True, **_types(inputs))


def _runs(wrapper: Any, inputs: Inputs) -> Callable[[], Tensor]:
    cache = inputs.cache
    scales = {}
    if cache.k_scale is not None and cache.v_scale is not None:
        scales = {"k_scale": float(cache.k_scale), "v_scale": float(cache.v_scale)}
    return lambda: wrapper.run(inputs.q, (cache.k, cache.v), **scales)


def _types(inputs: Inputs) -> dict[str, Any]:
    stored = inputs.q.dtype if inputs.case.dense else inputs.cache.k.dtype
    return {"window_left": _window_left(inputs), "q_data_type": inputs.q.dtype, "kv_data_type": stored}


def _window_left(inputs: Inputs) -> int:
    return -1 if inputs.case.size is None else inputs.case.size - 1


def _workspace(inputs: Inputs) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)


PROVIDERS = (Provider("flashinfer", _why_not, _prepare, module="flashinfer", package="flashinfer-python", builds=True),)
