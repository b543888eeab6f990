"""What kernels are compiled for: ``Features``, one constexpr, and how tensors look to a kernel that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swath.cache import DenseKeys, PagedKeys, PagedKV
from swath.problem import Problem
from swath.target import Target

STORED = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""Names of the 8-bit storage types in kernels; every other type is "unquantised"."""

FUSED = {"enable_fp_fusion": True}
"""Compiler option of every kernel: scales fold into multiply-adds, which Triton 3.10 will no longer fuse unasked."""


@dataclass(frozen=True)
class Features:
    """What a kernel is compiled for: one constexpr. Lengths, window sizes, batch and bounds are not in it."""

    head_dim: int
    kv_heads: int
    group: int
    causal: bool = True
    window: bool = False
    bounds: bool = False  # each row's window is loaded, not computed
    lead: str = ""  # leading tokens (global_tokens): "", "count" or "tensor"
    softcap: bool = False
    interleaved: bool = False
    page_size: int = 0  # 0: dense keys
    table: str = ""  # "", "rows" or "flat"
    table_rows: int = 0  # of a table in which sequences name their rows: engines keep one, of one height
    token_table: bool = False  # a slot for each position
    stored: str = "unquantised"  # or a name of ``STORED``
    pairs: bool = False  # 8-bit rows read as 16-bit units (NVIDIA)
    k_fold: str = "none"
    v_fold: str = "none"
    q_scale: str = ""  # "", "tensor" or "row"
    compute_int8: bool = False
    fp32: bool = False  # IEEE dots in float32: of float32 queries, unless they multiply in int8
    pdl: bool = False  # the reduce is launched before the splits have ended
    interpret: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the cache holds 8-bit values."""
        return self.stored != "unquantised"

    @property
    def stored_dim(self) -> int:
        """Columns of a stored row in units of the pointer that kernels see."""
        return self.head_dim // 2 if self.pairs else self.head_dim

    @property
    def block_d(self) -> int:
        """Columns of a tile of such rows: the next power of two, at least what a dot takes."""
        return max(16, 1 << (self.stored_dim - 1).bit_length())

    @property
    def padded(self) -> bool:
        """Whether tiles have columns past the row."""
        return self.block_d != self.stored_dim

    @property
    def unit_q(self) -> bool:
        """Whether query rows are divided by their largest magnitude: over 8-bit caches, unless dots are float32."""
        return self.quantised and not self.fp32


def features_of(problem: Problem, target: Target) -> Features:
    """The features of a call on a target."""
    window, keys = problem.window, problem.keys
    lead = ""
    if not window.is_unbounded and not (isinstance(window.global_tokens, int) and window.global_tokens == 0):
        lead = "count" if isinstance(window.global_tokens, int) else "tensor"
    paged = keys.cache if isinstance(keys, PagedKeys) else None
    stored = "unquantised" if paged is None else STORED.get(paged.k.dtype, "unquantised")
    int8 = problem.compute == "int8"
    fp32 = problem.q.dtype == torch.float32 and not int8
    return Features(
        head_dim=problem.head_dim,
        kv_heads=keys.num_kv_heads,
        group=problem.group,
        causal=window.causal,
        window=not window.is_unbounded,
        bounds=window.bounds is not None,
        lead=lead,
        softcap=problem.softcap > 0,
        interleaved=problem.interleaved,
        page_size=0 if paged is None else paged.page_size,
        **_table_features(keys),
        stored=stored,
        pairs=stored != "unquantised"
        and target.has_pairs(stored)
        and not (fp32 or int8)
        and _viewable_as_pairs(problem),
        k_fold="none" if paged is None else paged.quant.k,
        v_fold="none" if paged is None else paged.quant.v_granularity,
        q_scale="" if problem.q_scale is None else "row" if problem.q_scale.dim() else "tensor",
        compute_int8=int8,
        fp32=fp32,
        pdl=target.has_pdl,
        interpret=target.interpret,
    )


def _table_features(keys: DenseKeys | PagedKeys) -> dict[str, Any]:
    if not isinstance(keys, PagedKeys):
        return {}
    table = keys.table
    form = {"token_table": table.unit == "token"}
    if table.rows is not None:
        return form | {"table": "rows", "table_rows": table.entries.shape[0]}
    return form | {"table": "" if table.indptr is None else "flat"}


def cache_features(cache: PagedKV) -> Features:
    """The features of a kernel that only knows a cache: append."""
    return Features(
        head_dim=cache.head_dim,
        kv_heads=cache.num_kv_heads,
        group=1,
        page_size=cache.page_size,
        stored=STORED.get(cache.k.dtype, "unquantised"),
        k_fold=cache.quant.k,
        v_fold=cache.quant.v_granularity,
    )


def token_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides of a token scale; zeros for the other granularities, whose scales kernels take contiguous."""
    return tuple(scale.stride()) if scale is not None and scale.dim() == 3 else (0, 0, 0)


def kernel_scale(scale: Tensor | None) -> Tensor | None:
    """A scale as kernels take it: token scales with any strides, the small static ones contiguous."""
    return scale if scale is None or scale.dim() == 3 else scale.contiguous()


def kernel_dtype(stored: torch.dtype) -> torch.dtype:
    """What kernels see stored tensors as: fp8 as bytes, which every target can load."""
    return torch.uint8 if stored in STORED and stored != torch.int8 else stored


def _viewable_as_pairs(problem: Problem) -> bool:
    """Rows must start at even elements to be read as 16-bit units."""
    if not isinstance(problem.keys, PagedKeys):
        return False
    k, v = problem.keys.cache.k, problem.keys.cache.v
    return all(s % 2 == 0 for s in k.stride()[:3]) and k.storage_offset() % 2 == 0 and v.storage_offset() % 2 == 0
