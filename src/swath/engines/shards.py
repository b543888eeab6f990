"""Decode context parallel: ranks hold keys of every sequence by turns, and join what they find by the LSE.

Each rank has its own query heads, and all ranks of a group the same kv heads. So queries are gathered, every rank
attends with all of them to the keys it holds, and sends back what it found for the heads of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from swath import bounds
from swath.ops.merge import merge_states

if TYPE_CHECKING:
    from swath.cache import PagedKV
    from swath.engines.common import Layer, Step


_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""One function by its name in newer and in older releases of torch."""


class Shard(NamedTuple):
    """The keys of one rank: token p is held by rank ``p // interleave % world_size``."""

    rank: int
    world_size: int
    interleave: int = 1

    def held(self, count: Tensor) -> Tensor:
        """How many of the first ``count`` tokens this rank holds."""
        return bounds.own_tokens(count, *self[:2], interleave=self.interleave)

    def seen(self, whole: Tensor) -> Tensor:
        """Bounds over all keys as bounds over those of this rank."""
        return bounds.shard(whole, *self[:2], interleave=self.interleave)

    def most(self, count: int) -> int:
        """``held`` at most, of a host bound."""
        return -(-count // (self.interleave * self.world_size)) * self.interleave


def attend_shared(step: Step, layer: Layer, q: Tensor, cache: PagedKV, out: Tensor, group: Any) -> None:
    """Attention of this rank's q [T or more, Hq, D] over the keys of all ranks, into out [T or more, Hq, Dv].

    ``step.shard`` says which keys are this rank's. ``group``: a process group, whose ranks are those of the shards.
    """
    n = step.num_tokens
    heads = _gathered(q[:n], cache.num_kv_heads, group)
    found, lse = step.attend(layer.without_sink, heads, cache, return_lse=True)
    merged, merged_lse = _merged(found, lse, cache.num_kv_heads, group)
    if layer.sink is not None:
        share = torch.sigmoid(merged_lse - layer.sink)  # of the keys, beside the sink
        merged *= share.masked_fill(merged_lse == -torch.inf, 0.0)[..., None]
    out[:n].copy_(merged.view_as(out[:n]))


def rehearse(q: Tensor, kv_heads: int, group: Any) -> None:
    """Exchange as much as for attention of q, before there is a cache: an engine that profiles its memory counts it."""
    heads = _gathered(q, kv_heads, group)
    _merged(heads, heads.new_zeros(heads.shape[:2], dtype=torch.float32), kv_heads, group)


def _gathered(q: Tensor, kv_heads: int, group: Any) -> Tensor:
    """The queries of all ranks, [T, R * Hq, D] of q [T, Hq, D]: a kv head's stand together, rank by rank."""
    ranks, n = dist.get_world_size(group), q.shape[0]
    gathered = q.new_empty(ranks * n, *q.shape[1:])
    _ALL_GATHER(gathered, q.contiguous(), group=group)
    by_rank = gathered.view(ranks, n, kv_heads, -1, q.shape[-1])  # [R, T, Hkv, Hq / Hkv, D]
    return by_rank.permute(1, 2, 0, 3, 4).flatten(1, 3)


def _merged(found: Tensor, lse: Tensor, kv_heads: int, group: Any) -> tuple[Tensor, Tensor]:
    """This rank's heads [T, Hq, Dv] in float32, and their LSE [T, Hq], of what each rank found for those of all."""
    outs, lses = _exchanged(found, kv_heads, group), _exchanged(lse[..., None], kv_heads, group)
    return merge_states(outs, lses[..., 0], dtype=torch.float32)


def _exchanged(x: Tensor, kv_heads: int, group: Any) -> Tensor:
    """What all ranks found for this one's heads, [R, T, Hq, ...], of x [T, R * Hq, ...] for those of all."""
    ranks = dist.get_world_size(group)
    sent = x.unflatten(1, (kv_heads, ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [R, T, Hkv, Hq / Hkv, ...]
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent, group=group)
    return came.flatten(2, 3)
