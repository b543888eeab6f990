"""Tensors for a ``Case``: shuffled pages, hostile entries where pages are freed, poison wherever nobody may look."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.pages import PageTable, page_count
from swath.quant import LARGEST, quantise, spread, token_scale
from swath.testing.cases import Case
from swath.testing.inputs import Inputs
from swath.testing.oracle import visible

_HOSTILE = {torch.int32: (-1, 2**31 - 1, None, -(2**31)), torch.int64: (-1, 2**32, None, -(2**63), 2**63 - 1)}
"""Entries of freed pages, in turn; None stands for the first entry that names nothing. Of 2**32 half the bits are 0."""

_SPIKE_SCORE = 8.0
_SPIKE_VALUE = 4.0
_SPARE = 3
"""Pages, table entries and dense rows beyond those in use."""
_PAD = 16
"""Elements between rows of padded tensors: views stay aligned to 16 bytes."""


def make(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The tensors of ``case``, the same for the same device and seed.

    Only keys that some query sees, and spiked ones, exist. All other slots of the pool hold NaN (-128 in int8, whose
    token scales are NaN), as do pages that no sequence has, rows of q that no sequence owns, and the padding between
    rows. Pages without an existing key are freed: their entries in the table, and spare ones after them, are hostile.
    """
    maker = _Maker(case, torch.device(device), seed)
    live = [maker.existing(b) for b in range(case.num_seqs)]
    keys: PagedKV | tuple[Tensor, Tensor]
    if case.dense:
        keys, table = maker.dense(live), None
    else:
        keys, table = maker.paged(live)
    bounds = [0, *accumulate(case.row_counts)]
    key_bounds = [0, *accumulate(max(n, 0) for n in case.kv_lens)]
    leading = case.global_tokens
    return Inputs(
        case=case,
        q=maker.queries(),
        keys=keys,
        block_table=table,
        seq_lens=None if case.dense else maker.ints(case.kv_lens),
        cu_seqlens_q=maker.ints(bounds) if case.ragged else None,
        cu_seqlens_k=maker.ints(key_bounds) if case.dense else None,
        q_start=None if case.q_start is None else maker.ints(case.q_start),
        global_tokens=leading if isinstance(leading, int) else maker.ints(leading),
        q_scale=maker.q_unit,
        sink=maker.sink(),
    )


def spike(k: Tensor, v: Tensor, rows: Sequence[int], direction: Tensor, scale: float) -> None:
    """Make the keys k[rows] of k, v [N, Hkv, D] stand out for queries along ``direction`` [Hkv, D].

    Their score is about 8, some thousand times the weight of a random key, and their values are 4 in one element
    each, another one for each key: a query that loses or gains one of them shows it, and which.
    """
    k[rows] = direction * (_SPIKE_SCORE / (scale * direction.square().sum(-1, keepdim=True)))
    v[rows] = 0.0
    for i, row in enumerate(rows):
        v[row, :, i % v.shape[2]] = _SPIKE_VALUE


