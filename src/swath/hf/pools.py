"""The stored keys and values of layers that share a table of pages, and the static scales of quantised ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.quant import KVQuant, dequantise, quantise, spread


class Pools:
    """One pool of pages for each layer of a group; a layer's is None until its first keys come.

    The pools grow, shrink and copy together. Where one of them finds no memory, all of them stay usable: pages are
    copied into pages that no sequence has yet, and a pool that could not change its size does so the next time.
    """

    def __init__(self) -> None:
        self.stores: list[PagedKV | None] = []

    @property
    def made(self) -> list[PagedKV]:
        """The pools of the layers that have one."""
        return [store for store in self.stores if store is not None]

    def resize(self, num_pages: int) -> None:
        """Give every pool ``num_pages`` pages; the first ones keep their contents, and static scales stay."""
        for i, store in enumerate(self.stores):
            if store is not None and store.num_pages != num_pages:
                self.stores[i] = _resized(store, num_pages)

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every pool, token scales included."""
        if not pages:
            return
        for store in self.made:
            source, target = torch.tensor(pages, device=store.k.device).T
            _copy_pages(store, store, source, target)


def magnitudes(x: Tensor) -> Tensor:
    """The largest magnitude of each channel, as one token [1, Hkv, D]; ``x`` is [B, Hkv, T, D]."""
    return x.float().abs().amax((0, 2))[None]


def static_scales(quant: KVQuant) -> dict[str, str]:
    """The granularity of each scale that has no value per slot, by the name of its field."""
    granularities = {"k_scale": quant.k, "v_scale": quant.v_granularity}
    return {name: g for name, g in granularities.items() if g not in ("none", "token")}


def rescale(store: PagedKV, name: str, scale: Tensor, pages: Tensor) -> None:
    """Give the field ``name`` of a pool another static scale, in place; ``pages`` are quantised again."""
    stored, old = getattr(store, name[0]), getattr(store, name)
    granularity = static_scales(store.quant)[name]
    held = stored.view(torch.int8)[pages].view(stored.dtype)
    again = quantise(dequantise(held, spread(granularity, old)), spread(granularity, scale), stored.dtype)
    stored.view(torch.int8)[pages] = again.view(torch.int8)
    old.copy_(scale)


def _resized(old: PagedKV, num_pages: int) -> PagedKV:
    static = {name: getattr(old, name) for name in static_scales(old.quant)}
    new = PagedKV.empty(
        old.quant, num_pages, old.num_kv_heads, old.page_size, old.head_dim, v_head_dim=old.v_head_dim,
        device=old.k.device, **static,
    )  # fmt: skip
    kept = slice(min(num_pages, old.num_pages))
    _copy_pages(old, new, kept, kept)
    return new


def _copy_pages(source: PagedKV, target: PagedKV, source_pages: Tensor | slice, target_pages: Tensor | slice) -> None:
    static = static_scales(source.quant)
    for name in ("k", "v", "k_scale", "v_scale"):
        old, new = getattr(source, name), getattr(target, name)
        if old is None or name in static:
            continue
        if old.element_size() == 1:  # fp8 moves as bytes, which torch can index everywhere
            old, new = old.view(torch.int8), new.view(torch.int8)
        new[target_pages] = old[source_pages]
