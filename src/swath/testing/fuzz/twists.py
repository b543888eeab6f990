"""What is done to the tensors of a call once ``make`` has made them: hostile tables, aliases, odd addresses, strides.

A twist changes tensors, and the truth is computed from the changed ones: it may do anything that the contract allows,
as long as no query comes to see a slot that ``make`` has poisoned. Hence twists take keys away, or share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.pages import PageTable
from swath.testing.cases import Case
from swath.testing.fuzz.draw import Call
from swath.testing.inputs import Inputs
from swath.testing.making import make

Apply = Callable[[Inputs, Random], Inputs]

HOSTILE = (-1, -2, -(2**31), 2**31 - 1, 2**30)
"""Entries that name no page of any pool here."""

ENGINE_ROWS = 64
"""Rows of an engine's table: it keeps one of one height, for more sequences than a call has."""

VECTORS = ("seq_lens", "cu_seqlens_q", "cu_seqlens_k", "q_start", "global_tokens", "sink", "q_scale", "ranges")
"""Small tensors of a call; some of them may be absent, or numbers."""


@dataclass(frozen=True)
class Twist:
    """A change of a call's tensors, how often it is drawn, and which cases it fits.

    compiled: kernels are compiled for what it changes, so that calls of a variant have it all or none.
    """

    apply: Apply
    share: float
    fits: Callable[[Case], bool]
    compiled: bool

    def random(self, call: Call, name: str) -> Random:
        """Random numbers for one purpose, of the call or of its variant."""
        return call.variant_random(name) if self.compiled else call.random(name)


TWISTS: dict[str, Twist] = {}
"""By name, in the order in which they are applied."""

EXTREMES: dict[str, Twist] = {}
"""The same with numbers at the ends of their types (extremes.py), applied after the others."""


def always(_case: Case) -> bool:
    """Fits every case."""
    return True


def is_paged(case: Case) -> bool:
    """Whether the case has a cache."""
    return not case.dense


def twist(
    share: float,
    fits: Callable[[Case], bool] = always,
    among: dict[str, Twist] = TWISTS,
    *,
    compiled: bool = False,
) -> Callable[[Apply], Apply]:
    """Register a twist under its function's name."""

    def register(apply: Apply) -> Apply:
        among[apply.__name__.replace("_", "-")] = Twist(apply, share, fits, compiled)
        return apply

    return register


def build(call: Call, contents: int = 0) -> Inputs:
    """The tensors of a call of an attention operator; other ``contents`` are other numbers in tensors of one shape.

    They are on the CPU: a seed is the same call for every backend, and processes that share a GPU run nothing there
    but what they judge.
    """
    inputs = make(call.case, "cpu", call.seed + contents)
    for name, one in (*TWISTS.items(), *EXTREMES.items()):
        if name in call.twists:
            inputs = one.apply(inputs, one.random(call, name))
    return inputs


@twist(0.12, lambda case: is_paged(case) and case.num_seqs > 1)
def shared_pages(inputs: Inputs, r: Random) -> Inputs:
    """Sequences share pages: where two have a page at one place of their tables, both get the first one's."""
    cache, rows = inputs.cache, rows_of(inputs.block_table)
    for b in range(1, len(rows)):
        a = r.randrange(b)
        both = min(len(rows[a]), len(rows[b]))
        pairs = zip(rows[a][:both].tolist(), rows[b][:both].tolist(), strict=True)
        known = range(cache.num_pages)
        at = [i for i, (page, other) in enumerate(pairs) if page in known and other in known and r.random() < 0.7]
        _fill_from(cache, rows[a][at].long(), rows[b][at].long())
        rows[b][at] = rows[a][at]
    return inputs


def _fill_from(cache: PagedKV, pages: Tensor, others: Tensor) -> None:
    """Put what ``others`` hold into those slots of ``pages`` that hold nothing: their own queries do not see them."""
    probe = cache.k[pages, 0, :, 0]
    empty = probe == -128 if probe.dtype == torch.int8 else probe.float().isnan()
    for x in cache.tensors:
        if x is not None and x.dim() >= 3:
            stored = x.view(torch.int8) if x.element_size() == 1 else x  # not all devices can choose among fp8
            mask = empty[:, None] if x.dim() == 3 else empty[:, None, :, None]
            stored[pages] = stored[others].where(mask, stored[pages])


@twist(0.05, compiled=True)
def one_pool(inputs: Inputs, _r: Random) -> Inputs:
    """The values are the keys, or the first elements of their rows: both are the same memory."""
    if isinstance(inputs.keys, PagedKV):
        return replace(inputs, keys=replace(inputs.keys, v=inputs.keys.k[..., : inputs.case.v_dim]))
    k = inputs.keys[0]
    return replace(inputs, keys=(k, k[..., : inputs.case.v_dim]))


