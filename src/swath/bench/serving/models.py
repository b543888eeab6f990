"""The models that are served: shapes of real ones, as configurations of Transformers, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swath.errors import bad_value

VOCABULARY = 32_768
"""Tokens of every model here. With the 262,144 of Gemma a few layers would drown in the output matrix."""


@dataclass(frozen=True)
class Model:
    """A decoder of real shape.

    - depth: layers of the real model; period: layers after which the kinds of layers repeat
    - window: keys in the window of windowed layers; None: there are none
    - is_dense: no routing, so that nearly equal activations give nearly equal logits
    - own: its configuration, without ``COMMON`` and what follows from the layers
    """

    name: str
    depth: int
    period: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    is_dense: bool
    own: dict[str, Any]

    def config(self, layers: int) -> dict[str, Any]:
        """config.json of the model with ``layers`` layers.

        Raises:
            ValueError: the layers are no whole number of periods.
        """
        if layers < 1 or layers % self.period:
            raise bad_value("layers", f"a multiple of {self.period} for {self.name}", layers)
        shape = dict(
            num_hidden_layers=layers, num_attention_heads=self.num_q_heads, num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim, sliding_window=self.window,
        )  # fmt: skip
        kinds = self.own.get("layer_types")
        repeated = {} if kinds is None else {"layer_types": kinds * (layers // self.period)}
        return COMMON | shape | self.own | repeated

    def in_words(self, layers: int) -> str:
        """The shape."""
        heads = f"heads {self.num_q_heads}/{self.num_kv_heads}, D {self.head_dim}"
        return f"{layers} of {self.depth} layers, {heads}, {f'window {self.window}' if self.window else 'no window'}"

    def layers_near(self, wanted: int) -> int:
        """``wanted`` layers, rounded to whole periods, and at least one period."""
        return max(round(wanted / self.period), 1) * self.period


COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, dtype="bfloat16", bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    use_cache=True, attention_bias=False, attention_dropout=0.0, max_position_embeddings=131_072,
)  # fmt: skip

_MISTRAL = dict(
    architectures=["MistralForCausalLM"], model_type="mistral", hidden_size=4096, intermediate_size=14_336,
    max_position_embeddings=32_768, rms_norm_eps=1e-5, hidden_act="silu", rope_theta=1e4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
_GEMMA = dict(
    architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", hidden_size=3840, intermediate_size=15_360,
    rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
)  # fmt: skip
_GPT_OSS = dict(
    architectures=["GptOssForCausalLM"], model_type="gpt_oss", hidden_size=2880, intermediate_size=2880,
    attention_bias=True, rms_norm_eps=1e-5, hidden_act="silu", num_local_experts=32, num_experts_per_tok=4,
    swiglu_limit=7.0, router_aux_loss_coef=0.9, layer_types=["sliding_attention", "full_attention"],
    rope_parameters={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096, "rope_theta": 150_000.0,
    },
)  # fmt: skip

MODELS = {
    model.name: model
    for model in (
        Model("mistral-7b", 32, 1, 32, 8, 128, 4096, True, _MISTRAL),
        Model("gpt-oss-20b", 24, 2, 64, 8, 64, 128, False, _GPT_OSS),
        Model("gemma-3-12b", 48, 6, 16, 8, 256, 1024, True, _GEMMA),
    )
}
"""By name. Every layer of Mistral is windowed, every second one of gpt-oss (which has sinks), five of six of Gemma."""
