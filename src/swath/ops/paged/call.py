"""From the arguments of ``paged_attention`` to a checked Problem, and to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swath import checks, dispatch
from swath.cache import PagedKeys, PagedKV, PageTable
from swath.checks import Accepted
from swath.errors import bad_type, bad_value
from swath.problem import Problem
from swath.quant import LARGEST
from swath.signature import Memory, coarse
from swath.window import FULL, Window

OP = "paged"
SPLIT_STEP = 64

_memory: Memory[Accepted] = Memory()


def prepare(
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
) -> Problem:
    """Check the arguments of ``paged_attention`` (see there) and make its outputs."""
    window = FULL if window is None else window
    tensors = (q, cache, block_table, seq_lens, cu_seqlens_q, q_start, window, q_scale, sink, out)
    values = (max_q_len, coarse(max_kv_len), scale, softcap, gqa, return_lse, compute, split_size)
    accepted = _memory.recall(_accept, tensors, values)
    out, lse = checks.make_outputs(q, out, return_lse)
    table = PageTable(block_table) if isinstance(block_table, Tensor) else PageTable(*block_table)
    scoring = accepted.scoring
    problem = Problem(
        q=q, cu_seqlens_q=cu_seqlens_q, keys=PagedKeys(cache, table, seq_lens), q_start=q_start, window=window,
        scale=scoring.scale, q_scale=q_scale, softcap=scoring.softcap, sink=sink, interleaved=scoring.interleaved,
        out=out, lse=lse, max_q_len=accepted.max_q_len, max_kv_len=accepted.max_kv_len, compute=compute,
        split_size=split_size,
    )  # fmt: skip
    problem.memo = accepted.memo
    return problem


def execute(problem: Problem, impl: str) -> Tensor | tuple[Tensor, Tensor]:
    """Run a prepared call: out, or (out, lse) where an LSE was asked for."""
    dispatch.choose(OP, problem, impl).run(problem)
    return problem.out if problem.lse is None else (problem.out, problem.lse)


def _accept(
    q: Tensor, cache: PagedKV, block_table: Any, seq_lens: Tensor, cu_seqlens_q: Any, q_start: Any, window: Any,
    q_scale: Any, sink: Any, out: Any, max_q_len: Any, max_kv_len: Any, scale: Any, softcap: Any, gqa: Any,
    return_lse: Any, compute: Any, split_size: Any,
) -> Accepted:  # fmt: skip
    """Every check of a call whose signature was not met before."""
    if not isinstance(cache, PagedKV):
        raise bad_type("cache", "a PagedKV", type(cache).__name__)
    checks.check_tensor("q", q, 3 if cu_seqlens_q is not None or getattr(q, "ndim", 3) != 4 else 4, cache.k.device)
    checks.check_int32("seq_lens", seq_lens, None, q.device)
    num_seqs = seq_lens.shape[0]
    _check_queries(q, q_scale, cache, num_seqs, cu_seqlens_q)
    table = _table(block_table, num_seqs, q.device)
    if q_start is not None:
        checks.check_int32("q_start", q_start, num_seqs, q.device)
    scoring = checks.check_scoring(q, num_seqs, window, scale, softcap, sink, gqa)
    _check_compute(compute, cache)
    _check_split_size(split_size)
    checks.check_no_grad(q=q, k=cache.k, v=cache.v, k_scale=cache.k_scale, v_scale=cache.v_scale, sink=sink)
    checks.check_outputs(q, out, return_lse)
    most = q.shape[0] if cu_seqlens_q is not None else q.shape[1] if q.dim() == 4 else 1
    return Accepted(
        scoring,
        max_q_len=checks.check_bound("max_q_len", max_q_len, most),
        max_kv_len=checks.check_bound("max_kv_len", max_kv_len, table.max_pages * cache.page_size),
    )


def _table(block_table: Tensor | Sequence[Tensor], num_seqs: int, device: torch.device) -> PageTable:
    table = PageTable.of(block_table, num_seqs)
    for part in (table.entries, table.indptr):
        if part is not None and part.device != device:
            raise bad_value("block_table", f"tensors on {device}, as q", part.device)
    return table


def _check_queries(
    q: Tensor, q_scale: Tensor | None, cache: PagedKV, num_seqs: int, cu_seqlens_q: Tensor | None
) -> None:
    checks.check_rows("q", q)
    quantised = cache.k.dtype in LARGEST
    if q.dtype == torch.float8_e4m3fn:
        if not quantised:
            raise bad_type("q", f"the cache's dtype {cache.k.dtype}; fp8 queries need an int8 or fp8 cache", q.dtype)
    elif q.dtype not in checks.Q_DTYPES:
        raise bad_type("q", "bfloat16, float16, float32 or float8_e4m3fn", q.dtype)
    elif not quantised and q.dtype != cache.k.dtype:
        raise bad_type("q", f"the unquantised cache's dtype {cache.k.dtype}", q.dtype)
    checks.check_heads(q, cache.num_kv_heads, cache.head_dim)
    if cu_seqlens_q is not None:
        checks.check_int32("cu_seqlens_q", cu_seqlens_q, num_seqs + 1, q.device)
    elif q.shape[0] != num_seqs:
        raise bad_value("q", f"shape [{num_seqs}, ...], as seq_lens (or cu_seqlens_q)", tuple(q.shape))
    _check_q_scale(q, q_scale)


def _check_q_scale(q: Tensor, q_scale: Tensor | None) -> None:
    if q_scale is None:
        return
    if q.dtype != torch.float8_e4m3fn:
        raise bad_value("q_scale", f"None for {q.dtype} queries", "a tensor")
    if not isinstance(q_scale, Tensor) or q_scale.dtype != torch.float32:
        raise bad_type("q_scale", "a float32 tensor", getattr(q_scale, "dtype", type(q_scale).__name__))
    if q_scale.dim() and q_scale.shape != q.shape[:-1]:
        raise bad_value("q_scale", f"shape [] or {tuple(q.shape[:-1])}", tuple(q_scale.shape))
    if q_scale.device != q.device:
        raise bad_value("q_scale", f"a tensor on {q.device}, as q", q_scale.device)


def _check_compute(compute: str, cache: PagedKV) -> None:
    checks.check_choice("compute", compute, checks.COMPUTES)
    if compute == "int8" and (cache.k.dtype != torch.int8 or "token" in (cache.quant.k, cache.quant.v_granularity)):
        came = f"{cache.k.dtype} with {cache.quant.k!r} and {cache.quant.v_granularity!r} scales"
        raise bad_value("compute", "'float', or an int8 cache with tensor, head or channel scales for 'int8'", came)


def _check_split_size(split_size: int | None) -> None:
    if split_size is None:
        return
    checks.check_int("split_size", split_size, "an int or None")
    if split_size < SPLIT_STEP or split_size % SPLIT_STEP:
        raise bad_value("split_size", f"a multiple of {SPLIT_STEP}", split_size)
