"""``attention``: dense, variable-length prefill."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from swath import library
from swath.ops.attention import call
from swath.window import Window


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    gqa: str = "grouped",
    q_start: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences laid end to end, each row over the keys its window shows.

    Args:
        q: [Tq, Hq, D], bf16, fp16 or fp32; any strides with the last one 1.
        k, v: [Tk, Hkv, D] in q's dtype; any strides with the last one 1.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; sequence b owns rows ``cu[b] .. cu[b + 1] - 1``.
        max_q_len, max_kv_len: host bounds of the lengths, for the launch only; None: Tq and Tk.
        window: who sees whom (see ``Window``); None is full causal attention.
        scale: multiplies q . k; None is ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 is none.
        sink: [Hq] logits, fp32 or q's dtype, that join the softmax's denominator and nothing else (gpt-oss).
        gqa: "grouped" (kv head = q head // group) or "interleaved" (kv head = q head % Hkv).
        q_start: int32 [B], position of each sequence's first query; None: the queries are the last keys.
        out: [Tq, Hq, D] to write into; rows past ``cu_seqlens_q[-1]`` stay untouched.
        return_lse: also return the log of the softmax denominator: natural log, fp32 [Tq, Hq].
        impl: "auto" or the backend to use.

    Returns:
        out [Tq, Hq, D], or (out, lse). A row that sees no key is 0 and its LSE -inf (the sink logit with sinks).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    options: dict[str, Any] = dict(
        max_q_len=max_q_len, max_kv_len=max_kv_len, window=window, scale=scale, softcap=softcap, sink=sink, gqa=gqa,
        q_start=q_start, out=out, return_lse=return_lse,
    )  # fmt: skip
    if library.must_dispatch(q, k, v):
        return library.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options, impl=impl)
    return call.execute(call.prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, **options), impl)
