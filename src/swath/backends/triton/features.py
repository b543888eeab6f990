"""What kernels are compiled for: ``Features``, one constexpr, and how tensors look to a kernel that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swath.cache import DenseKeys, PagedKeys, PagedKV
from swath.checks import same_strides
from swath.problem import Problem
from swath.target import Target

STORED = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""Names of the 8-bit storage types in kernels; every other type is "unquantised"."""

FUSED = {"enable_fp_fusion": True}
"""Compiler option of every kernel: scales fold into multiply-adds, which Triton 3.10 will no longer fuse unasked."""


@dataclass(frozen=True)
class Features:
    """What a kernel is compiled for: one constexpr. Lengths, window sizes, batch and bounds are not in it."""

    head_dim: int  # of q and K
    v_head_dim: int  # of V and out
    kv_heads: int
    group: int
    v_parts: int = 1  # launches that share V's columns: each has ``v_head_dim`` of them
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
    v_strides: tuple[int, int, int] | None = None  # of pages, heads, slots, where V has others than K: see v_offset
    stored: str = "unquantised"  # or a name of ``STORED``
    pairs: bool = False  # 8-bit rows read as 16-bit units (NVIDIA)
    k_fold: str = "none"
    v_fold: str = "none"
    q_scale: str = ""  # "", "tensor" or "row"
    compute_int8: bool = False
    dots: str = ""  # of tiles over copied keys: the 8-bit type that queries and keys multiply in, if they do
    v_e4m3: bool = False  # of tiles over copied keys: p and V multiply in e4m3, V with its keys side by side
    fp32: bool = False  # IEEE dots in float32: of float32 queries, unless they multiply in int8
    pdl: bool = False  # the reduce is launched before the splits have ended
    interpret: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the cache holds 8-bit values."""
        return self.stored != "unquantised"

    @property
    def token_scales(self) -> bool:
        """Whether each key has a scale of its own, of K or of V."""
        return "token" in (self.k_fold, self.v_fold)

    @property
    def copied_k_fold(self) -> str:
        """The scales of K that a copy of 8-bit keys leaves to the scores: others are multiplied into it, or (for int8
        products) into the queries."""
        return self.k_fold if self.k_fold in ("tensor", "head") and self.dots != "int8" else "none"

    @property
    def copied_v_fold(self) -> str:
        """The same of V."""
        return "none" if self.v_fold == "token" else self.v_fold

    @property
    def row_scales(self) -> bool:
        """Whether tiles of 8-bit products have a score scale for each row, not one for all."""
        return self.dots == "int8" or (self.dots == "e4m3" and self.q_scale == "row")

    @property
    def unit(self) -> int:
        """Stored values that a kernel's pointer counts as one."""
        return 2 if self.pairs else 1

    @property
    def stored_dim(self) -> int:
        """Columns of a stored row of K in such units."""
        return self.head_dim // self.unit

    @property
    def stored_v_dim(self) -> int:
        """The same of V."""
        return self.v_head_dim // self.unit

    @property
    def block_d(self) -> int:
        """Columns of a tile of K's rows: the next power of two, at least what a dot takes."""
        return block_of(self.stored_dim, 32 if self.compute_int8 else 16)

    @property
    def block_dv(self) -> int:
        """The same of V's rows."""
        return block_of(self.stored_v_dim)

    @property
    def padded(self) -> bool:
        """Whether tiles have columns past the row, of K or of V."""
        return self.block_d != self.stored_dim or self.block_dv != self.stored_v_dim

    @property
    def unit_q(self) -> bool:
        """Whether query rows are divided by their largest magnitude: over 8-bit caches, unless dots are float32."""
        return self.quantised and not self.fp32


def block_of(columns: int, least: int = 16) -> int:
    """Columns of a tile that holds rows of ``columns`` elements: a power of two, at least ``least``."""
    return max(least, 1 << (columns - 1).bit_length())


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
        v_head_dim=problem.v_head_dim,
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
        v_strides=None if paged is None else own_strides(paged),
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
        v_head_dim=cache.v_head_dim,
        kv_heads=cache.num_kv_heads,
        group=1,
        page_size=cache.page_size,
        v_strides=own_strides(cache),
        stored=STORED.get(cache.k.dtype, "unquantised"),
        k_fold=cache.quant.k,
        v_fold=cache.quant.v_granularity,
    )


def own_strides(cache: PagedKV) -> tuple[int, int, int] | None:
    """V's strides of pages, heads and slots in elements, if they differ from K's where it matters."""
    v = cache.v
    return None if same_strides(cache.k, v) else (v.stride(0), v.stride(1), v.stride(2))


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
    pools = problem.keys.cache.k, problem.keys.cache.v
    return all(n % 2 == 0 for x in pools for n in (*x.stride()[:3], x.storage_offset()))
