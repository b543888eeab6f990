"""A call as kernels take it: its tensors by the names of parameters, and strides, numbers and views that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swath.backends.triton.features import Features, kernel_dtype, kernel_scale, token_strides
from swath.backends.triton.work import Work
from swath.cache import DenseKeys, PagedKeys
from swath.pages import PageTable
from swath.problem import LOG2_E, Problem

Operands = Mapping[str, Tensor | None]
"""The tensors of a call by name; None, or no entry, for what the call lacks."""


def with_positive_scale(problem: Problem) -> Problem:
    """Kernels take a positive score scale; another sign goes into q, which it changes exactly."""
    if problem.scale > 0:
        return problem
    q = (problem.q.float() * (-1.0 if problem.scale < 0 else 0.0)).to(problem.q.dtype)
    return replace(problem, q=q, scale=-problem.scale or 1.0)


def operands_of(problem: Problem) -> Operands:
    """The tensors of a call by the names of kernel parameters: what a plan takes anew in every run."""
    problem = with_positive_scale(problem)
    keys, lead = problem.keys, problem.window.global_tokens
    operands: dict[str, Tensor | None] = {
        "q": problem.q,
        "out": problem.out,
        "lse": problem.lse,
        "sink": _contiguous(problem.sink),
        "q_scale": _contiguous(problem.q_scale),
        "cu_q": _contiguous(problem.cu_seqlens_q),
        "q_start": _contiguous(problem.q_start),
        "window": _contiguous(problem.window.bounds),
        "lead": lead.contiguous() if isinstance(lead, Tensor) else None,
    }
    if isinstance(keys, DenseKeys):
        return operands | {"k": keys.k, "v": keys.v, "lens": keys.cu_seqlens.contiguous()}
    cache, table = keys.cache, keys.table
    return operands | {
        "k": cache.k,
        "v": cache.v,
        "k_scale": kernel_scale(cache.k_scale),
        "v_scale": kernel_scale(cache.v_scale),
        "table": _entries(table),
        "table_index": _contiguous(table.rows if table.indptr is None else table.indptr),
        "lens": keys.seq_lens.contiguous(),
    }


def shared_args(work: Work, F: Features) -> dict[str, Any]:
    """The fixed arguments that attention kernels share, and more names than any of them takes."""
    problem = work.problem
    window, keys = problem.window, problem.keys
    args: dict[str, Any] = {
        "scale_log2": problem.score_unit,
        "cap_log2": problem.softcap * LOG2_E,
        "num_seqs": problem.num_seqs,
        "num_tokens": problem.q.shape[0],
        "F": F,
    }
    if "claimed" not in work.sources:
        args["claimed"] = work.claimed
    if not F.bounds:
        args["window"] = window.size or 0
    if F.lead != "tensor":
        args["lead"] = window.global_tokens if F.lead else 0
    for name, x in (("q", problem.q), ("out", problem.out)):
        seq, token, head = _row_strides(problem, x)
        args |= {f"{name}_seq": seq, f"{name}_token": token, f"{name}_head": head}
    return args | (_paged_args(keys, F) if isinstance(keys, PagedKeys) else _dense_args(keys))


def shared_views(work: Work, F: Features) -> dict[str, torch.dtype]:
    """What kernels see 8-bit tensors as."""
    problem = work.problem
    views = {"q": kernel_dtype(problem.q.dtype)}
    if isinstance(problem.keys, PagedKeys):
        stored = problem.keys.cache.k.dtype
        views |= dict.fromkeys(("k", "v"), torch.int16 if F.pairs else kernel_dtype(stored))
    return views


def _row_strides(problem: Problem, x: Tensor) -> tuple[int, ...]:
    """Strides of q or out by sequence, by token of it, and by head."""
    if x.dim() == 4:
        return x.stride()[:3]
    row, head = x.stride()[:2]
    return (row, 0, head) if problem.cu_seqlens_q is None else (0, row, head)


def _paged_args(keys: PagedKeys, F: Features) -> dict[str, Any]:
    cache, table = keys.cache, keys.table
    args: dict[str, Any] = {
        "table_width": table.entries.shape[-1],
        "num_pages": cache.num_pages,
        "table_stride": _entries(table).stride(0),
    }
    for name, scale in (("ks", cache.k_scale), ("vs", cache.v_scale)):
        args |= _strides(f"{name}_page {name}_head {name}_token", token_strides(scale))
    return args | _kv_strides(*(tuple(s // F.unit for s in x.stride()[:3]) for x in (cache.k, cache.v)))


def _dense_args(keys: DenseKeys) -> dict[str, Any]:
    absent = "ks_page ks_head ks_token vs_page vs_head vs_token num_pages table_stride"
    # [Tk, Hkv, D] as one page that no table names; where a table has a width, this says how many keys there are.
    k, v = ((0, *x.stride()[1::-1]) for x in (keys.k, keys.v))
    return dict.fromkeys(absent.split(), 0) | {"table_width": keys.capacity} | _kv_strides(k, v)


def _kv_strides(k: tuple[int, ...], v: tuple[int, ...]) -> dict[str, int]:
    """K's and V's strides for the kernels that take both, and the one set that those over pages have."""
    both = _strides("k_page k_head k_token", k) | _strides("v_head v_token", v[1:])
    return both | _strides("kv_page kv_head_stride kv_token", k)


def _strides(names: str, strides: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(names.split(), strides, strict=True))


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Vectors of lengths and logits as kernels index them."""
    return x if x is None else x.contiguous()


def _entries(table: PageTable) -> Tensor:
    return table.entries if table.entries.stride(-1) == 1 else table.entries.contiguous()