@twist(0.05, compiled=True)
def one_kv_head(inputs: Inputs, _r: Random) -> Inputs:
    """All kv heads are the same memory: a stride of 0."""
    if isinstance(inputs.keys, PagedKV):
        k, v = (x[:, :1].expand_as(x) for x in (inputs.keys.k, inputs.keys.v))
        return replace(inputs, keys=replace(inputs.keys, k=k, v=v))
    k, v = (x[:, :1].expand_as(x) for x in inputs.keys)
    return replace(inputs, keys=(k, v))


@twist(0.05, compiled=True)
def one_q_head(inputs: Inputs, _r: Random) -> Inputs:
    """All query heads are the same memory."""
    return replace(inputs, q=inputs.q[..., :1, :].expand_as(inputs.q))


@twist(0.15, is_paged)
def dead_pages(inputs: Inputs, r: Random) -> Inputs:
    """Entries anywhere name no page."""
    share, num_pages = r.choice((0.05, 0.3, 1.0)), inputs.cache.num_pages
    for row in rows_of(inputs.block_table):
        entries = [r.choice((*HOSTILE, num_pages)) if r.random() < share else entry for entry in row.tolist()]
        row.copy_(like(entries, row))
    return inputs


@twist(0.1, is_paged)
def short_table(inputs: Inputs, r: Random) -> Inputs:
    """Lengths go beyond the tables: the last pages of each have no entry, and some lengths claim far more."""
    case, page_size, table = inputs.case, inputs.cache.page_size, inputs.block_table
    whole = [max(n, 0) // page_size for n in case.kv_lens]
    if isinstance(table, Tensor):
        left = r.randint(0, max([0, *whole]))
        table, cut = table[:, :left], [n >= left for n in whole]
    elif isinstance(table, tuple):
        kept = [r.randint(0, n) for n in whole]
        rows = [row[:n] for row, n in zip(rows_of(table), kept, strict=True)]
        table, cut = (torch.cat([*rows, table[0][:0]]), _ends(kept, table[1])), [True] * len(kept)
    lens = list(case.kv_lens)
    for b, n in enumerate(case.kv_lens):
        if n > 0 and (cut[b] or n % page_size == 0) and r.random() < 0.5:  # no page has keys beyond the length
            lens[b] = _far(inputs, b, r)
    seq_lens = like(lens, inputs.seq_lens)
    return replace(inputs, block_table=table, seq_lens=seq_lens, case=replace(case, bounds="none"))


def _far(inputs: Inputs, b: int, r: Random) -> int:
    """A length far beyond the keys that leaves the keys a row sees among those that exist.

    Where the queries are the last keys they move with the length: past the window, but for full attention.
    """
    case = inputs.case
    return max(case.kv_lens[b], 0) + case.row_counts[b] + min(case.size or 0, 10**6) + r.randint(1, 2**20)


def _ends(counts: list[int], indptr: Tensor) -> Tensor:
    return like([0, *accumulate(counts)], indptr)


def like(values: list[int], x: Tensor | None) -> Tensor:
    """Values as a tensor of the type of ``x``, where it is."""
    if x is None:
        raise ValueError("there is no such tensor in this call")
    return torch.tensor(values, dtype=x.dtype, device=x.device)


@twist(0.3, lambda case: is_paged(case) and case.table == "flat")
def hostile_indptr(inputs: Inputs, r: Random) -> Inputs:
    """The first bound of a flat table is negative, the last one beyond the entries: both are cut to what exists."""
    if not isinstance(inputs.block_table, tuple):
        return inputs
    ids, indptr = inputs.block_table
    ends = indptr.tolist()
    if ends[-1] == len(ids) and len(ends) > 1:
        ends[-1] += r.choice((1, 1000, 2**30))
    ends[0] -= r.choice((1, 1000, 2**30))
    return replace(inputs, block_table=(ids, like(ends, indptr)))


@twist(0.1, lambda case: case.ragged)
def late_rows(inputs: Inputs, r: Random) -> Inputs:
    """The first sequence's rows do not begin at 0: those before are no sequence's."""
    n, q, cu = r.randint(1, 4), inputs.q, inputs.cu_seqlens_q
    if cu is None:
        return inputs
    q_scale = inputs.q_scale
    if q_scale is not None and q_scale.dim():
        q_scale = torch.cat([q_scale.new_full((n, *q_scale.shape[1:]), torch.nan), q_scale])
    ranges = inputs.ranges
    if ranges is not None:
        ranges = torch.cat([ranges.new_tensor([[0, 2**31 - 1]] * n), ranges])
    nothing = torch.full((n, *q.shape[1:]), torch.nan, dtype=q.dtype, device=q.device)
    return replace(inputs, q=_joined(nothing, q), q_scale=q_scale, cu_seqlens_q=cu + n, ranges=ranges)


@twist(0.2, lambda case: case.dense)
def late_keys(inputs: Inputs, r: Random) -> Inputs:
    """The first sequence's keys do not begin at 0."""
    n, (k, v), cu = r.randint(1, 20), inputs.dense, inputs.cu_seqlens_k
    if cu is None:
        return inputs
    nothing = (torch.full((n, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device) for x in (k, v))
    late_k, late_v = map(_joined, nothing, (k, v))
    return replace(inputs, keys=(late_k, late_v), cu_seqlens_k=cu + n)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """``torch.cat`` along the first dimension, also of fp8."""
    if a.element_size() > 1:
        return torch.cat([a, b])
    return torch.cat([a.view(torch.int8), b.contiguous().view(torch.int8)]).view(b.dtype)


@twist(0.1, lambda case: is_paged(case) and case.table == "rectangular", compiled=True)
def column_table(inputs: Inputs, _r: Random) -> Inputs:
    """A table whose columns are contiguous."""
    table = inputs.block_table
    return replace(inputs, block_table=table.T.contiguous().T) if isinstance(table, Tensor) else inputs


@twist(0.1, compiled=True)
def strided_vectors(inputs: Inputs, _r: Random) -> Inputs:
    """Lengths, bounds, counts, logits and scales of queries are every second element of something longer."""
    vectors = ((name, getattr(inputs, name)) for name in VECTORS)
    made: dict[str, Any] = {name: _every_second(x) for name, x in vectors if isinstance(x, Tensor) and x.dim()}
    return replace(inputs, **made)


def _every_second(x: Tensor) -> Tensor:
    """The same values with strides twice as long; between them lies what would be wrong."""
    wider = torch.full((*x.shape, 2), 77, dtype=x.dtype, device=x.device)
    wider[..., 0] = x
    return wider[..., 0]


@twist(0.15, compiled=True)
def odd_addresses(inputs: Inputs, r: Random) -> Inputs:
    """Every tensor begins an odd number of elements into its memory."""
    return inputs.mapped(lambda x: moved_by(x, r.choice((1, 3, 5, 8))))


def moved_by(x: Tensor, elements: int) -> Tensor:
    """A copy with the same strides, ``elements`` further into its memory. What lies between its rows is poison."""
    held = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
    if any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)):
        return moved_by(x[held], elements).expand(x.shape)  # a copy into shared memory is refused
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    fill = torch.nan if x.dtype.is_floating_point else -128 if x.dtype == torch.int8 else 77
    memory = torch.full((span + elements,), fill, dtype=x.dtype, device=x.device)
    there = memory.as_strided(x.shape, x.stride(), elements)
    there.copy_(x)
    return there


