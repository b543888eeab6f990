"""Tensors for a ``Case`` that is timed, or only asked about, in the layout of ``making.py``.

Every key exists, and every entry of a table names a page, as no test has it: peers may read all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.pages import PageTable, page_count
from swath.quant import LARGEST
from swath.testing.cases import Case
from swath.testing.inputs import Inputs
from swath.testing.making import Maker, Random

_SPREAD = {torch.int8: 73.0, torch.float8_e4m3fn: 50.0, torch.float8_e5m2: 50.0}
"""The standard deviation of the bytes of a filled cache."""
MAX_UNSET_BYTES = 64 << 20
"""The pool of an unset case stays this small: nothing runs, so sequences may share pages."""


def make_filled(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of ``case`` for timing: normal q, k and v, int8 spread over its range; seeds differ in every value.

    fp8 queries have a scale where the case has one. The pages of the sequences fill the pool and are shuffled over it;
    entries after a sequence's last page are 0.
    """
    return _Filled(case, torch.device(device), seed).inputs()


def make_unset(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The tensors of ``case`` with contents that mean nothing. All entries of the table are page 0."""
    return _Unset(case, torch.device(device)).inputs()


class _Filled(Random):
    """Every slot holds a value."""

    def fill(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype, device=self.device, generator=self.generator)
        if dtype in LARGEST:
            return (_SPREAD[dtype] * self.normal(*shape, dtype=torch.bfloat16)).to(dtype)
        return self.normal(*shape, dtype=dtype)

    def scales(self, _granularity: str, shape: tuple[int, ...]) -> Tensor:
        return (self.uniform(0.5, 1.5, shape) / _SPREAD[self.case.storage.dtype]).to(self.case.scale_dtype)

    def q_scale(self) -> Tensor | None:
        case = self.case
        if case.q_scale == "none":
            return None
        return self.uniform(0.5, 1.5, case.q_shape[:-1] if case.q_scale == "token" else ()) / _SPREAD[case.dtype]

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device)

    def paged(self) -> tuple[PagedKV, Tensor | tuple[Tensor, Tensor] | PageTable]:
        lengths = self.case.kv_lens
        counts = [page_count(max(n, 0), self.case.page_size) for n in lengths]
        cache, total = self.pool(sum(counts)), sum(counts)
        pages = self.shuffled(total).split(counts)
        used = torch.arange(max(counts, default=0), device=self.device)
        rows = [self.row(n, used[: len(ids)], ids, total) for n, ids in zip(lengths, pages, strict=True)]
        return cache, self.table(rows, total)


class _Unset(Maker):
    """Nothing is written, and the pool is no larger than it must be."""

    def fill(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def scales(self, _granularity: str, shape: tuple[int, ...]) -> Tensor:
        return self.fill(shape, self.case.scale_dtype)

    def logits(self, dtype: torch.dtype) -> Tensor:
        return self.fill((self.case.num_q_heads,), dtype)

    def paged(self) -> tuple[PagedKV, Tensor | tuple[Tensor, Tensor] | PageTable]:
        case = self.case
        counts = [page_count(max(n, 0), case.page_size) for n in case.kv_lens]
        page_bytes = case.page_size * case.storage.bytes_per_token(case.num_kv_heads, case.head_dim, case.v_dim)
        num_pages = max(min(sum(counts), MAX_UNSET_BYTES // max(page_bytes, 1)), 1)
        table = torch.zeros(len(counts), max(counts, default=0), dtype=torch.int32, device=self.device)
        return self.pool(num_pages), table
