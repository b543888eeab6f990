"""Tensors for a ``Case``: their layout, and what they hold in a test.

That is shuffled pages, hostile entries where pages are freed, and poison wherever nothing may be read. ``filling.py``
has other contents in the same layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.pages import PageTable, page_count
from swath.quant import LARGEST, quantise, spread, token_scale
from swath.testing.cases import Case
from swath.testing.inputs import Inputs
from swath.testing.oracle import inside, visible
from swath.window import LARGEST_SIZE

_HOSTILE = {torch.int32: (-1, 2**31 - 1, None, -(2**31)), torch.int64: (-1, 2**32, None, -(2**63), 2**63 - 1)}
"""Entries of freed pages, in turn; None stands for the first entry that names nothing. Of 2**32 half the bits are 0."""

_SPIKE_SCORE = 8.0
_SPIKE_VALUE = 4.0
_SPARE = 3
"""Pages, table entries and dense rows beyond those in use."""
_PAD = 16
"""Elements between rows of padded tensors: views stay aligned to 16 bytes."""


def make(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of ``case`` for a test, the same for the same device and seed.

    Only keys that some query sees, and spiked ones, exist. All other slots of the pool hold NaN (-128 in int8, whose
    token scales are NaN), as do pages that no sequence has, rows of q that no sequence owns, and the padding between
    rows. Pages without an existing key are freed: their entries in the table, and spare ones after them, are hostile.
    """
    return _Guarded(case, torch.device(device), seed).inputs()


def spike(k: Tensor, v: Tensor, rows: Sequence[int], direction: Tensor, scale: float) -> None:
    """Make the keys k[rows] of k [N, Hkv, D], v [N, Hkv, Dv] stand out for queries along ``direction`` [Hkv, D].

    Their score is about 8, some thousand times the weight of a random key, and their values are 4 in one element
    each, another one for each key: a query that loses or gains one of them shows it, and which.
    """
    k[rows] = direction * (_SPIKE_SCORE / (scale * direction.square().sum(-1, keepdim=True)))
    v[rows] = 0.0
    for i, row in enumerate(rows):
        v[row, :, i % v.shape[2]] = _SPIKE_VALUE


