"""swath under Transformers' continuous batching, ``model.generate_batch``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swath.errors import bad_value
from swath.hf.attention import check_within, scoring_of
from swath.hf.settings import REGISTERED, Settings
from swath.hf.versions import continuous_name, gathered
from swath.ops.attention import attention
from swath.window import Window

# Keywords that attention functions get from continuous batching alone.
OF_BATCHES = (
    "read_index", "write_index", "cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k"
)  # fmt: skip


def set_continuous_batching(model: Any, name: str = "swath") -> None:
    """Let ``model.generate_batch`` run on the implementation ``name``; ``model.set_attn_implementation`` goes back.

    Raises:
        ValueError: ``register`` made no such implementation.
    """
    if name not in REGISTERED:
        raise bad_value("name", f"a name given to register ({', '.join(REGISTERED) or 'none yet'})", repr(name))
    config, text = model.config, model.config.get_text_config(decoder=True)
    parts = ["", *(part for part in config.sub_configs if getattr(config, part) is text)]
    config._attn_implementation = dict.fromkeys(parts, continuous_name(name))


def continuous_forward(
    settings: Settings, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    cache: Any = None, cu_seq_lens_q: Tensor | None = None, block_table: Tensor | None = None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    s_aux: Tensor | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One layer over sequences laid end to end: query [1, Hq, T, D], new keys and values [1, Hkv, T, D].

    The cache stores the new keys and gathers those that the sequences have; sliding layers keep a ring of them.

    Returns:
        [1, T, Hq, D], zero past the last sequence.

    Raises:
        ValueError: outside of continuous batching, with a padded batch's mask, or with a window that the ring of a
            sliding layer cannot serve.
    """
    if cu_seq_lens_q is None or "cu_seq_lens_k" not in kwargs:
        raise bad_value("cu_seq_lens_q", "those of model.generate_batch; elsewhere select the name itself", None)
    if attention_mask is not None:
        raise bad_value("attention_mask", "None: sequences are laid end to end", "a mask")
    if block_table is not None:
        raise bad_value("block_table", "None; set max_blocks_per_request to 0", "a tensor")
    of_batch = {keyword: kwargs.pop(keyword) for keyword in OF_BATCHES if keyword in kwargs}
    layer_idx: Any = module.layer_idx
    ring = _ring(module.config, layer_idx) if sliding_window is None else sliding_window
    window = settings.override(layer_idx) or Window(ring)
    check_within(window, ring)
    scoring = scoring_of(query, scaling, dropout, softcap, s_aux, kwargs)
    batch = gathered(cache, layer_idx, ring is not None, key, value, of_batch)
    q = query[0].transpose(0, 1)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    attention(
        q, batch.keys, batch.values, cu_seq_lens_q.int(), batch.cu_seqlens_k, max_q_len=batch.max_q_len,
        max_kv_len=batch.max_kv_len, window=window, impl=settings.impl, out=out, **scoring,
    )  # fmt: skip
    return out[None], None


def _ring(config: Any, layer_idx: int) -> int | None:
    """The keys that the cache keeps for a layer that does not say its window; None for all."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding" in kinds[layer_idx]
    return getattr(config, "sliding_window", None) if slides else None