@twist(0.15, compiled=True)
def wide_integers(inputs: Inputs, _r: Random) -> Inputs:
    """Tables, lengths, bounds and counts of 64 bits."""
    return inputs.mapped(lambda x: x.long() if x.dtype == torch.int32 else x)


@twist(0.2, is_paged, compiled=True)
def engine_table(inputs: Inputs, r: Random) -> Inputs:
    """A table as engines keep it: in rows of a larger one, by the slots of tokens, or both."""
    table, page_size = inputs.block_table, inputs.cache.page_size
    kind = r.choice(("rows", "tokens", "both"))
    if isinstance(table, tuple):
        ids, indptr = table
        return replace(
            inputs, block_table=PageTable(_first_of_page(ids, page_size), indptr.long() * page_size, unit="token")
        )
    if not isinstance(table, Tensor):
        return inputs
    entries, unit, rows = (table, "page", None) if kind == "rows" else (_first_of_page(table, page_size), "token", None)
    if kind != "tokens":
        larger = entries.new_full((ENGINE_ROWS, entries.shape[1]), 1)  # a page that no other sequence may follow to
        places = r.sample(range(ENGINE_ROWS), len(entries))
        larger[places] = entries
        entries, rows = larger, torch.tensor(places, dtype=torch.int32, device=table.device)
    return replace(inputs, block_table=PageTable(entries, rows=rows, unit=unit))


def _first_of_page(pages: Tensor, page_size: int) -> Tensor:
    """Pages as slots of tokens, of which all but the first one of each page are another page's."""
    slots = pages.long()[..., None] * page_size
    others = torch.zeros(*pages.shape, page_size - 1, dtype=torch.int64, device=pages.device)
    return torch.cat([slots, others], -1).flatten(-2)


def rows_of(table: Tensor | tuple[Tensor, Tensor] | PageTable | None) -> list[Tensor]:
    """The entries of each sequence, as views, of a table in one of the two plain forms."""
    if table is None:
        return []
    if isinstance(table, Tensor):
        return list(table)
    if isinstance(table, PageTable):
        raise TypeError("twists come before the one that makes another table")
    ends = [min(max(end, 0), len(table[0])) for end in table[1].tolist()]
    return [table[0][start:end] for start, end in pairwise(ends)]
