"""``paged_attention``: decode, n-step decode, chunked prefill and mixed batches over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from swath import library
from swath.cache import PagedKV
from swath.ops.paged import call
from swath.window import Window


def paged_attention(
    q: Tensor,
    cache: PagedKV,
    block_table: Tensor | Sequence[Tensor],
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    window: Window | None = None,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    gqa: str = "grouped",
    q_start: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    compute: str = "float",
    split_size: int | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query tokens over the paged keys of their sequence, the query tokens' own keys included.

    Args:
        q: [B, Hq, D] (decode), [B, S, Hq, D] (n-step decode), or [T, Hq, D] with ``cu_seqlens_q`` (chunked
            prefill, decode and mixed batches). bf16, fp16, fp32, or float8_e4m3fn over an int8 or fp8 cache. Any
            strides with the last one 1. An unquantised cache has q's dtype.
        cache: keys and values, new tokens already appended (see ``append_kv``).
        block_table: int32 [B, max_pages], or flat ``(page_ids [N], page_indptr [B + 1])``. Entries outside the pool
            (freed pages, -1) are never read; their keys are not visible.
        seq_lens: int32 [B], keys of each sequence; negative counts as 0.
        cu_seqlens_q: int32 [B + 1]; sequence b owns query rows ``cu[b] .. cu[b + 1] - 1``.
        max_q_len, max_kv_len: host bounds of the lengths, for launch and scratch only; None: what the shapes allow.
        window: who sees whom (see ``Window``); None is full causal attention.
        scale: multiplies q . k; None is ``D ** -0.5``.
        q_scale: fp32 scale of fp8 queries, [] or as q without D; None is 1.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 is none.
        sink: [Hq] logits, fp32 or q's dtype, that join the softmax's denominator and nothing else (gpt-oss).
        gqa: "grouped" (kv head = q head // group) or "interleaved" (kv head = q head % Hkv).
        q_start: int32 [B], position of each sequence's first query; None: the queries are the last keys.
        out: as q (bf16 for fp8 queries), to write into; rows past ``cu_seqlens_q[-1]`` stay untouched.
        return_lse: also return the log of the softmax denominator: natural log, fp32, as q without D.
        compute: "float", or "int8" to multiply in int8 (int8 cache with tensor, head or channel scales).
        split_size: a multiple of 64: cut the keys at its multiples, so that no bit of a row depends on the batch.
        impl: "auto" or the backend to use.

    Returns:
        out, or (out, lse). A row that sees no key is 0 and its LSE -inf (the sink logit with sinks).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    options: dict[str, Any] = dict(
        cu_seqlens_q=cu_seqlens_q, max_q_len=max_q_len, max_kv_len=max_kv_len, window=window, scale=scale,
        q_scale=q_scale, softcap=softcap, sink=sink, gqa=gqa, q_start=q_start, out=out, return_lse=return_lse,
        compute=compute, split_size=split_size,
    )  # fmt: skip
    if library.must_dispatch(q, cache):
        return library.paged_attention(q, cache, block_table, seq_lens, **options, impl=impl)
    return call.execute(call.prepare(q, cache, block_table, seq_lens, **options), impl)
