"""Tiny random models of the families that the Transformers integration is tested with."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB, WINDOW = 61, 5
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    attn_implementation="eager",
)  # fmt: skip
HYBRID = SMALL | dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "qwen3": lambda: Qwen3Config(**HYBRID, use_sliding_window=True),
    "gemma2": lambda: Gemma2Config(**HYBRID, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**HYBRID, query_pre_attn_scalar=8),
    # Every token goes to all experts: choosing some would make the logits jump where a rounding error flips a choice.
    "gpt_oss": lambda: GptOssConfig(**HYBRID, num_local_experts=2, num_experts_per_tok=2),
}
FAMILIES = tuple(CONFIGS)
SLIDING = tuple(name for name in FAMILIES if name != "llama")


@cache
def _template(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            parameter.normal_(0, 1 if "sinks" in name else 0.3)
    return model


def make(family: str, implementation: str) -> PreTrainedModel:
    """A model in fp32 with the weights of its family."""
    model = copy.deepcopy(_template(family))
    model.set_attn_implementation(implementation)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padding(side: str, batch: int, length: int) -> Tensor | None:
    """A 2-D mask: the first sequence whole, each next one with 7 more padded columns on ``side``."""
    if side == "none":
        return None
    real = torch.arange(length)[None] >= 7 * torch.arange(batch)[:, None]
    return (real if side == "left" else real.flip(1)).long()


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, **options).logits


def error(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference of the real tokens' logits over the largest logit."""
    real = torch.ones(ours.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return float((ours - theirs)[real].abs().max() / theirs[real].abs().max())


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, new: int = 30, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


def build(model_type: str, implementation: str, **options: Any) -> PreTrainedModel:
    """A model of any type with options of its own, in fp32 with random weights that are the same every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(HYBRID | options)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.requires_grad_(False).normal_(0, 0.3)
    model.set_attn_implementation(implementation)
    return model.eval().requires_grad_(False)


SLIDING_FIRST = "sliding_attention", "full_attention"


def six_layers(implementation: str, order: tuple[str, str] = SLIDING_FIRST) -> PreTrainedModel:
    """A hybrid model in which calls can fail half-way."""
    return build("qwen3", implementation, num_hidden_layers=6, layer_types=[*order] * 3, use_sliding_window=True)
