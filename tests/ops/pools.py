"""Pools of pages that are much larger than what a call reads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from swath import PagedKV
from swath.testing import Inputs


def in_a_large_pool(inputs: Inputs, num_pages: int) -> Inputs:
    """The same pages at the end of a pool of others, all poison."""
    own, table = inputs.cache.num_pages, inputs.block_table
    exists = (table >= 0) & (table < own)
    moved = torch.where(exists, table + num_pages - own, -1)
    return replace(inputs, keys=at_the_end(inputs.cache, num_pages), block_table=moved)


def at_the_end(cache: PagedKV, num_pages: int) -> PagedKV:
    """The pages of a cache, and their token scales, after others to make ``num_pages``."""

    def enlarged(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() < 3:
            return x
        pool = torch.full((num_pages, *x.shape[1:]), -128, dtype=x.dtype, device=x.device)
        pool[-cache.num_pages :] = x
        return pool

    return PagedKV(*map(enlarged, (cache.k, cache.v, cache.k_scale, cache.v_scale)))
