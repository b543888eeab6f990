"""Attention with positions counted inside the cache, done naively: the judge of ``leading_positions="cache"``.

The rotary embedding of a model is switched off, so that its attention is handed queries and keys without positions.
For each query the keys that it sees are put one after another, rotated by the model's own functions to 0, 1, 2, ...,
and attended to in float64. No rotation is ever undone, and nothing is shared with the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "naive-streaming"


def streaming_logits(model: PreTrainedModel, ids: Tensor, size: int, leading: int) -> Tensor:
    """Logits [B, T, vocabulary]; every layer has this window and these leading tokens. The model keeps them."""
    with torch.no_grad(), _without_rotation(model) as rotation:
        AttentionInterface.register(NAME, partial(_attention, rotation, size, leading))
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        model.set_attn_implementation(NAME)
        return model(ids).logits


@contextmanager
def _without_rotation(model: PreTrainedModel) -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
    """Let the rotary embedding return angles of 0; the real one is handed out."""
    (embedding,) = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    real = embedding.forward

    def still(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = real(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)

    embedding.forward = still
    try:
        yield real
    finally:
        embedding.forward = real


def _attention(
    rotation: Any, size: int, leading: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    mask: Any = None, *, scaling: float, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    group = query.shape[1] // key.shape[1]
    rows = []
    for i in range(query.shape[2]):
        seen = [k for k in range(i + 1) if k < leading or k > i - size]
        q, k = (x.double() for x in _rotated(module, rotation, query[:, :, i : i + 1], key[:, :, seen]))
        scores = (q @ k.repeat_interleave(group, 1).mT) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(len(query), -1, 1, 1)], -1)
        p = scores.softmax(-1)[..., : len(seen)]
        rows.append(p @ value[:, :, seen].double().repeat_interleave(group, 1))
    return torch.cat(rows, 2).transpose(1, 2).to(query.dtype), None


def _rotated(module: Any, rotation: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys at 0, 1, 2, ... and the query at the last of them, by the functions of the model's own file."""
    position = torch.arange(k.shape[2])[None]
    config = module.config
    by_type = "rope_type" not in config.rope_parameters
    cos, sin = rotation(k, position, config.layer_types[module.layer_idx]) if by_type else rotation(k, position)
    # gpt_oss has an angle for each pair, the others one for each element, of which there may be fewer than in a head.
    width = 2 * cos.shape[-1] if config.model_type == "gpt_oss" else cos.shape[-1]
    (q, q_rest), (k, k_rest) = (x.split([width, x.shape[-1] - width], -1) for x in (q, k))
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    q, _ = apply(q, q, cos[:, -1:], sin[:, -1:])
    _, k = apply(k, k, cos, sin)
    return torch.cat([q, q_rest], -1), torch.cat([k, k_rest], -1)
