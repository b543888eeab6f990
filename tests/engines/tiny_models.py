"""Tiny models with random weights, saved as checkpoints for the real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 512
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def save(folder: Path, config: str, own: dict[str, Any]) -> Any:
    """Save a model in float32 and return it, with eager attention. ``config``: a class of Transformers; ``own``: its
    arguments beside ``COMMON``."""
    torch.manual_seed(0)
    # vLLM takes the output weights of Gemma from its input embeddings.
    tied = config.startswith("Gemma")
    made = getattr(transformers, config)(**COMMON | own | {"tie_word_embeddings": tied})
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter, x in model.named_parameters():
            if parameter.endswith("sinks"):
                x.normal_(0.5, 1.0).copy_(x.bfloat16())  # as SGLang keeps them, whatever the model's dtype
            elif "norm" not in parameter:
                x.normal_(0, 0.08)
    model.save_pretrained(folder)
    return model
