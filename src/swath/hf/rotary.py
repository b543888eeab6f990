"""Rotary position embeddings: how a layer of a model rotates queries and keys, and turning queries back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swath.errors import bad_value

HALVES = (
    "apertus", "arcee", "aria_text", "bitnet", "cwm", "dots1", "flex_olmo", "gemma", "gemma2", "gemma3_text",
    "glm4_moe", "gpt_neox", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hyperclovax", "jais2", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo",
    "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "stablelm", "starcoder2", "vaultgemma",
)  # fmt: skip
"""Model types in which element i of a head is rotated with element ``i + rotary_dim / 2``."""

PAIRS = ("cohere", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium")
"""Model types in which element 2i is rotated with element ``2i + 1``."""

FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of ``rope_parameters`` whose frequencies depend on no length: a difference of positions is one rotation."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of a layer: pair i of a head turns by ``position * frequencies[i]`` radians.

    frequencies: float64 [rotary_dim / 2]; the elements of a head from ``rotary_dim`` on are not rotated.
    pairs: whether pair i is the elements (2i, 2i + 1), else (i, i + rotary_dim / 2).
    """

    frequencies: Tensor
    pairs: bool

    def turn_back(self, q: Tensor, distance: Tensor) -> Tensor:
        """The queries [B, T, Hq, D] as they would be ``distance`` [B, T] positions earlier."""
        # In float64: a product of a far position and a frequency needs more bits than float32 has.
        angle = distance[..., None, None] * self.frequencies.to(q.device)  # [B, T, 1, rotary_dim / 2]
        cos, sin = angle.cos().float(), angle.sin().float()
        turned, rest = q.split([2 * angle.shape[-1], q.shape[-1] - 2 * angle.shape[-1]], -1)
        a, b = turned.float().unflatten(-1, (-1, 2) if self.pairs else (2, -1)).unbind(-1 if self.pairs else -2)
        both = torch.stack([a * cos + b * sin, b * cos - a * sin], -1 if self.pairs else -2).flatten(-2)
        return torch.cat([both.to(q.dtype), rest], -1)


def rotary_of(config: Any, layer_type: str) -> Rotary:
    """How the layers of ``layer_type`` rotate, from a text configuration.

    Raises:
        ValueError: a model without rotary embedding or with one that is not known here, or frequencies that change
            with the length of the text, so that keys stored earlier have other ones than their queries.
    """
    unknown = why_unknown(config, layer_type)
    if unknown is not None:
        raise bad_value("leading_positions", f"'text' {unknown}", "'cache'")
    parameters = _parameters(config, layer_type)
    kind = parameters["rope_type"]
    if kind == "default":
        frequencies = _default_frequencies(config, parameters)
    else:
        options = {} if parameters is config.rope_parameters else {"layer_type": layer_type}
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **options)
    return Rotary(frequencies.double(), config.model_type in PAIRS)


def why_unknown(config: Any, layer_type: str) -> str | None:
    """Why ``rotary_of`` has no answer; None where it has one."""
    if config.model_type not in HALVES + PAIRS:
        return f"for models of type {config.model_type}, of which no rotary embedding is known here"
    kind = _parameters(config, layer_type)["rope_type"]
    return None if kind in FIXED else f"where rope_type is {kind!r}: its frequencies change with the text's length"


def _parameters(config: Any, layer_type: str) -> dict[str, Any]:
    """The ``rope_parameters`` of a layer type: some models have one set for all layers."""
    given: dict[str, Any] = config.rope_parameters
    return given if "rope_type" in given else given[layer_type]


def _default_frequencies(config: Any, parameters: dict[str, Any]) -> Tensor:
    """``theta ** (-2i / rotary_dim)``, rounded to float32 as the models do."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponent: Tensor = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return 1.0 / float(parameters["rope_theta"]) ** exponent
