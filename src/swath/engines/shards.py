"""Decode context parallel: ranks hold keys of every sequence by turns, and join what they find by the LSE.

Each rank has its own query heads, and all ranks of a group the same kv heads. So queries are gathered, every rank
attends with all of them to the keys it holds, and sends back what it found for the heads of the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from swath import bounds
from swath.ops.merge import merge_states

if TYPE_CHECKING:
    from swath.cache import PagedKV
    from swath.engines.common import Layer, Step


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
    n, ranks, kv_heads = step.num_tokens, dist.get_world_size(group), cache.num_kv_heads
    q = q[:n].contiguous()
    gathered = q.new_empty(ranks, *q.shape)  # [R, T, Hq, D]
    dist.all_gather(list(gathered), q, group=group)
    # The group of a kv head, one after another: [T, Hkv, R, Hq / Hkv, D].
    heads = gathered.unflatten(2, (kv_heads, -1)).permute(1, 2, 0, 3, 4)
    found, lse = step.attend(replace(layer, sink=None), heads.flatten(1, 3), cache, return_lse=True)
    mine = _exchanged(found, kv_heads, ranks, group), _exchanged(lse[..., None], kv_heads, ranks, group)[..., 0]
    merged, merged_lse = merge_states(*mine, dtype=torch.float32)
    if layer.sink is not None:
        share = torch.sigmoid(merged_lse - layer.sink)  # of the keys, beside the sink
        merged *= share.masked_fill(merged_lse == -torch.inf, 0.0)[..., None]
    out[:n].copy_(merged.view_as(out[:n]))


def _exchanged(x: Tensor, kv_heads: int, ranks: int, group: Any) -> Tensor:
    """What all ranks found for this one's heads, [R, T, Hq, ...], of x [T, R * Hq, ...] for those of all."""
    sent = x.unflatten(1, (kv_heads, ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [R, T, Hkv, Hq / Hkv, ...]
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent, group=group)
    return came.flatten(2, 3)
