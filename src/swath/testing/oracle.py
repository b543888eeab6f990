"""Attention in float64 from the mask formula alone.

This file imports nothing from swath: it walks pages, applies scales and decides by itself which keys a query sees, so
that a mistake in the library cannot hide in its own check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Keys = tuple[Tensor, Tensor, Tensor]
"""k as stored [N, Hkv, D], v [N, Hkv, Dv], and K's scale [N or 1, Hkv or 1, D or 1], all float64."""

_Fetch = Callable[[int, Tensor], _Keys]
"""Sequence and positions [N] to its keys there."""


class Truth(NamedTuple):
    """Exact results of some query rows, and what an error budget must know of the sums behind them.

    With p the softmax and j running over the visible keys of a row:

    - rows [R]: indices into q's rows laid flat
    - out [R, Hq, Dv], lse [R, Hq]
    - keys [R, 1]: how many keys the row sees
    - products [R, 1]: how many products a score is the sum of, D
    - quadrature [R, Hq, Dv]: ``sqrt(sum_j (p_j v_j)^2)``
    - noise [R, Hq]: ``scale * max_j |q o k_j|``, the Euclidean norm of the element-wise product
    - coarse_noise [R, Hq]: the same were every element of ``q x k_scale`` as large as the largest; times the root of
      how many of them have one magnitude, as they do where q is fp8: their rounding errors are one
    - score_size [R, Hq]: the largest ``|s_j|``, capped where there is a soft cap
    - peak [R, Hq]: p of the largest score
    - v_norm [R, Hq, Dv]: ``sqrt(sum_j v_j^2)``
    - shared [R, Hq, Dv]: ``sqrt(sum_j p_j v_j^2)`` where keys and values are one tensor, else 0
    """

    rows: Tensor
    out: Tensor
    lse: Tensor
    keys: Tensor
    products: Tensor
    quadrature: Tensor
    noise: Tensor
    coarse_noise: Tensor
    score_size: Tensor
    peak: Tensor
    v_norm: Tensor
    shared: Tensor


def repeats(x: Tensor) -> Tensor:
    """How many elements of each row of x [..., D] have the same magnitude, on average."""
    apart = x.abs().sort(-1).values.diff(dim=-1) > 0
    return x.shape[-1] / (1.0 + apart.sum(-1))


def are_shared(k: Tensor, v: Tensor) -> bool:
    """Whether keys and values are one tensor."""
    return k.numel() > 0 and k.data_ptr() == v.data_ptr()


def visible(q_pos: Tensor, k_pos: Tensor, size: int | None, global_tokens: int, causal: bool) -> Tensor:
    """Which keys a query sees, bool [Q, K]."""
    p, k = q_pos.view(-1, 1), k_pos.view(1, -1)
    leading = k < global_tokens
    if size is None:
        near = torch.ones_like(p - k, dtype=torch.bool)
    elif causal:
        near = p - k < size
    else:
        near = (p - k < size) & (k - p < size)
    return (near | leading) & (k <= p) if causal else near | leading


def inside(bounds: Tensor, k_pos: Tensor, global_tokens: int) -> Tensor:
    """Which keys a query sees by bounds [Q, 2], bool [Q, K]."""
    low, end, k = bounds[:, :1].long(), bounds[:, 1:].long(), k_pos.view(1, -1)
    return ((low <= k) | (k < global_tokens)) & (k < end)


def dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Truth:
    """The truth of ``swath.attention``; options as ``_truth``."""
    first = cu_seqlens_k.tolist()
    kv_lens = [max(end - start, 0) for start, end in pairwise(first)]
    live = [torch.ones(n, dtype=torch.bool, device=k.device) for n in kv_lens]

    def fetch(b: int, positions: Tensor) -> _Keys:
        rows = first[b] + positions
        return k[rows].double(), v[rows].double(), _unit(None, rows, rows)

    return _truth(q, k.shape[1], fetch, live, cu_seqlens_q=cu_seqlens_q, shared=are_shared(k, v), **options)


def paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | Sequence[Tensor],
    seq_lens: Tensor,
    *,
    table_rows: Tensor | None = None,
    unit: str = "page",
    **options: Any,
) -> Truth:
    """The truth of ``swath.paged_attention`` over k [num_pages, Hkv, page_size, D], v [..., Dv]; options as ``_truth``.

    ``table_rows``, ``unit``: which rows of a larger table count, and whether entries are pages or the slots of tokens.
    """
    num_pages, num_kv_heads, page_size, _ = k.shape
    pages = _page_lists(block_table)
    if table_rows is not None:
        pages = [pages[row] for row in table_rows.tolist()]
    if unit == "token":
        pages = [slots[::page_size].div(page_size, rounding_mode="floor") for slots in pages]
    live = []
    for entries, kv_len in zip(pages, seq_lens.tolist(), strict=True):
        owner = entries.repeat_interleave(page_size)[: max(kv_len, 0)]
        live.append((owner >= 0) & (owner < num_pages))

    def fetch(b: int, positions: Tensor) -> _Keys:
        page, slot = pages[b][positions // page_size], positions % page_size
        values = v[page, :, slot].double() * _unit(v_scale, page, slot)
        return k[page, :, slot].double(), values, _unit(k_scale, page, slot)

    lengths = [max(n, 0) for n in seq_lens.tolist()]
    return _truth(q, num_kv_heads, fetch, live, kv_lens=lengths, shared=are_shared(k, v), **options)


def _page_lists(block_table: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(block_table, Tensor):
        return list(block_table.long())
    ids, bounds = block_table[0].long(), block_table[1].tolist()
    return [ids[start:end] for start, end in pairwise(bounds)]


def _unit(scale: Tensor | None, page: Tensor, slot: Tensor) -> Tensor:
    """A cache's scale as [N or 1, Hkv or 1, D or 1]."""
    if scale is None:
        return torch.ones(1, 1, 1, dtype=torch.float64, device=page.device)
    if scale.dim() == 3:
        return scale[page, :, slot].double()[..., None]
    return scale.double().reshape(1, *scale.shape, *(1,) * (2 - scale.dim()))


def _truth(
    q: Tensor,
    num_kv_heads: int,
    fetch: _Fetch,
    live: list[Tensor],
    *,
    kv_lens: list[int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    q_start: Tensor | None = None,
    size: int | None = None,
    global_tokens: int | Sequence[int] = 0,
    causal: bool = True,
    ranges: Tensor | None = None,
    q_scale: Tensor | None = None,
    interleaved: bool = False,
    rows: Tensor | None = None,
    **scoring: Any,
) -> Truth:
    """Every row that a sequence owns, or only those among ``rows`` (ascending indices into q's rows laid flat).

    ``ranges``: the bounds [lo, hi) of each row, shaped as q with 2 in place of heads and D.
    """
    flat = q.reshape(-1, *q.shape[-2:])
    heads = flat.double()
    if q_scale is not None:
        heads = heads * (q_scale.double().reshape(-1, q.shape[-2], 1) if q_scale.dim() else q_scale.double())
    num_seqs = len(live)
    per_seq = flat.shape[0] // max(num_seqs, 1)
    bounds = [b * per_seq for b in range(num_seqs + 1)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    wanted = torch.arange(flat.shape[0], device=q.device) if rows is None else rows
    parts = []
    for b, alive in enumerate(live):
        mine = wanted[(wanted >= bounds[b]) & (wanted < bounds[b + 1])]
        kv_len = alive.shape[0] if kv_lens is None else kv_lens[b]
        start = kv_len - (bounds[b + 1] - bounds[b]) if q_start is None else int(q_start[b])
        leading = global_tokens if isinstance(global_tokens, int) else int(global_tokens[b])
        positions = torch.arange(alive.shape[0], device=q.device)
        if ranges is None:
            seen = visible(start + mine - bounds[b], positions, size, leading, causal) & alive
        else:
            seen = inside(ranges.reshape(-1, 2)[mine], positions, leading) & alive
        held = torch.nonzero(seen.any(0)).flatten()
        parts.append((mine, heads[mine], fetch(b, held), seen[:, held]))
    results = [_sequence(*part, num_kv_heads, interleaved, **scoring) for part in parts]
    return Truth(*(torch.cat(column) for column in zip(*results, strict=True)))


def _sequence(
    rows: Tensor, q: Tensor, keys: _Keys, seen: Tensor, num_kv_heads: int, interleaved: bool,
    scale: float, softcap: float = 0.0, sink: Tensor | None = None, shared: bool = False,
) -> Truth:  # fmt: skip
    """Rows q [R, Hq, D] of one sequence, of whose keys row i sees those where seen[i]."""
    stored, v, unit = keys
    products = torch.full_like(q[:, :1, 0], q.shape[2])
    if not len(rows):  # of many sequences most, where few rows are asked for
        wide, single = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])
        return Truth(rows, wide, single, products, products, wide, single, single, single, single, wide, wide)
    k, group = stored * unit, q.shape[1] // num_kv_heads
    kv_of = [h % num_kv_heads if interleaved else h // group for h in range(q.shape[1])]
    columns: list[tuple[Tensor, ...]] = []
    for h, kv in enumerate(kv_of):
        logit = None if sink is None else sink[h].double()
        columns.append(_head(q[:, h], k[:, kv], v[:, kv], seen, scale, softcap, logit))
    largest_unit = unit.abs().amax(0).expand(num_kv_heads, -1) if unit.numel() else unit.new_ones(num_kv_heads, 1)
    q_unit = q * largest_unit[kv_of]
    q_largest = q_unit.abs().amax(-1) * repeats(q_unit).sqrt()
    k_largest = torch.stack([_masked_max(norms.expand_as(seen), seen) for norms in stored.norm(dim=-1).unbind(1)], 1)
    coarse = abs(scale) * q_largest * k_largest[:, kv_of]
    v_norm = torch.stack([(seen.double() @ values.square()).sqrt() for values in v.unbind(1)], 1)[:, kv_of]
    out, lse, quadrature, noise, size, peak, spread = (torch.stack(c, 1) for c in zip(*columns, strict=True))
    keys_seen = seen.sum(1, keepdim=True).double()
    return Truth(rows, out, lse, keys_seen, products, quadrature, noise, coarse, size, peak, v_norm, spread * shared)


def _head(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sink: Tensor | None
) -> tuple[Tensor, ...]:
    """One head, q [R, D], k [N, D] and v [N, Dv]: out, lse, quadrature, noise, score_size, peak, and what ``shared`` is
    where keys and values are one tensor."""
    s = scale * (q @ k.T)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    size = _masked_max(s.abs(), seen)
    s = s.masked_fill(~seen, -torch.inf)
    logits = s if sink is None else torch.cat([s, sink.expand(s.shape[0], 1)], 1)
    lse = torch.logsumexp(logits, 1) if logits.shape[1] else torch.full_like(q[:, 0], -torch.inf)
    p = torch.exp(s - lse.where(lse != -torch.inf, 0.0)[:, None])
    noise = abs(scale) * _masked_max((q.square() @ k.square().T).sqrt(), seen)
    quadrature, spread = ((weights @ v.square()).sqrt() for weights in (p.square(), p))
    return p @ v, lse, quadrature, noise, size, _masked_max(p, seen), spread


def _masked_max(x: Tensor, seen: Tensor) -> Tensor:
    """The largest x [R, N] of each row among the keys seen, 0 for none; x is not negative."""
    return torch.nn.functional.pad(x.where(seen, 0.0), (0, 1)).amax(1)