class Maker(ABC):
    """The layout of a case's tensors; what they hold is the subclass's."""

    spare = 0
    """Entries of a table beyond those in use."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device

    def inputs(self) -> Inputs:
        """All of them."""
        case = self.case
        keys: PagedKV | tuple[Tensor, Tensor]
        if case.dense:
            keys, table = self.dense(), None
        else:
            keys, table = self.paged()
        leading = case.global_tokens
        return Inputs(
            case=case,
            q=self.queries(),
            keys=keys,
            block_table=table,
            seq_lens=None if case.dense else self.ints(case.kv_lens),
            cu_seqlens_q=self.bounds(case.row_counts) if case.ragged else None,
            cu_seqlens_k=self.bounds([max(n, 0) for n in case.kv_lens]) if case.dense else None,
            q_start=None if case.q_start is None else self.ints(case.q_start),
            global_tokens=leading if isinstance(leading, int) else self.ints(leading),
            q_scale=self.q_scale(),
            sink=self.sink(),
            ranges=self.ranges(),
        )

    @abstractmethod
    def fill(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor of queries, keys or values."""

    @abstractmethod
    def scales(self, granularity: str, shape: tuple[int, ...]) -> Tensor:
        """A new scale of a cache."""

    @abstractmethod
    def logits(self, dtype: torch.dtype) -> Tensor:
        """A new sink."""

    @abstractmethod
    def paged(self) -> tuple[PagedKV, Tensor | tuple[Tensor, Tensor] | PageTable]:
        """The cache, and the table that finds each sequence's pages in it."""

    def q_scale(self) -> Tensor | None:
        """What multiplies q, if anything does."""
        return None

    def storage(self, shape: tuple[int, ...], dtype: torch.dtype, pad: bool = False) -> Tensor:
        """A new tensor of this shape; ``pad``: it lies in a wider buffer."""
        if not pad:
            return self.fill(shape, dtype)
        outer = (*shape[:-2], shape[-2] + 1, shape[-1] + _PAD)
        return self.fill(outer, dtype)[..., : shape[-2], : shape[-1]]

    def queries(self) -> Tensor:
        """q."""
        return self.storage(self.case.q_shape, self.case.dtype, self.case.strided)

    def sink(self) -> Tensor | None:
        """A logit for each query head, if the case has them."""
        case = self.case
        if case.sink == "none":
            return None
        return self.logits(torch.float32 if case.sink == "fp32" else case.out_dtype)

    def dense(self) -> tuple[Tensor, Tensor]:
        """k [Tk, Hkv, D] and v [Tk, Hkv, Dv], with spare rows at the end."""
        case = self.case
        rows, widths = sum(max(n, 0) for n in case.kv_lens) + self.spare, (case.head_dim, case.v_dim)
        k, v = (self.storage((rows, case.num_kv_heads, width), case.dtype, case.strided) for width in widths)
        return k, v

    def ints(self, values: Sequence[int]) -> Tensor:
        """Host numbers as a tensor."""
        return torch.tensor(values, dtype=self.case.index_dtype, device=self.device)

    def ranges(self) -> Tensor | None:
        """The bounds of each query row, if the case has them. Rows that no sequence owns would see every key."""
        case = self.case
        if not case.ranges:
            return None
        rows = [row for b in range(case.num_seqs) for row in case.ranges_of(b)]
        rows += [(0, LARGEST_SIZE)] * (case.tail if case.ragged else 0)
        return self.ints([end for row in rows for end in row]).view(*case.q_shape[:-2], 2)

    def bounds(self, counts: Sequence[int]) -> Tensor:
        """Where sequences of these numbers of rows, laid end to end, begin and end: [B + 1]."""
        return self.ints([0, *accumulate(counts)])

    def unused(self, count: int, _end: int) -> Tensor:
        """Entries of a table that are not in use; ``end`` is the first number after those that name something."""
        return self.ints([0] * count)

    @property
    def entries_a_page(self) -> int:
        """Entries that a table has for a page: one, or one for each token."""
        return self.case.page_size if self.case.unit == "token" else 1

    def row(self, kv_len: int, used: Tensor, ids: Tensor, num_pages: int) -> Tensor:
        """The entries of a sequence whose pages at ``used`` are ``ids``. Of tokens the first one of a page counts."""
        step = self.entries_a_page
        row = self.unused(page_count(max(kv_len, 0), self.case.page_size // step), num_pages * step)
        row[used * step] = (ids * step).to(row.dtype)
        return row

    def table(self, rows: list[Tensor], num_pages: int) -> Tensor | tuple[Tensor, Tensor] | PageTable:
        """A block table, in the form of the case, of the entries of each sequence."""
        case = self.case
        if case.table == "flat":
            flat = torch.cat([*rows, self.ints([])]), self.bounds([len(row) for row in rows])
            return flat if case.unit == "page" else PageTable(*flat, unit="token")
        width = max((len(row) for row in rows), default=0) + self.spare
        outer, height = width + (_PAD if case.strided else 0), len(rows) + (_SPARE if case.table == "rows" else 0)
        table = self.unused(height * outer, num_pages * self.entries_a_page).view(height, outer)[:, :width]
        places = range(height)[::-1][: len(rows)] if case.table == "rows" else range(height)
        for place, row in zip(places, rows, strict=True):
            table[place, : len(row)] = row
        if case.table == "rectangular" and case.unit == "page":
            return table
        return PageTable(table, rows=self.ints(places) if case.table == "rows" else None, unit=case.unit)

    def pool(self, num_pages: int) -> PagedKV:
        """A cache as the case lays it out."""
        case, stored = self.case, self.case.storage
        heads, size, dims = case.num_kv_heads, case.page_size, (case.head_dim, case.v_dim)
        k_scale, v_scale = map(self.scale_of, (stored.k, stored.v_granularity), (num_pages,) * 2, dims)
        by_token = case.layout in ("nhd", "packed")
        shape = (num_pages, size, heads) if by_token else (num_pages, heads, size)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        if case.layout.startswith("packed"):
            kv = self.storage((*shape, sum(dims)), stored.dtype)
            return PagedKV.from_packed(kv, layout="nhd" if by_token else "hnd", v_head_dim=case.v_head_dim, **scales)
        k, v = (self.storage((*shape, dim), stored.dtype, case.layout == "padded") for dim in dims)
        if case.layout == "apart":
            v = self.storage((num_pages, size, heads, dims[1]), stored.dtype, True).transpose(1, 2)
        return (PagedKV.from_nhd if by_token else PagedKV)(k, v, **scales)

    def scale_of(self, granularity: str, num_pages: int, head_dim: int) -> Tensor | None:
        """A scale of K or V; those of tokens are laid out as the keys are."""
        case = self.case
        heads, size = case.num_kv_heads, case.page_size
        by_slot = (num_pages, size, heads) if case.layout in ("nhd", "packed") else (num_pages, heads, size)
        shapes = {"tensor": (), "head": (heads,), "channel": (heads, head_dim), "token": by_slot}
        return None if granularity == "none" else self.scales(granularity, shapes[granularity])


class Random(Maker):
    """A case's random numbers."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        super().__init__(case, device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of mean 0 and variance 1."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, low: float, high: float, shape: Sequence[int]) -> Tensor:
        """Between two numbers."""
        return low + (high - low) * torch.rand(tuple(shape), generator=self.generator, device=self.device)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """Of mean 0 and variance 1."""
        return self.normal(self.case.num_q_heads).to(dtype)

    def shuffled(self, count: int) -> Tensor:
        """The numbers of ``count`` pages. On a GPU they are drawn on the host, the same for every seed."""
        generator = self.generator if self.device.type == "cpu" else torch.Generator().manual_seed(0)
        return torch.randperm(count, generator=generator).to(self.device)


class _Guarded(Random):
    """Poison everywhere, and then the keys that exist."""

    spare = _SPARE

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        super().__init__(case, device, seed)
        self.direction = self.normal(case.num_kv_heads, case.head_dim)
        shapes: dict[str, tuple[int, ...]] = {"tensor": (), "token": case.q_shape[:-1]}
        # Of at least 0.015, so that no normal number over it is beyond 448, where e4m3 has only NaN.
        self.q_unit = self.uniform(0.015, 0.03, shapes[case.q_scale]) if case.q_scale != "none" else None
        self.live = [self.existing(b) for b in range(case.num_seqs)]

    def fill(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What must never be read: NaN, or -128 in int8, which no symmetric quantiser writes."""
        return torch.full(shape, -128 if dtype == torch.int8 else torch.nan, dtype=dtype, device=self.device)

    def scales(self, granularity: str, shape: tuple[int, ...]) -> Tensor:
        """A random static scale that suits normal keys, or token scales of NaN."""
        case = self.case
        if granularity == "token":
            return self.storage(shape, case.scale_dtype, case.layout == "padded")
        return (self.uniform(0.7, 3.0, shape) * 5 / LARGEST[case.storage.dtype]).to(case.scale_dtype)

    def unused(self, count: int, end: int) -> Tensor:
        """Entries that name no page."""
        kinds = [end if entry is None else entry for entry in _HOSTILE[self.case.index_dtype]]
        return self.ints([kinds[i % len(kinds)] for i in range(count)])

    def q_scale(self) -> Tensor | None:
        return self.q_unit

    def existing(self, b: int) -> Tensor:
        """Positions of the keys of sequence ``b`` that some query sees, and of its spikes."""
        case = self.case
        q_pos = torch.arange(case.row_counts[b], device=self.device) + case.first_position(b)
        k_pos = torch.arange(max(case.kv_lens[b], 0), device=self.device)
        if case.ranges:
            ranges = torch.tensor(case.ranges_of(b), device=self.device).view(-1, 2)
            seen = inside(ranges, k_pos, case.leading(b)).any(0)
        else:
            seen = visible(q_pos, k_pos, case.size, case.leading(b), case.causal).any(0)
        if case.spiked:
            seen[case.edges(b)] = True
        return torch.nonzero(seen).flatten()

    def queries(self) -> Tensor:
        case = self.case
        x = self.normal(*case.q_shape)
        if case.spiked:
            interleaved = case.gqa == "interleaved"
            along = (
                self.direction.repeat(case.group, 1) if interleaved else self.direction.repeat_interleave(case.group, 0)
            )
            x = along + 0.25 * x
        if self.q_unit is not None:
            x = x / (self.q_unit[..., None] if self.q_unit.dim() else self.q_unit)
        q = super().queries()
        owned = sum(case.row_counts) if case.ragged else case.num_seqs
        q[:owned] = x[:owned].to(case.dtype)
        return q

    def keys(self, b: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Values of k [N, Hkv, D] and v [N, Hkv, Dv] at these positions, fp32."""
        case = self.case
        shape = (positions.shape[0], case.num_kv_heads)
        k, v = self.normal(*shape, case.head_dim), self.normal(*shape, case.v_dim)
        if case.spiked:
            spikes = torch.isin(positions, torch.tensor(case.edges(b), device=self.device))
            spike(k, v, torch.nonzero(spikes).flatten().tolist(), self.direction, case.score_scale)
        return k, v

    def dense(self) -> tuple[Tensor, Tensor]:
        case = self.case
        first = [0, *accumulate(max(n, 0) for n in case.kv_lens)]
        k, v = super().dense()
        for b, positions in enumerate(self.live):
            new_k, new_v = self.keys(b, positions)
            k[first[b] + positions], v[first[b] + positions] = new_k.to(case.dtype), new_v.to(case.dtype)
        return k, v

    def paged(self) -> tuple[PagedKV, Tensor | tuple[Tensor, Tensor] | PageTable]:
        case, size, live = self.case, self.case.page_size, self.live
        used = [torch.unique(positions // size) for positions in live]
        if case.holes:
            used = [pages[torch.arange(len(pages)) != len(pages) // 2] if len(pages) > 1 else pages for pages in used]
        counts = [len(pages) for pages in used]
        num_pages = sum(counts) + self.spare
        pool = self.shuffled(num_pages)[: sum(counts)]
        cache = self.pool(num_pages)
        rows = []
        for b, ids in enumerate(pool.split(counts)):
            rows.append(self.row(case.kv_lens[b], used[b], ids, num_pages))
            positions = live[b][torch.isin(live[b] // size, used[b])]
            page = ids[torch.searchsorted(used[b], positions // size)]
            self.write(cache, page, positions % size, *self.keys(b, positions))
        return cache, self.table(rows, num_pages)

    def write(self, cache: PagedKV, page: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k [N, Hkv, D] and v [N, Hkv, Dv] in their slots, quantised as the cache is."""
        stored = self.case.storage
        for x, pool, scale, granularity in (
            (k, cache.k, cache.k_scale, stored.k),
            (v, cache.v, cache.v_scale, stored.v_granularity),
        ):
            if granularity == "token" and scale is not None:
                scale[page, :, slot] = token_scale(x, stored.dtype).to(scale.dtype)
                scale = scale[page, :, slot].mT
            pool[page, :, slot] = quantise(x.transpose(0, 1), spread(granularity, scale), stored.dtype).transpose(0, 1)
