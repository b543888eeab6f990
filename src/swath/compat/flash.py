"""The three functions: FlashAttention's conventions on the outside, swath's operators inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.checks import check_int, check_ints, check_separate, check_tensor, check_values
from swath.compat.layout import append, cache_of, filled, is_regular, laid_flat, lengths_of, window_of, with_rows
from swath.compat.rotary import rotary_of
from swath.compat.words import in_flash_words
from swath.errors import bad_value
from swath.ops.attention import attention
from swath.ops.paged import LARGEST_SPLIT, paged_attention
from swath.pages import BlockTable

FEW_QUERIES = 16
"""Query tokens of a sequence up to which dense keys are given as pages, which kernels cut into slices (decode)."""


@in_flash_words(return_lse="return_attn_probs")
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention of sequences of one length.

    Args:
        q: [B, Sq, Hq, D].
        k, v: [B, Sk, Hkv, D]; Hkv divides Hq. Values may be narrower, as may those of the other functions.
        softmax_scale: multiplies q . k; None is ``D ** -0.5``.
        causal: the query i sees no key after ``i + Sk - Sq``.
        window_size: (left, right): the query i sees the keys from ``i + Sk - Sq - left`` to ``i + Sk - Sq + right``; -1
            is no limit.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 is none.
        return_attn_probs: also return the LSE, [B, Hq, Sq], fp32, a natural logarithm.
        s_aux: [Hq], logits that join the softmax's denominator; None is none.

    Returns:
        out [B, Sq, Hq, D], or (out, lse, None). A row that sees no key is 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    del deterministic
    _refuse(dropout_p, alibi_slopes)
    q, k, v = (with_rows(name, x, 4) for name, x in (("q", q), ("k", k), ("v", v)))
    if k.shape[0] != q.shape[0]:
        raise bad_value("k", f"q's batch of {q.shape[0]}", k.shape[0])
    check_values(v, k)
    if not is_regular(k, v):
        k, v = k.contiguous(), v.contiguous()
    (batch, q_len), kv_len = q.shape[:2], k.shape[1]
    window, shift = window_of(window_size, causal, kv_len + q_len)
    options: dict[str, Any] = dict(
        window=window, scale=softmax_scale, softcap=softcap, sink=s_aux, return_lse=return_attn_probs,
    )  # fmt: skip

    def q_start(num_seqs: int) -> Tensor | None:
        return None if shift is None else filled(num_seqs, kv_len - q_len + shift, q)

    if q_len <= FEW_QUERIES:
        pages = PagedKV.from_dense(k, v)
        made = paged_attention(q, *pages, filled(batch, kv_len, q), q_start=q_start(batch), **options)
    else:
        rows = laid_flat(q, k, v)
        start = q_start(rows[3].shape[0] - 1)
        made = attention(*rows, max_q_len=q_len, max_kv_len=kv_len, q_start=start, **options)
    out, lse = made if return_attn_probs else (made, None)
    out = out.view(*q.shape[:3], v.shape[3])
    return out if lse is None else (out, lse.view(q.shape[:3]).transpose(1, 2), None)


@in_flash_words(return_lse="return_attn_probs", k_scale="k")
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention of sequences of any lengths, laid end to end.

    Args:
        q: [Tq, Hq, D].
        k, v: [Tk, Hkv, D], or with ``block_table`` pages [num_pages, page_size, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1]; with ``block_table`` the differences of ``cu_seqlens_k``
            are the lengths.
        max_seqlen_q, max_seqlen_k: the longest lengths, or larger.
        block_table: [B, max_pages]. Entries that are no pages, such as -1, are not followed.

    The others are as in ``flash_attn_func``.

    Returns:
        out [Tq, Hq, D], or (out, lse, None) with lse [Hq, Tq]. A row that sees no key is 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    del deterministic
    _refuse(dropout_p, alibi_slopes)
    q = with_rows("q", q, 3)
    k, v = (with_rows(name, x, 3 if block_table is None else 4) for name, x in (("k", k), ("v", v)))
    check_values(v, k)
    check_ints("cu_seqlens_k", cu_seqlens_k, None, q.device)
    check_ints("cu_seqlens_q", cu_seqlens_q, cu_seqlens_k.shape[0], q.device)
    q_bound, kv_bound = _bound("max_seqlen_q", max_seqlen_q), _bound("max_seqlen_k", max_seqlen_k)
    capacity = k.shape[0] if block_table is None else check_tensor("block_table", block_table, 2).shape[1] * k.shape[1]
    window, shift = window_of(window_size, causal, capacity + q.shape[0])
    options: dict[str, Any] = dict(
        window=window, scale=softmax_scale, softcap=softcap, sink=s_aux, return_lse=return_attn_probs,
        max_q_len=q_bound, max_kv_len=kv_bound,
        q_start=None if shift is None else cu_seqlens_k.diff().long().clamp(min=0) - cu_seqlens_q.diff() + shift,
    )  # fmt: skip
    decodes = q_bound is not None and q_bound <= FEW_QUERIES
    if block_table is None and not decodes:
        made = attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    else:
        cache, table = _paged(k, v, cu_seqlens_k, block_table)
        made = paged_attention(q, cache, table, cu_seqlens_k.diff(), cu_seqlens_q=cu_seqlens_q, **options)
    if not return_attn_probs:
        return made
    out, lse = made
    return out, lse.transpose(0, 1), None


@in_flash_words(return_lse="return_softmax_lse", k_scale="k_cache")
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention over a cache, into which k and v are written first where they are given.

    Args:
        q: [B, Sq, Hq, D].
        k_cache, v_cache: [B_cache, S, Hkv, D] with any S, or with ``block_table`` pages [num_pages, page_size, Hkv, D].
        k, v: [B, S_new, Hkv, D], written at ``cache_seqlens``, ``cache_seqlens + 1``, ...
        rotary_cos, rotary_sin: [positions, R / 2]; the first R elements of q and k are rotated by their positions in
            the cache. All of q has the position ``cache_seqlens`` where there is neither ``causal`` nor a window.
        cache_seqlens: keys in the cache without the new ones: int, or int32 or int64 [B]; None is all S.
        cache_batch_idx: [B], the row of the cache of each sequence. Rows differ from one another where k is given.
        cache_leftpad: [B], the first key of each sequence, for caches without ``block_table``. The cache is then read
            in pages of one key, which kernels take more slowly.
        block_table: [B, max_pages]. Entries that are no pages, such as -1, are not followed.
        rotary_interleaved: rotate elements 0 and 1, 2 and 3, ...; otherwise 0 and R / 2, 1 and R / 2 + 1, ...
        num_splits: 0, or 1 not to share out the keys of a row: its bits then do not depend on the batch.
        return_softmax_lse: also return the LSE, [B, Hq, Sq], fp32, a natural logarithm.

    The others are as in ``flash_attn_func``.

    Returns:
        out [B, Sq, Hq, D], or (out, lse). A row that sees no key is 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _refuse(0.0, alibi_slopes)
    if num_splits not in (0, 1):
        raise bad_value("num_splits", "0 (as many as are fast) or 1", num_splits)
    q = with_rows("q", q, 4)
    cache, table = cache_of(k_cache, v_cache, q.shape[0], cache_batch_idx, cache_leftpad, block_table)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None and (k is not None or cache_leftpad is not None):
        raise bad_value("cache_seqlens", "the keys in the cache, as k or cache_leftpad is given", None)
    seq_lens = lengths_of(capacity if cache_seqlens is None else cache_seqlens, q)
    window, shift = window_of(window_size, causal, capacity + q.shape[1])
    rotary = rotary_of(rotary_cos, rotary_sin, k, q.shape[3], capacity, rotary_interleaved)
    if rotary is not None and k is not None:
        q = rotary.turn(q, seq_lens, advance=causal or tuple(window_size) != (-1, -1))
        k = rotary.turn(k, seq_lens, advance=True)
    if cache_leftpad is not None:
        seq_lens = seq_lens - cache_leftpad
    if k is not None or v is not None:
        check_separate("k_cache", k_cache)
        check_separate("v_cache", v_cache)
        seq_lens = append(cache, table, k, v, seq_lens)
    made = paged_attention(
        q, cache, table, seq_lens, window=window, scale=softmax_scale, softcap=softcap, sink=s_aux,
        q_start=None if shift is None else seq_lens.long().clamp(min=0) - q.shape[1] + shift,
        split_size=LARGEST_SPLIT if num_splits else None, return_lse=return_softmax_lse,
    )  # fmt: skip
    return (made[0], made[1].transpose(1, 2)) if isinstance(made, tuple) else made


def _paged(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None) -> tuple[PagedKV, BlockTable]:
    """Pages and their table; dense keys are pages of one key each."""
    if block_table is not None:
        return PagedKV.from_nhd(k, v), block_table
    every_key = torch.arange(k.shape[0], dtype=torch.int32, device=k.device)
    return PagedKV(k.unsqueeze(2), v.unsqueeze(2)), (every_key, cu_seqlens_k)


def _refuse(dropout_p: float, alibi_slopes: Tensor | None) -> None:
    """What FlashAttention has and swath has not."""
    if dropout_p:
        raise bad_value("dropout_p", "0: swath does no training", dropout_p)
    if alibi_slopes is not None:
        raise bad_value("alibi_slopes", "None: swath adds no bias to scores", type(alibi_slopes).__name__)


def _bound(name: str, value: int | Tensor | None) -> int | None:
    """A host bound of lengths; one that lies on the device is not read."""
    if value is None or isinstance(value, Tensor):
        return None
    return check_int(name, value, "an int, a tensor or None")