class _Maker:
    """One case's random numbers, and the pieces made of them."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.direction = self.normal(case.num_kv_heads, case.head_dim)
        shapes = {"none": None, "tensor": (), "token": case.q_shape[:-1]}
        # Of at least 0.015, so that no normal number over it is beyond 448, where e4m3 has only NaN.
        self.q_unit = self.uniform(0.015, 0.03, shapes[case.q_scale])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, shape: Sequence[int] | None) -> Tensor | None:
        if shape is None:
            return None
        return low + (high - low) * torch.rand(tuple(shape), generator=self.generator, device=self.device)

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=self.case.index_dtype, device=self.device)

    def poison(self, shape: Sequence[int], dtype: torch.dtype, pad: bool = False) -> Tensor:
        """What must never be read: NaN, or -128 in int8, which no symmetric quantiser writes."""
        outer = (*shape[:-2], shape[-2] + 1, shape[-1] + _PAD) if pad else tuple(shape)
        filled = torch.full(outer, -128 if dtype == torch.int8 else torch.nan, dtype=dtype, device=self.device)
        return filled[..., : shape[-2], : shape[-1]]

    def existing(self, b: int) -> Tensor:
        """Positions of the keys of sequence ``b`` that some query sees, and of its spikes."""
        case = self.case
        q_pos = torch.arange(case.row_counts[b], device=self.device) + case.first_position(b)
        k_pos = torch.arange(max(case.kv_lens[b], 0), device=self.device)
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
        q = self.poison(case.q_shape, case.dtype, case.strided)
        owned = sum(case.row_counts) if case.ragged else case.num_seqs
        q[:owned] = x[:owned].to(case.dtype)
        return q

    def sink(self) -> Tensor | None:
        case = self.case
        if case.sink == "none":
            return None
        return self.normal(case.num_q_heads).to(torch.float32 if case.sink == "fp32" else case.out_dtype)

    def keys(self, b: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Values of k and v [N, Hkv, D] at these positions, fp32."""
        case = self.case
        shape = (positions.shape[0], case.num_kv_heads, case.head_dim)
        k, v = self.normal(*shape), self.normal(*shape)
        if case.spiked:
            spikes = torch.isin(positions, torch.tensor(case.edges(b), device=self.device))
            spike(k, v, torch.nonzero(spikes).flatten().tolist(), self.direction, case.score_scale)
        return k, v

    def dense(self, live: list[Tensor]) -> tuple[Tensor, Tensor]:
        """k and v [Tk, Hkv, D], with spare rows at the end."""
        case = self.case
        first = [0, *accumulate(max(n, 0) for n in case.kv_lens)]
        shape = (first[-1] + _SPARE, case.num_kv_heads, case.head_dim)
        k, v = (self.poison(shape, case.dtype, case.strided) for _ in range(2))
        for b, positions in enumerate(live):
            new_k, new_v = self.keys(b, positions)
            k[first[b] + positions], v[first[b] + positions] = new_k.to(case.dtype), new_v.to(case.dtype)
        return k, v

    def paged(self, live: list[Tensor]) -> tuple[PagedKV, Tensor | tuple[Tensor, Tensor] | PageTable]:
        """A cache with the keys at the positions ``live`` of each sequence, and the table that finds them."""
        case, size = self.case, self.case.page_size
        used = [torch.unique(positions // size) for positions in live]
        if case.holes:
            used = [pages[torch.arange(len(pages)) != len(pages) // 2] if len(pages) > 1 else pages for pages in used]
        counts = [len(pages) for pages in used]
        num_pages = sum(counts) + _SPARE
        generator = self.generator if self.device.type == "cpu" else torch.Generator().manual_seed(0)
        pool = torch.randperm(num_pages, generator=generator)[: sum(counts)].to(self.device)
        cache = self.pool(num_pages)
        step = size if case.unit == "token" else 1  # entries a page
        rows = []
        for b, ids in enumerate(pool.split(counts)):
            kv_len = max(case.kv_lens[b], 0)
            row = self.hostile(page_count(kv_len, size // step), num_pages * step)
            row[used[b] * step] = (ids * step).to(row.dtype)
            positions = live[b][torch.isin(live[b] // size, used[b])]
            page = row[positions // size * step].long() // step
            self.write(cache, page, positions % size, *self.keys(b, positions))
            rows.append(row)
        return cache, self.table(rows, num_pages * step)

    def hostile(self, count: int, end: int) -> Tensor:
        """Entries that name no page; ``end`` is the first one after those that do."""
        kinds = [end if entry is None else entry for entry in _HOSTILE[self.case.index_dtype]]
        return self.ints([kinds[i % len(kinds)] for i in range(count)])

    def table(self, rows: list[Tensor], end: int) -> Tensor | tuple[Tensor, Tensor] | PageTable:
        case = self.case
        if case.table == "flat":
            ids = torch.cat([*rows, self.ints([])])
            indptr = self.ints([0, *accumulate(len(row) for row in rows)])
            return (ids, indptr) if case.unit == "page" else PageTable(ids, indptr, unit="token")
        width = max((len(row) for row in rows), default=0) + _SPARE
        outer, height = width + (_PAD if case.strided else 0), len(rows) + (_SPARE if case.table == "rows" else 0)
        table = self.hostile(height * outer, end).view(height, outer)[:, :width]
        places = list(range(height))[::-1][: len(rows)] if case.table == "rows" else list(range(height))
        for place, row in zip(places, rows, strict=True):
            table[place, : len(row)] = row
        if case.table == "rectangular" and case.unit == "page":
            return table
        return PageTable(table, rows=self.ints(places) if case.table == "rows" else None, unit=case.unit)

    def pool(self, num_pages: int) -> PagedKV:
        """A cache of nothing but poison, with its static scales."""
        case, stored = self.case, self.case.storage
        heads, size, dim = case.num_kv_heads, case.page_size, case.head_dim
        k_scale, v_scale = (self.scale_of(g, num_pages) for g in (stored.k, stored.v_granularity))
        by_token = case.layout in ("nhd", "packed")
        shape = (num_pages, size, heads, dim) if by_token else (num_pages, heads, size, dim)
        if case.layout.startswith("packed"):
            kv = self.poison((*shape[:3], 2 * dim), stored.dtype)
            return PagedKV.from_packed(kv, layout="nhd" if by_token else "hnd", k_scale=k_scale, v_scale=v_scale)
        k, v = (self.poison(shape, stored.dtype, case.layout == "padded") for _ in range(2))
        return (PagedKV.from_nhd if by_token else PagedKV)(k, v, k_scale=k_scale, v_scale=v_scale)

    def scale_of(self, granularity: str, num_pages: int) -> Tensor | None:
        """A random static scale that suits normal keys, or token scales of NaN, laid out as the case says."""
        case = self.case
        if granularity == "none":
            return None
        if granularity == "token":
            by_token = (num_pages, case.page_size, case.num_kv_heads)
            by_head = (num_pages, case.num_kv_heads, case.page_size)
            nhd = case.layout in ("nhd", "packed")
            return self.poison(by_token if nhd else by_head, case.scale_dtype, case.layout == "padded")
        shapes = {"tensor": (), "head": (case.num_kv_heads,), "channel": (case.num_kv_heads, case.head_dim)}
        spread_out = self.uniform(0.7, 3.0, shapes[granularity])
        return None if spread_out is None else (spread_out * 5 / LARGEST[case.storage.dtype]).to(case.scale_dtype)

    def write(self, cache: PagedKV, page: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [N, Hkv, D] in their slots, quantised as the cache is."""
        stored = self.case.storage
        for x, pool, scale, granularity in (
            (k, cache.k, cache.k_scale, stored.k),
            (v, cache.v, cache.v_scale, stored.v_granularity),
        ):
            if granularity == "token" and scale is not None:
                scale[page, :, slot] = token_scale(x, stored.dtype).to(scale.dtype)
                scale = scale[page, :, slot].mT
            pool[page, :, slot] = quantise(x.transpose(0, 1), spread(granularity, scale), stored.dtype).transpose(0, 1)
