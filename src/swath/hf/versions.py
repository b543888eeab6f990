"""What differs between the releases of Transformers that swath supports, in one place."""

from __future__ import annotations

from typing import Any

from transformers import masking_utils
from transformers.cache_utils import get_layer_types_and_kwargs

remap_positions_for_packed_sequence: Any = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
"""Wraps the mask functions of rows of packed sequences (since 5.23); None where the release has no such wrapper."""


def layer_types_and_windows(config: Any) -> list[tuple[str, int | None]]:
    """The type of each layer and, where it slides, its window, from a text configuration."""
    layer_types, options = get_layer_types_and_kwargs(config)
    # One dict of options for all layers up to 5.18, then one for each.
    each = [options] * len(layer_types) if isinstance(options, dict) else options
    return [(kind, own.get("sliding_window")) for kind, own in zip(layer_types, each, strict=True)]
