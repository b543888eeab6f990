"""vLLM's Triton kernel, ``unified_attention``.

``window_size=(left, right)`` excludes the query's own key: a window of W visible keys is ``(W - 1, 0)``, none is
``(-1, -1)``. Queries are the last keys. It cuts few sequences into 16 segments, as its server asks it to. Ranges of
images include their last key; chunks are windows that look back on no chunk before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.masks import Chunks, Images
from swath.bench.providers.provider import Provider, features, first_of

SEGMENTS = 16
MIN_PROGRAMS = 128
"""The server cuts into segments while sequences x kv heads stay below this."""


def _why_not(case: BenchCase) -> str | None:
    stored = ("e4m3 tensor", "e4m3 token", "int8 token")
    return features(case, sink=True, stored=stored, head_dim=512, ranges=(Chunks, Images)) or first_of(
        (case.dense, "takes paged keys only")
    )


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    case, out = inputs.case, torch.empty_like(inputs.q)
    size = case.ranges.size if isinstance(case.ranges, Chunks | Images) else case.size
    k, v = inputs.nhd
    options: dict[str, Any] = dict(
        q=inputs.q, k=k, v=v, out=out, cu_seqlens_q=inputs.cu_q, max_seqlen_q=inputs.max_q,
        seqused_k=inputs.seq_lens, max_seqlen_k=inputs.max_kv, softmax_scale=case.head_dim**-0.5, causal=True,
        window_size=(-1, -1) if size is None else (size - 1, 0), block_table=inputs.pages, softcap=0.0,
        q_descale=None, sinks=inputs.sink, **_segments(inputs), **_scales(inputs), **_ranges(inputs),
    )  # fmt: skip

    def run() -> Tensor:
        unified_attention(**options)
        return out

    return run


def _ranges(inputs: Inputs) -> dict[str, Any]:
    rule = inputs.case.ranges
    if isinstance(rule, Chunks):
        return {"chunk_lookback": 0}
    if not isinstance(rule, Images):
        return {}
    spans = [[(begin, end - 1) for begin, end in rule.spans(n)] for n in inputs.case.kv_lens]
    most = max(map(len, spans))
    padded = [row + [(0, 0)] * (most - len(row)) for row in spans]
    return {"mm_prefix_range": torch.tensor(padded, dtype=torch.int32, device=inputs.q.device)}


def _segments(inputs: Inputs) -> dict[str, Any]:
    case = inputs.case
    sequences = max(MIN_PROGRAMS // case.num_kv_heads, 1)
    shape = (sequences, case.num_q_heads, SEGMENTS)
    state = [torch.empty(shape, device=inputs.q.device) for _ in range(2)]
    padded = 1 << (case.head_dim - 1).bit_length()
    return {
        "seq_threshold_3D": sequences,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty((*shape, padded), device=inputs.q.device),
        "softmax_segm_max": state[0],
        "softmax_segm_expsum": state[1],
    }


def _scales(inputs: Inputs) -> dict[str, Any]:
    from vllm.v1.kv_cache_interface import KVQuantMode

    cache, kind = inputs.cache, inputs.case.storage.k
    unused = {"k_descale": None, "v_descale": None}
    if cache.k_scale is None or cache.v_scale is None:
        return unused
    if kind == "token":
        stored = "INT8" if cache.k.dtype == torch.int8 else "FP8"
        by_slot = (scale.transpose(1, 2).contiguous() for scale in (cache.k_scale, cache.v_scale))
        mode = KVQuantMode[f"{stored}_PER_TOKEN_HEAD"]
        return unused | dict(zip(("k_scale_cache", "v_scale_cache"), by_slot, strict=True)) | {"kv_quant_mode": mode}
    each = (inputs.case.num_seqs, inputs.case.num_kv_heads)
    scales = {"k_descale": cache.k_scale.expand(each), "v_descale": cache.v_scale.expand(each)}
    return scales | {"kv_quant_mode": KVQuantMode.FP8_PER_TENSOR}


PROVIDERS = (Provider("vllm", _why_not, _prepare, module="vllm", package="vllm"),)
