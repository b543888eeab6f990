"""Prefill over 8-bit caches: when visible pages are copied into 16-bit scratch first, and for how many sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swath.backends.triton.features import STORED
from swath.backends.triton.heuristics.splits import MAX_STEPS
from swath.cache import PagedKeys
from swath.pages import page_count
from swath.problem import Problem

SCRATCH_BYTES = 512 << 20
"""Most that a call may take to hold dequantised pages."""
DEQUANTISE_ROWS = 512
"""Query rows (tokens x group) from which copying a page once costs less than decoding it in every tile that reads it.
Measured on an H200: 2,048 tokens over 16,384 int8 keys took 8.5 ms (channel) and 13 ms (token) decoding in the tiles,
where 16-bit tiles took 6.1."""


@dataclass(frozen=True)
class CopyTypes:
    """What visible pages are copied as for tiles.

    dots: the 8-bit type that K keeps, in which it multiplies with queries; "" for 16 bits.
    v_e4m3: V, in e4m3, stays so, its keys side by side, and multiplies so; else it has 16 bits.
    k_stays: K, which multiplies as it is stored, is not copied: tiles read it in the cache, by the cache's own table.
    """

    dots: str = ""
    v_e4m3: bool = False
    k_stays: bool = False

    @property
    def k_bytes(self) -> int:
        """Of an element of K's copy."""
        return 0 if self.k_stays else 1 if self.dots else 2

    @property
    def v_bytes(self) -> int:
        """Of an element of V's copy."""
        return 1 if self.v_e4m3 else 2


def copies(problem: Problem) -> CopyTypes | None:
    """What the visible pages of an 8-bit cache are copied as for Triton's tiles: 16 bits, or nothing."""
    wide = problem.q.dtype in (torch.bfloat16, torch.float16)
    return CopyTypes() if wide and problem.compute != "int8" and copy_pays(problem) else None


def copy_pays(problem: Problem, types: CopyTypes = CopyTypes()) -> bool:
    """Whether a call is a prefill over an 8-bit cache that is long enough for a copy of visible pages to pay."""
    keys = problem.keys
    if not isinstance(keys, PagedKeys) or keys.cache.k.dtype not in STORED or problem.split_size is not None:
        return False  # with split_size no bit may depend on how large the batch is
    return problem.max_q_len * problem.group >= DEQUANTISE_ROWS and scratch_rows(problem, keys, types) > 0


def most_unclaimed(problem: Problem) -> int:
    """How many sequences splits may leave to tiles: in a ragged batch these have more than MAX_STEPS query tokens."""
    if problem.cu_seqlens_q is None:
        return problem.num_seqs
    return min(problem.num_seqs, problem.q.shape[0] // (MAX_STEPS + 1))


def table_pages(problem: Problem, keys: PagedKeys) -> int:
    """Pages that a sequence may have."""
    return page_count(problem.max_kv_len, keys.cache.page_size)


def scratch_pages(problem: Problem, keys: PagedKeys) -> int:
    """Pages of scratch for a sequence: as many as its queries may see together."""
    visible = problem.window.visible_bound(problem.max_q_len, problem.max_kv_len)
    # Up to three pages are seen in part: the last of the leading keys, the first and the last of the others.
    return min(page_count(visible, keys.cache.page_size) + 2, table_pages(problem, keys))


def scratch_rows(problem: Problem, keys: PagedKeys, types: CopyTypes = CopyTypes()) -> int:
    """How many sequences have room in the scratch, table included: all that may need it, or as many as fit.

    In a mixed batch each sequence may be a chunk, as far as the host knows; the device gives rows to those that are.
    """
    row = row_bytes(problem, keys, types)
    table = problem.num_seqs * table_pages(problem, keys) * torch.int32.itemsize
    return min(most_unclaimed(problem), max(SCRATCH_BYTES - table, 0) // row) if row else 0


def row_bytes(problem: Problem, keys: PagedKeys, types: CopyTypes) -> int:
    """Of the scratch for one sequence."""
    slot = keys.num_kv_heads * (problem.head_dim * types.k_bytes + problem.v_head_dim * types.v_bytes)
    return scratch_pages(problem, keys) * keys.cache.page_size * slot
