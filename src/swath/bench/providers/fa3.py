"""FlashAttention-3.

``window_size=(left, right)`` excludes the query's own key: a window of W visible keys is ``(W - 1, 0)``, none is
``(-1, -1)``. Queries are the last keys. Its sinks are logits in bf16, as swath's. Chunks are sequences of their own, as
vLLM's servers make them for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs, bounds_of
from swath.bench.masks import Chunks
from swath.bench.providers.provider import Provider, features, first_of


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


def _out(result: Any) -> Tensor:
    """Some releases return (out, lse)."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


PROVIDERS = (Provider("fa3", _why_not, _prepare, module="flash_attn_interface", package="tokenspeed-fa3"),)
