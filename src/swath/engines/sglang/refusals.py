"""What swath does not compute, refused with the reason while the server starts."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from swath.engines.sglang.versions import Settings
from swath.errors import bad_value
from swath.ops.arguments import MAX_HEAD_DIM

ONLY = {
    "is_cross_attention": False,
    "logit_capping_method": "tanh",
    "pos_encoding_mode": "NONE",
    "use_irope": False,  # attention within chunks (Llama 4)
}
"""What SGLang's layers may ask for, by the attributes that say so."""


def check_model(runner: Any) -> None:
    """Keys and values for each kv head, of one sequence of tokens."""
    if runner.use_mla_backend:
        raise bad_value("model", "keys and values for each kv head", "latent attention (MLA)")
    if runner.model_config.is_encoder_decoder:
        raise bad_value("model", "a decoder alone", "an encoder and a decoder")


def check_pool(pool: Any) -> None:
    """Pools [slots, heads, head_dim] that hold what their dtype says."""
    layout = pool.kv_cache_layout
    if type(pool) is not MHATokenToKVPool or layout != "nhd":
        raise bad_value("token_to_kv_pool", "MHATokenToKVPool in the layout nhd", f"{type(pool).__name__} in {layout}")
    if getattr(pool, "is_quantized_kv_cache", False):
        raise bad_value("kv_cache_dtype", "bf16, fp8_e4m3 or fp8_e5m2", pool.quant_method.name)


def check_layer(layer: Any, mistaken: AttentionType | None = None) -> None:
    """Causal attention with a window or without; a layer of type ``mistaken`` is causal too."""
    if layer.attn_type not in (AttentionType.DECODER, mistaken):
        raise bad_value("RadixAttention.attn_type", AttentionType.DECODER.value, layer.attn_type.value)
    for name, wanted in ONLY.items():
        if getattr(layer, name) != wanted:
            raise bad_value(f"RadixAttention.{name}", repr(wanted), repr(getattr(layer, name)))
    if layer.xai_temperature_len > 0:
        raise bad_value("RadixAttention.xai_temperature_len", "no temperature", layer.xai_temperature_len)
    k_width, v_width = layer.head_dim, layer.v_head_dim
    if k_width % 8 or v_width % 8 or not v_width <= k_width <= MAX_HEAD_DIM:
        wanted = f"multiples of 8, at most {MAX_HEAD_DIM} for keys and no more for values"
        raise bad_value("RadixAttention.head_dim", wanted, (k_width, v_width))


def check_drafts(settings: Settings) -> None:
    """Speculation whose drafts are chains."""
    if settings.algorithm == "NGRAM":
        raise bad_value("speculative_algorithm", "one whose drafts are chains", settings.algorithm)
    check_topk(settings.topk)


def check_topk(topk: int | None) -> None:
    """Drafts that follow one another."""
    if topk not in (None, 0, 1):
        raise bad_value("speculative_eagle_topk", "1: drafts in chains, not in trees", topk)


def chain_length(spec_info: Any) -> int:
    """Tokens that a verification adds to each sequence, which must be a chain and as long for all."""
    check_topk(spec_info.tree_topk if hasattr(spec_info, "tree_topk") else spec_info.topk)
    if getattr(spec_info, "ragged_verify_layout", None) is not None:
        raise bad_value("ragged_verify_layout", "None: as many drafts for each sequence", "a layout")
    return int(spec_info.draft_token_num)
