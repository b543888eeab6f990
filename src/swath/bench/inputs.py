"""Random tensors for a case, in the layouts that swath and its peers take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from swath.bench.case import DTYPES, BenchCase, Lengths
from swath.cache import PagedKeys, PagedKV
from swath.pages import PageTable
from swath.quant import LARGEST
from swath.testing.inputs import OfEitherKeys
from swath.window import Window


@dataclass(frozen=True, eq=False)
class Inputs(OfEitherKeys):
    """The tensors of one call: q [T, Hq, D]; a cache with ``table`` [B, max_pages], or dense k, v [Tk, Hkv, D].

    The pages of the sequences are shuffled over the pool; entries of ``table`` after a sequence's last page are 0.
    """

    case: BenchCase
    lengths: Lengths
    q: Tensor
    seq_lens: Tensor
    cu_q: Tensor
    cu_k: Tensor
    sink: Tensor | None
    keys: PagedKV | tuple[Tensor, Tensor]
    table: Tensor | None

    @property
    def window(self) -> Window:
        """Who sees whom."""
        return self.case.visible

    @property
    def max_q(self) -> int:
        """The longest query."""
        return max(self.lengths.q)

    @property
    def max_kv(self) -> int:
        """The longest sequence of keys."""
        return max(self.lengths.kv)

    @property
    def q_steps(self) -> Tensor:
        """q as [B, S, Hq, D]: decode and n-step decode, where all sequences have as many query tokens."""
        return self.q.view(len(self.lengths.q), -1, *self.q.shape[1:])

    @property
    def pages(self) -> Tensor:
        """The block table of a paged case."""
        if self.table is None:
            raise TypeError("a dense case has no block table")
        return self.table

    @cached_property
    def nhd(self) -> tuple[Tensor, Tensor]:
        """Copies of the paged k and v as [num_pages, page_size, Hkv, D]: the native layout of most peers."""
        return self.cache.k.transpose(1, 2).contiguous(), self.cache.v.transpose(1, 2).contiguous()

    @cached_property
    def flat_pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """The table as FlashInfer keeps it: page ids, their bounds [B + 1], and keys in each last page."""
        counts = self.lengths.pages(self.case.page_size)
        rows = [self.pages[b, :count] for b, count in enumerate(counts)]
        return torch.cat(rows), bounds_of(counts, self.q.device), (self.seq_lens - 1) % self.case.page_size + 1

    def of_sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [Q, Hq, D], k and v [N, Hkv, D] of one sequence, dequantised into q's dtype, its keys gathered."""
        q = self.q[self.cu_q[b] : self.cu_q[b + 1]]
        if not isinstance(self.keys, PagedKV):
            k, v = (x[self.cu_k[b] : self.cu_k[b + 1]] for x in self.keys)
            return q, k, v
        keys = PagedKeys(self.cache, PageTable(self.pages), self.seq_lens).slice(b, 0, self.lengths.kv[b])
        k, v = (x.transpose(0, 1) for x in keys.dequantised(q.dtype))
        return q, k, v

    @property
    def nbytes(self) -> int:
        """Memory that the keys and queries take."""
        keys = self.keys.nbytes if isinstance(self.keys, PagedKV) else sum(x.nbytes for x in self.keys)
        return keys + self.q.nbytes


def make_inputs(case: BenchCase, lengths: Lengths, device: torch.device, seed: int = 0) -> Inputs:
    """Normal q, k, v (bytes spread over the range of int8); seeds differ in every value and page."""
    torch.manual_seed(seed)
    dtype = DTYPES[case.dtype]
    q = torch.randn(sum(lengths.q), case.heads, case.head_dim, dtype=dtype, device=device)
    sink = torch.randn(case.heads, dtype=dtype, device=device) if case.sink else None
    cu_q, cu_k = (bounds_of(n, device) for n in (lengths.q, lengths.kv))
    common = (case, lengths, q, _int32(lengths.kv, device), cu_q, cu_k, sink)
    if case.page_size == 0:
        shape = (sum(lengths.kv), case.kv_heads, case.head_dim)
        k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        return Inputs(*common, (k, v), None)
    counts = lengths.pages(case.page_size)
    shuffled = torch.randperm(sum(counts), device=device).int().split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(shuffled), batch_first=True)
    return Inputs(*common, _cache(case, sum(counts), device), table)


def bounds_of(counts: Iterable[int], device: torch.device) -> Tensor:
    """Where sequences of so many rows, laid end to end, begin and end: int32 [B + 1]."""
    return _int32([0, *accumulate(counts)], device)


def _cache(case: BenchCase, num_pages: int, device: torch.device) -> PagedKV:
    shape, quant = (num_pages, case.kv_heads, case.page_size, case.head_dim), case.quant
    k, v = (_values(shape, quant.dtype, device) for _ in range(2))
    if not quant.is_quantised:
        return PagedKV(k, v)
    scale_shapes = {"tensor": (), "head": shape[1:2], "channel": (shape[1], shape[3]), "token": shape[:3]}
    unit = 73.0 if quant.dtype == torch.int8 else 50.0  # of values spread as below: about 1
    k_scale, v_scale = ((torch.rand(scale_shapes[quant.k], device=device) + 0.5) / unit for _ in range(2))
    return PagedKV(k, v, k_scale=k_scale, v_scale=v_scale)


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    if dtype in LARGEST:
        return (50 * torch.randn(shape, dtype=torch.bfloat16, device=device)).to(dtype)
    return torch.randn(shape, dtype=dtype, device=device)


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
