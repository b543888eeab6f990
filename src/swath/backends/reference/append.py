"""append_kv in torch: the twin that every other backend must equal byte for byte."""

from __future__ import annotations

import torch
from torch import Tensor

from swath.problem import AppendCase
from swath.quant import quantise, spread, token_scale


def why_not(case: AppendCase) -> str | None:
    """Runs everywhere."""
    return None


def plan(case: AppendCase) -> str:
    """The launch in words."""
    return "torch index writes"


def warm(case: AppendCase) -> None:
    """Nothing to compile."""


def run(case: AppendCase) -> None:
    """Quantise each token and write it with its scale."""
    cache, size = case.cache, case.cache.page_size
    slots = case.slot_mapping.long()  # torch indexes by these everywhere
    kept = (slots >= 0) & (slots < cache.num_pages * size)
    slot = slots[kept]
    page, offset = slot // size, slot % size
    quant = cache.quant
    for x, pool, scale, granularity in (
        (case.k, cache.k, cache.k_scale, quant.k),
        (case.v, cache.v, cache.v_scale, quant.v_granularity),
    ):
        rows = x[kept].transpose(0, 1)  # [Hkv, T, D or Dv]
        if granularity == "token" and scale is not None:
            scale[page, :, offset] = token_scale(rows, pool.dtype).to(scale.dtype).mT
            scale = scale[page, :, offset].mT
        stored = quantise(rows, spread(granularity, scale), pool.dtype)
        _put(pool, page, offset, stored.transpose(0, 1))


def _put(pool: Tensor, page: Tensor, offset: Tensor, rows: Tensor) -> None:
    """pool[page, :, offset] = rows; fp8 goes as bytes, which torch can index everywhere."""
    if pool.element_size() == 1:
        pool, rows = pool.view(torch.int8), rows.view(torch.int8)
    pool[page, :, offset] = rows
