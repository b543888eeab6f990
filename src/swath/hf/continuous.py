"""swath under Transformers' continuous batching (``model.generate_batch``), selected as ``"paged|swath"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swath.cache import PagedKV
from swath.errors import bad_value
from swath.hf.attention import check_within, scoring_of
from swath.hf.settings import Settings
from swath.ops.append import append_kv
from swath.ops.attention import attention
from swath.ops.paged import paged_attention
from swath.window import Window


def continuous_forward(
    settings: Settings, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    cache: Any = None, read_index: list[Tensor] | None = None, write_index: list[Tensor] | None = None,
    cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Any = None, max_seqlen_q: int | None = None,
    max_seqlen_k: Any = None, block_table: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, s_aux: Tensor | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One layer over sequences laid end to end: query [1, Hq, T, D], new keys and values [1, Hkv, T, D].

    The cache's own index lists say where keys are. Full layers are read in place: a token slot is a page of one
    token. Sliding layers keep a ring of their window, whose keys the cache gathers before new ones overwrite them.

    Returns:
        [1, T, Hq, D], zero past the last sequence.

    Raises:
        ValueError: outside of continuous batching, with a padded batch's mask, or with a window that the ring of a
            sliding layer cannot serve.
    """
    if cache is None or cu_seq_lens_q is None or read_index is None or write_index is None:
        raise bad_value("cache", "that of model.generate_batch; elsewhere select the name without 'paged|'", None)
    if attention_mask is not None:
        raise bad_value("attention_mask", "None: sequences are laid end to end", "a mask")
    if block_table is not None:
        raise bad_value("block_table", "None; set max_blocks_per_request to 0", "a tensor")
    layer_idx: Any = module.layer_idx
    ring = _ring(cache, layer_idx)
    window = settings.override(layer_idx) or Window(sliding_window or ring)
    check_within(window, ring)
    scoring = scoring_of(query, scaling, dropout, softcap, s_aux, kwargs)
    q = query[0].transpose(0, 1)
    cu_q, cu_k = cu_seq_lens_q.int(), _of_layer(cu_seq_lens_k, ring).int()
    options: dict[str, Any] = dict(
        max_q_len=max_seqlen_q, max_kv_len=_of_layer(max_seqlen_k, ring), window=window, impl=settings.impl,
        out=torch.zeros_like(q, memory_format=torch.contiguous_format), **scoring,
    )  # fmt: skip
    group, index_in_group = cache.layer_index_to_group_indices[layer_idx]
    slots = read_index[group]
    if ring is None and slots.numel():
        # Token slots [slots, Hkv, D] as pages of one token.
        store = PagedKV(cache.key_cache[index_in_group].unsqueeze(2), cache.value_cache[index_in_group].unsqueeze(2))
        append_kv(store, key[0].transpose(0, 1), value[0].transpose(0, 1), write_index[group])
        paged_attention(q, store, (slots.int(), cu_k), cu_k.diff(), cu_seqlens_q=cu_q, **options)
    else:
        k, v = cache.update(key, value, layer_idx, read_index=read_index, write_index=write_index)
        attention(q, k, v, cu_q, cu_k, **options)
    return options["out"][None], None


def _ring(cache: Any, layer_idx: int) -> int | None:
    """The keys that a sliding layer's ring holds; None for a full layer, for which the cache says 1."""
    size = cache.sliding_windows[layer_idx]
    return None if size == 1 else size


def _of_layer(value: Any, ring: int | None) -> Any:
    """Hybrid models get a dict by layer type, others the value itself."""
    return value["full_attention" if ring is None else "sliding_attention"] if isinstance(value, dict) else value
