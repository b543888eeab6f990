"""The float64 truth of a call, all heads of a sequence at once: fast enough for a hundred thousand calls.

It computes what ``swath.testing.oracle`` computes, field by field, and like it walks pages and applies scales by
itself. It takes the rule of which keys a query sees from there, and no code from the rest of swath. A test holds it to
that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swath.testing.oracle import Truth, are_shared, inside, repeats, visible

if TYPE_CHECKING:
    from swath.pages import PageTable
    from swath.testing.inputs import Inputs

    Table = Tensor | tuple[Tensor, Tensor] | PageTable

MOST_SCORES = 1 << 24
"""Scores that are held at once, 128 MiB in float64; rows are taken in parts where there are more."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """Which keys a query sees and how scores are made: the options of a call that are the same for all sequences."""

    size: int | None
    causal: bool
    scale: float
    softcap: float
    sink: Tensor | None
    interleaved: bool

    def by_kv_head(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """x [R, Hq, ...] as [Hkv, R, group, ...]."""
        group = x.shape[1] // num_kv_heads
        if self.interleaved:
            return x.reshape(x.shape[0], group, num_kv_heads, *x.shape[2:]).movedim(2, 0)
        return x.reshape(x.shape[0], num_kv_heads, group, *x.shape[2:]).movedim(1, 0)

    def by_row(self, x: Tensor) -> Tensor:
        """x [Hkv, R, group, ...] as [R, Hq, ...]."""
        return x.movedim(0, 2 if self.interleaved else 1).flatten(1, 2)


def page_lists(table: Table | None, page_size: int) -> list[Tensor]:
    """The pages of each sequence, int64, under a table of any form."""
    if table is None:
        return []
    entries, indptr, rows, unit = _table_parts(table)
    if indptr is not None:
        ends = [min(max(i, 0), len(entries)) for i in indptr.tolist()]
        lists = [entries[start:end].long() for start, end in pairwise(ends)]
    else:
        lists = [entries[row].long() for row in (range(len(entries)) if rows is None else rows.tolist())]
    if unit == "token":
        lists = [slots[::page_size].div(page_size, rounding_mode="floor") for slots in lists]
    return lists


def _table_parts(table: Table) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    if isinstance(table, Tensor):
        return table, None, None, "page"
    if isinstance(table, tuple):
        return *table, None, "page"
    return table.entries, table.indptr, table.rows, table.unit


@dataclass(frozen=True, eq=False)
class Pool:
    """Where keys lie: k [pages, Hkv, slots, D], v [..., Dv], their scales, and the entries of each sequence's pages.

    Dense keys are pages of one slot, one after another.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    pages: Sequence[Tensor]

    @classmethod
    def of_dense(cls, k: Tensor, v: Tensor, cu_seqlens_k: Tensor) -> Pool:
        """k [Tk, Hkv, D] and v [Tk, Hkv, Dv] of sequences laid end to end."""
        rows = torch.arange(k.shape[0], device=k.device)
        pages = [rows[start : max(start, end)] for start, end in pairwise(cu_seqlens_k.tolist())]
        return cls(k[:, :, None], v[:, :, None], None, None, pages)

    @classmethod
    def of_pages(cls, tensors: Sequence[Tensor | None], block_table: Table) -> Pool:
        """k, v, k_scale and v_scale of a cache under a table of any form."""
        k, v, k_scale, v_scale = tensors
        if k is None or v is None:
            raise ValueError("a cache has keys and values")
        return cls(k, v, k_scale, v_scale, page_lists(block_table, k.shape[2]))

    def live(self, b: int, kv_len: int) -> Tensor:
        """Which positions of sequence ``b`` have a slot, bool [N]; those after N have none."""
        entries = self.pages[b]
        return ((entries >= 0) & (entries < self.k.shape[0])).repeat_interleave(self.k.shape[2])[: max(kv_len, 0)]

    def keys(self, b: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of sequence ``b``: k as stored [Hkv, N, D], v [Hkv, N, Dv], and K's scale [Hkv or 1, N or 1, D or 1]."""
        slots = self.k.shape[2]
        page, slot = self.pages[b][positions // slots], positions % slots
        k, v = (_widened(x, page, slot) for x in (self.k, self.v))
        return k, v * _unit(self.v_scale, page, slot, v), _unit(self.k_scale, page, slot, v)


def _widened(x: Tensor, page: Tensor, slot: Tensor) -> Tensor:
    return x[page, :, slot].transpose(0, 1).double()


def _unit(scale: Tensor | None, page: Tensor, slot: Tensor, like: Tensor) -> Tensor:
    if scale is None:
        return like.new_ones(1, 1, 1)
    if scale.dim() == 3:
        return scale[page, :, slot].double().T[..., None]
    heads, columns = (*scale.shape, 1, 1)[:2]
    return scale.double().reshape(heads, 1, columns)


def exact(inputs: Inputs) -> Truth:
    """The truth of a call of an attention operator, from the tensors that it passes."""
    case, q = inputs.case, inputs.q.reshape(-1, *inputs.q.shape[-2:]).double()
    if inputs.q_scale is not None:
        unit = inputs.q_scale.double()
        q = q * (unit.reshape(-1, q.shape[1], 1) if unit.dim() else unit)
    if inputs.block_table is None:
        pool = Pool.of_dense(*inputs.dense, _known(inputs.cu_seqlens_k))
        kv_lens = _known(inputs.cu_seqlens_k).diff().tolist()
    else:
        pool = Pool.of_pages(inputs.cache.tensors, inputs.block_table)
        kv_lens = _known(inputs.seq_lens).tolist()
    steps, cu = q.shape[0] // max(len(kv_lens), 1), inputs.cu_seqlens_q
    bounds = [b * steps for b in range(len(kv_lens) + 1)] if cu is None else cu.tolist()
    leading = inputs.global_tokens
    scoring = Scoring(
        case.size, case.causal, case.score_scale, case.softcap, inputs.sink, interleaved=case.gqa == "interleaved"
    )
    return truth_of(
        q,
        pool,
        kv_lens,
        bounds,
        None if inputs.q_start is None else inputs.q_start.tolist(),
        [leading] * len(kv_lens) if isinstance(leading, int) else leading.tolist(),
        scoring,
        None if inputs.ranges is None else inputs.ranges.reshape(-1, 2),
    )


def _known(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("a call of this kind has this tensor")
    return x


def truth_of(
    q: Tensor,
    pool: Pool,
    kv_lens: Sequence[int],
    bounds: Sequence[int],
    q_start: Sequence[int] | None,
    leading: Sequence[int],
    scoring: Scoring,
    ranges: Tensor | None = None,
) -> Truth:
    """The truth of every row that a sequence owns.

    Args:
        q: [R, Hq, D], the rows laid flat, with the scale of fp8 queries applied.
        pool: where the keys lie.
        kv_lens, q_start, leading: of each sequence; negative ones are allowed. No q_start: the rows are the last keys.
        bounds: sequence b owns the rows ``bounds[b] .. bounds[b + 1] - 1``.
        scoring: the other options.
        ranges: [R, 2], the keys [lo, hi) of each row, where rows have bounds.
    """
    parts = []
    for b, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            first = max(kv_lens[b], 0) - (end - start) if q_start is None else q_start[b]
            alive = pool.live(b, kv_lens[b])
            parts += _sequence(q, range(start, end), first, pool, b, alive, leading[b], scoring, ranges)
    if not parts:
        parts = _sequence(q[:0], range(0), 0, pool, 0, q.new_ones(0, dtype=torch.bool), 0, scoring, None)
    return Truth(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _sequence(
    q: Tensor, rows: range, first: int, pool: Pool, b: int, alive: Tensor, leading: int, scoring: Scoring,
    ranges: Tensor | None,
) -> list[Truth]:  # fmt: skip
    """Rows of sequence ``b``, the first of which stands at position ``first``."""
    row = torch.arange(len(rows), device=q.device)
    positions = torch.arange(alive.shape[0], device=q.device)
    if ranges is None:
        seen = visible(first + row, positions, scoring.size, leading, scoring.causal) & alive
    else:
        seen = inside(ranges[rows.start : rows.stop], positions, leading) & alive
    held = torch.nonzero(seen.any(0)).flatten()
    keys = pool.keys(b, held) if len(held) else _no_keys(pool)
    seen = seen[:, held]
    shared, begin = are_shared(pool.k, pool.v), rows.start
    return [
        _rows(q[begin + at.start : begin + at.stop], begin + row[at], keys, seen[at], scoring, shared=shared)
        for at in _parts(len(rows), len(held) * q.shape[1])
    ]


def _parts(rows: int, scores_a_row: int) -> Iterator[slice]:
    step = max(MOST_SCORES // max(scores_a_row, 1), 1)
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))


def _no_keys(pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x.new_zeros((x.shape[1], 0, x.shape[3]), dtype=torch.float64) for x in (pool.k, pool.v))
    return k, v, k.new_ones(1, 1, 1)


def _rows(
    q: Tensor, rows: Tensor, keys: tuple[Tensor, Tensor, Tensor], seen: Tensor, scoring: Scoring, *, shared: bool
) -> Truth:
    """Query rows q [R, Hq, D], row i of which sees those of the keys where seen[i]; numbered ``rows``."""
    stored, v, unit = keys
    k, heads = stored * unit, stored.shape[0]
    x = scoring.by_kv_head(q.double(), heads)  # [Hkv, R, G, D]
    shape = x.shape[:3]
    flat, mask = x.flatten(1, 2), seen.repeat_interleave(shape[2], 0)[None]  # [Hkv, R * G, D] and [1, R * G, N]
    s = scoring.scale * (flat @ k.mT)
    if scoring.softcap > 0:
        s = scoring.softcap * torch.tanh(s / scoring.softcap)
    size = _largest(s.abs(), mask)
    s = s.masked_fill(~mask, -torch.inf)
    lse = _lse(s, scoring, shape)
    p = torch.exp(s - lse.where(lse != -torch.inf, 0.0)[..., None])
    noise = abs(scoring.scale) * _largest((flat.square() @ k.square().mT).sqrt(), mask)
    units = unit.abs().amax(1).expand(heads, -1) if unit.numel() else unit.new_ones(heads, 1)
    q_units = flat * units[:, None]
    biggest = q_units.abs().amax(-1) * repeats(q_units).sqrt()
    coarse = abs(scoring.scale) * biggest * _largest(stored.norm(dim=-1)[:, None].expand_as(s), mask)
    v_norm = (seen.double() @ v.square()).sqrt()[:, :, None].expand(*shape, v.shape[2])

    def back(y: Tensor) -> Tensor:
        return scoring.by_row(y.reshape(*shape, *y.shape[2:]))

    return Truth(
        rows=rows,
        out=back(p @ v),
        lse=back(lse),
        keys=seen.sum(1, keepdim=True).double(),
        products=torch.full_like(q[:, :1, 0], q.shape[2]),
        quadrature=back((p.square() @ v.square()).sqrt()),
        noise=back(noise),
        coarse_noise=back(coarse),
        score_size=back(size),
        peak=back(_largest(p, mask)),
        v_norm=scoring.by_row(v_norm),
        shared=back((p @ v.square()).sqrt() * shared),
    )


def _lse(s: Tensor, scoring: Scoring, shape: Sequence[int]) -> Tensor:
    """The logarithm of the denominator [Hkv, R * G] of scores s [Hkv, R * G, N], the sink counted."""
    if scoring.sink is not None:
        sink = scoring.by_kv_head(scoring.sink.double()[None], shape[0]).expand(shape).reshape(*s.shape[:2], 1)
        s = torch.cat([s, sink], -1)
    return torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)


def _largest(x: Tensor, mask: Tensor) -> Tensor:
    """The largest of x >= 0 [Hkv, M, N] along the last dimension where the mask holds, 0 for none."""
    return torch.nn.functional.pad(x.where(mask, 0.0), (0, 1)).amax(-1)
