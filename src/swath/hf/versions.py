"""What differs between the releases of Transformers that swath supports, in one place."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from torch import Tensor

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

if RELEASE < (5, 17):
    raise ImportError(f"swath.hf needs Transformers 5.17 or newer, this is {transformers.__version__}")

PAGED_NAMES = RELEASE < (5, 19)
"""Whether continuous batching takes any implementation whose name begins with ``paged|``. Since 5.19 it takes its own
two, and those with ``flash`` in their names, which get the lengths of sequences instead of a mask, as ours do."""

remap_positions_for_packed_sequence: Any = getattr(
    transformers.masking_utils, "remap_positions_for_packed_sequence", None
)
"""Wraps the mask functions of rows of packed sequences (since 5.23); None where the release has no such wrapper."""


def continuous_name(name: str) -> str:
    """The name under which continuous batching takes the implementation ``name``.

    No digit may follow ``flash``: it would be read as a version of FlashAttention.
    """
    return f"paged|{name}" if PAGED_NAMES else f"{name}|flash"


def layer_types_and_windows(config: Any) -> list[tuple[str, int | None]]:
    """The type of each layer and, where it slides, its window, from a text configuration."""
    layer_types, options = transformers.cache_utils.get_layer_types_and_kwargs(config)
    # One dict of options for all layers up to 5.18, then one for each.
    each = [options] * len(layer_types) if isinstance(options, dict) else options
    return [(kind, own.get("sliding_window")) for kind, own in zip(layer_types, each, strict=True)]


class Batch(NamedTuple):
    """Keys and values of the sequences of continuous batching, laid end to end [tokens, Hkv, D], and their lengths."""

    keys: Tensor
    values: Tensor
    cu_seqlens_k: Tensor
    max_q_len: int
    max_kv_len: int


def gathered(cache: Any, layer_idx: int, slides: bool, key: Tensor, value: Tensor, given: dict[str, Any]) -> Batch:
    """What continuous batching has for a layer: its cache stores new keys and values [1, Hkv, T, D] and gathers all.

    ``given``: the keywords of the attention function. Since 5.24 the model updates the cache, and passes none.
    """
    if PAGED_NAMES:
        keys, values = cache.update(
            key, value, layer_idx, read_index=given["read_index"], write_index=given["write_index"]
        )
        bounds, longest, max_q_len = given["cu_seq_lens_k"], given["max_seqlen_k"], given["max_seqlen_q"]
    else:
        if cache is not None:
            key, value = cache.update(key, value, layer_idx, given)
        keys, values = (x[0].transpose(0, 1) for x in (key, value))
        bounds, longest, max_q_len = given["cu_seq_lens_k"], given["max_length_k"], given["max_length_q"]
    if isinstance(bounds, dict):  # by layer type, in models that have several; the cache picks one since 5.24
        kind = "sliding_attention" if slides else "full_attention"
        bounds, longest = bounds[kind], longest[kind]
    return Batch(keys, values, bounds.int(), max_q_len, longest)
