"""The tensors of a benchmark case, as swath takes them and in the layouts of its peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from swath import testing
from swath.bench.case import BenchCase
from swath.cache import PagedKeys, PagedKV
from swath.pages import PageTable, page_count


@dataclass(frozen=True, eq=False)
class Inputs:
    """One call. ``call`` is swath's own; the properties are what other libraries take, by their words."""

    case: BenchCase
    call: testing.Inputs

    @property
    def q(self) -> Tensor:
        """Query rows [T, Hq, D], those of a sequence after one another."""
        return self.call.q.flatten(0, -3)

    @property
    def q_steps(self) -> Tensor:
        """q as [B, S, Hq, D]: decode and n-step decode, where all sequences have as many query tokens."""
        return self.q.view(self.case.num_seqs, -1, *self.q.shape[1:])

    @cached_property
    def wide_q(self) -> Tensor:
        """bf16 rows that ``quantise_q`` makes fp8 queries under a static scale of again."""
        if self.call.q_scale is None or self.call.q_scale.dim():
            raise TypeError("the case has no static scale of queries")
        return (self.call.q.float() * self.call.q_scale).to(torch.bfloat16)

    @property
    def cache(self) -> PagedKV:
        """The keys of a paged case."""
        return self.call.cache

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """k and v [Tk, Hkv, D] of a dense case."""
        return self.call.dense

    @property
    def sink(self) -> Tensor | None:
        """Logits [Hq] in q's dtype."""
        return self.call.sink

    @property
    def max_q(self) -> int:
        """The longest query."""
        return max(self.case.row_counts)

    @property
    def max_kv(self) -> int:
        """The longest sequence of keys."""
        return max(self.case.kv_lens)

    @cached_property
    def seq_lens(self) -> Tensor:
        """Keys of each sequence, int32 [B]."""
        return int32(self.case.kv_lens, self.q.device)

    @cached_property
    def cu_q(self) -> Tensor:
        """Where the queries of each sequence begin, int32 [B + 1]."""
        return bounds_of(self.case.row_counts, self.q.device)

    @cached_property
    def cu_k(self) -> Tensor:
        """Where the keys of each sequence begin, laid end to end, int32 [B + 1]."""
        return bounds_of(self.case.kv_lens, self.q.device)

    @property
    def pages(self) -> Tensor:
        """The block table [B, max_pages] of a paged case; entries after a sequence's last page are 0."""
        if not isinstance(self.call.block_table, Tensor):
            raise TypeError("a dense case has no block table")
        return self.call.block_table

    @cached_property
    def nhd(self) -> tuple[Tensor, Tensor]:
        """Copies of the paged k and v as [num_pages, page_size, Hkv, D]: the native layout of most peers."""
        return self.cache.k.transpose(1, 2).contiguous(), self.cache.v.transpose(1, 2).contiguous()

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor]:
        """The keys of a paged case as they are stored, laid end to end: [Tk, Hkv, D]."""
        pages = [page_count(n, self.case.page_size) for n in self.case.kv_lens]
        found = []
        for x in self.nhd:
            rows = x.view(torch.uint8 if x.dtype.itemsize == 1 else x.dtype)  # torch indexes no fp8 everywhere
            of_each = [
                rows[self.pages[b, :count].long()].flatten(0, 1)[:n]
                for b, (n, count) in enumerate(zip(self.case.kv_lens, pages, strict=True))
            ]
            found.append(torch.cat(of_each).view(x.dtype))
        return found[0], found[1]

    @cached_property
    def flat_pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """The table as FlashInfer keeps it: page ids, their bounds [B + 1], and keys in each last page."""
        counts = [page_count(n, self.case.page_size) for n in self.case.kv_lens]
        rows = [self.pages[b, :count] for b, count in enumerate(counts)]
        return torch.cat(rows), bounds_of(counts, self.q.device), (self.seq_lens - 1) % self.case.page_size + 1

    def of_sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [Q, Hq, D], k and v [N, Hkv, D] of one sequence, dequantised into q's dtype, its keys gathered."""
        q = self.q[self.cu_q[b] : self.cu_q[b + 1]]
        if self.case.dense:
            k, v = (x[self.cu_k[b] : self.cu_k[b + 1]] for x in self.dense)
            return q, k, v
        keys = PagedKeys(self.cache, PageTable(self.pages), self.seq_lens).slice(b, 0, self.case.kv_lens[b])
        k, v = (x.transpose(0, 1) for x in keys.dequantised(q.dtype))
        return q, k, v

    @property
    def nbytes(self) -> int:
        """Memory that the keys and queries take."""
        keys = sum(x.nbytes for x in self.dense) if self.case.dense else self.cache.nbytes
        return keys + self.q.nbytes


def make_inputs(case: BenchCase, device: torch.device, seed: int = 0) -> Inputs:
    """The tensors of a case whose lengths are drawn; seeds differ in every value and page."""
    return Inputs(case, testing.make_filled(case, device, seed))


def bounds_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where sequences of these numbers of rows, laid end to end, begin and end: int32 [B + 1]."""
    return int32([0, *accumulate(counts)], device)


def int32(values: Sequence[int], device: torch.device) -> Tensor:
    """Host numbers as a tensor."""
    return torch.tensor(values, dtype=torch.int32, device=device)
