"""SGLang's Triton kernels: ``decode_attention_fwd``, and ``extend_attention_fwd`` for more than one query token.

``sliding_window_size`` excludes the query's own key: a window of W visible keys is W - 1, none is -1. Its decode knows
no window: the server hands it the last keys only, as is done here; ``extend`` gets the part of the prefix that the
first new query sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs, bounds_of
from swath.bench.providers.provider import Provider, features, first_of

MAX_SPLITS = 8
"""The server's default."""


def _why_not(case: BenchCase) -> str | None:
    return features(case, sink=True, stored=("e4m3 tensor",), head_dim=512, narrow=True) or first_of(
        (case.storage.is_quantised and case.op != "decode", "takes new keys in 16 bits, and this case has them in 8")
    )


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    return _decode(inputs) if inputs.case.op == "decode" else _extend(inputs)


def _decode(inputs: Inputs) -> Callable[[], Tensor]:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    case, q = inputs.case, inputs.q
    batch, seen = q.shape[0], [min(n, case.size or n) for n in case.kv_lens]
    k, v = (x.flatten(0, 1) for x in inputs.nhd)
    indptr, indices = _indices(inputs, [n - s for n, s in zip(case.kv_lens, seen, strict=True)], case.kv_lens)
    splits = torch.empty(batch, dtype=torch.int32, device=q.device)
    lens = torch.tensor(seen, dtype=torch.int32, device=q.device)
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    rows = max(1 << (batch - 1).bit_length(), 256)
    get_num_kv_splits_triton[(1,)](
        splits, lens, batch, 1, case.num_q_heads, case.num_kv_heads, MAX_SPLITS, cores, MAX_NUM_SEQ=rows
    )
    partial = torch.empty(batch, case.num_q_heads, MAX_SPLITS, case.v_dim, device=q.device)
    lse = torch.empty(batch, case.num_q_heads, MAX_SPLITS, device=q.device)
    out = q.new_empty(*q.shape[:-1], case.v_dim)
    scales = [1.0 if x is None else float(x) for x in (inputs.cache.k_scale, inputs.cache.v_scale)]
    arguments = (q, k, v, out, indptr, indices, partial, lse, splits, MAX_SPLITS, case.head_dim**-0.5, *scales)

    def run() -> Tensor:
        decode_attention_fwd(*arguments, sinks=inputs.sink)
        return out

    return run


def _extend(inputs: Inputs) -> Callable[[], Tensor]:
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    case, q = inputs.case, inputs.q
    prefix = [kv - n for n, kv in zip(case.row_counts, case.kv_lens, strict=True)]
    first = [0 if case.size is None else max(p - case.size + 1, 0) for p in prefix]
    k, v = inputs.dense if case.dense else (x.flatten(0, 1) for x in inputs.nhd)
    indptr, indices = _indices(inputs, first, prefix)
    new_rows = _indices(inputs, prefix, case.kv_lens)[1]
    new_k, new_v, out = k[new_rows], v[new_rows], q.new_empty(*q.shape[:-1], case.v_dim)
    window = -1 if case.size is None else case.size - 1

    def run() -> Tensor:
        extend_attention_fwd(
            q, new_k, new_v, out, k, v, inputs.cu_q, indptr, indices, None, True, None, inputs.max_q, 1.0, 1.0,
            sm_scale=case.head_dim**-0.5, sliding_window_size=window, sinks=inputs.sink,
        )  # fmt: skip
        return out

    return run


def _indices(inputs: Inputs, first: list[int], end: list[int] | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Bounds [B + 1] and rows of the keys ``first .. end - 1`` of each sequence in keys laid flat, token by token."""
    size, rows = inputs.case.page_size, []
    for b, (start, stop) in enumerate(zip(first, end, strict=True)):
        pos = torch.arange(start, stop, device=inputs.q.device)
        in_pool = inputs.cu_k[b] + pos if inputs.case.dense else inputs.pages[b, pos // size].long() * size + pos % size
        rows.append(in_pool)
    counts = [stop - start for start, stop in zip(first, end, strict=True)]
    return bounds_of(counts, inputs.q.device), torch.cat(rows)


PROVIDERS = (Provider("sglang", _why_not, _prepare, module="sglang", package="sglang"),)
