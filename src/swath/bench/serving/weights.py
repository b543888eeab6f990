"""Random weights for the models that are served, whichever engine holds them."""

from __future__ import annotations

import torch

SEED = 7


def make_weights(model: torch.nn.Module) -> None:
    """Random weights that make attention uneven: with engines' dummy ones, which are small, all keys weigh the same."""
    zero_centred = "gemma" in type(model).__name__.lower()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(SEED)
    for name, weights in sorted(model.named_parameters()):
        if not weights.dtype.is_floating_point or weights.dtype.itemsize < 2:
            continue
        with torch.no_grad():
            if "norm" in name:
                weights.fill_(0.0 if zero_centred else 1.0)
            elif name.endswith("sinks"):
                weights.normal_(0.5, 1.0, generator=generator)
            elif weights.dim() == 1 or "bias" in name:
                weights.normal_(0.0, 0.02, generator=generator)
            else:
                weights.normal_(0.0, (1.5 if "qkv" in name else 1.0) / weights.shape[-1] ** 0.5, generator=generator)
