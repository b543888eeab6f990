"""xFormers' memory_efficient_attention over dense keys.

A local mask counts the visible keys, the query's own included, as swath's windows do. Queries are the last keys.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider, features, first_of


def _why_not(case: BenchCase) -> str | None:
    return features(case) or first_of((not case.dense, "has pages of 128 and more keys only, in tables of its own"))


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    case = inputs.case
    blocks = BlockDiagonalMask.from_seqlens(list(case.row_counts), list(case.kv_lens))
    bias = (
        blocks.make_causal_from_bottomright()
        if case.size is None
        else blocks.make_local_attention_from_bottomright(case.size)
    )
    q = inputs.q.unflatten(1, (case.num_kv_heads, case.group))[None]
    k, v = (x[None, :, :, None].expand(-1, -1, -1, case.group, -1) for x in inputs.dense)
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias)[0].flatten(1, 2)


PROVIDERS = (Provider("xformers", _why_not, _prepare, module="xformers", package="xformers"),)
