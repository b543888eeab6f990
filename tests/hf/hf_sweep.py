"""Every causal language model of Transformers, as tiny as its configuration allows, on swath and on eager attention.

Each must give eager's logits and tokens, or be refused with a reason. ``make hf-sweep`` runs all of them and fails on
anything else; test_hf_sweep.py runs a selection. ``python tests/hf/hf_sweep.py NAME...`` runs some.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from hf_models import error, padding
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import swath.hf
from swath.hf.attention import attention_forward
from swath.hf.settings import REGISTERED

ALL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NAME = "swath-sweep"
TOLERANCE = 2e-5
"""Of the largest logit, fp32: twice that of test_hf.py, since some of these models have many small layers."""

BATCH, LENGTH, NEW, VOCAB, WINDOW = 2, 20, 6, 120, 5
MAX_PARAMETERS = 20_000_000
IDS = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
# What swath raises, and what Transformers raises for a name that a model's own list of attention classes lacks.
REFUSALS = TypeError, ValueError, KeyError

SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd n_embed dim embed_dim embedding_size embedding_dim hidden_dim word_embed_proj_dim "
    "lru_width hidden_size_per_layer_input intermediate_size ffn_dim d_ff dim_ff ffn_hidden_size "
    "n_inner decoder_ffn_dim encoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size router_hidden_size "
    "intermediate_size_mlp shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "mamba_d_state ssm_state_size state_size mamba_d_ssm chunk_size mamba_chunk_size ple_embed_dim hc_lowrank "
    "vision_output_dim",
    256: "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len index_topk model_max_length "
    "encoder_hash_byte_group_vocab ngram_vocab_size_base",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank qk_head_dim mamba_headdim attention_head_dim mamba_head_dim linear_head_dim",
    WINDOW: "sliding_window attention_window_size window_size",
    8: "head_dim global_head_dim swa_head_dim kv_channels d_kv dim_head v_head_dim qk_nope_head_dim laurel_rank "
    "qk_rope_head_dim index_head_dim mamba_d_head mamba_n_heads mamba_num_heads query_pre_attn_scalar rotary_dim "
    "linear_key_head_dim linear_value_head_dim attention_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "n_mamba_heads linear_num_value_heads linear_num_heads split_ngram_parts num_query_groups",
    2: "num_key_value_heads num_kv_heads num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_topk moe_k index_n_heads "
    "num_experts_per_token moe_top_k num_encoder_layers num_decoder_layers zero_expert_num "
    "n_groups linear_num_key_heads hc_count heads_per_ngram eos_token_id num_encoder_attention_heads "
    "num_decoder_attention_heads decoder_start_token_id",
    1: "n_group topk_group n_shared_experts first_k_dense_replace bos_token_id num_dense_layers",
    0: "pad_token_id num_kv_shared_layers",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
"""Small values for the numbers of configurations, by the names they have there."""

MIXED = dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=64)
INDEXER = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=256, indexer_compress_ratio=2
)  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=2),
    "falcon_h1": dict(mamba_n_heads=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp": dict(text_config=INDEXER),
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(axial_pos_embds_dim=(8, 24), axial_pos_shape=(8, 32)),
    "xmod": dict(default_language="en_XX"),
    "zamba": MIXED,
    "zamba2": MIXED,
    "zaya": dict(num_experts_per_tok=1),
}
"""What a tiny configuration of a model type needs beyond that."""


KINDS = ("right", "own", "refused", "unbuilt", "wrong")


@dataclass(frozen=True)
class Outcome:
    """What became of a model type, with the reason, and what PagedCache did.

    right: eager's results, computed by swath. own: eager's results, and swath was never asked. refused: an error with
    its reason, before a number came out. unbuilt: no tiny model of this type here. wrong: anything else.
    """

    kind: str
    reason: str = ""
    paged: str = ""


def tiny(model_type: str) -> PreTrainedConfig:
    """A configuration with two layers, or one of each kind, and small numbers."""
    special = SPECIAL.get(model_type, {})
    config_class = CONFIG_MAPPING[model_type]
    try:
        values = _small_values(config_class())
    except ValueError:  # some have no default
        values = {}
    return AutoConfig.for_model(model_type, **_merged(values, special))


def _merged(values: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    parts = {
        k: _merged(values[k], v) for k, v in special.items() if isinstance(v, dict) and isinstance(values.get(k), dict)
    }
    return values | special | parts


def _small_values(default: PreTrainedConfig) -> dict[str, Any]:
    given = default.to_dict()
    fixed = {name for name in dir(type(default)) if isinstance(getattr(type(default), name), property)}
    names = [name for name in SMALL if given.get(name, getattr(default, "attribute_map", {}).get(name)) is not None]
    values: dict[str, Any] = {name: SMALL[name] for name in names if name not in fixed}
    if "kv_lora_rank" in values:  # latent attention has keys for every head
        values |= dict(num_key_value_heads=SMALL["num_attention_heads"])
    for kinds in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(given.get(kinds), list) and kinds not in fixed:
            each = list(dict.fromkeys(given[kinds]))
            values[kinds] = each if len(each) > 1 else each * 2
            values["num_hidden_layers"] = len(values[kinds])
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = _small_values(part) | {"model_type": part.model_type}
    return values | ({"is_decoder": True} if "is_decoder" in given else {})


def build(config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval().requires_grad_(False)


def eager_model(model_type: str) -> PreTrainedModel:
    """A model with weights at which attention matters.

    Raises:
        ValueError: it is not small.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(tiny(model_type), "eager").parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its smallest has {size:,} parameters")
    model = build(tiny(model_type), "eager")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            parameter.normal_(0, 0.2)
    return model


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def sweep(model_type: str) -> Outcome:
    """Build a model on both and compare: without and with padding, token by token, and over a PagedCache."""
    try:
        eager = eager_model(model_type)
        if not logits(eager, IDS, torch.ones_like(IDS)).isfinite().all():
            raise ValueError("eager's own logits are not finite")
    except Exception as reason:  # noqa: BLE001 - whatever keeps a model type from being built and run
        return Outcome("unbuilt", _said(reason))
    calls.clear()
    try:
        ours = build(tiny(model_type), NAME)
        ours.load_state_dict(eager.state_dict())
        difference = difference_of(eager, ours)
    except Exception as reason:  # noqa: BLE001 - told apart below
        return Outcome("refused" if isinstance(reason, REFUSALS) else "wrong", _said(reason))
    if difference:
        return Outcome("wrong", difference)
    kind = "right" if calls else "own"
    try:
        paged = generated(ours, past_key_values=swath.hf.PagedCache(ours.config))
    except Exception as reason:  # noqa: BLE001 - some models want a cache of their own kind and do not check
        return Outcome(kind, "", _said(reason))
    same = torch.equal(paged, generated(eager))
    return Outcome(kind, "", "right") if same else Outcome("wrong", "tokens over a PagedCache differ")


def difference_of(eager: PreTrainedModel, ours: PreTrainedModel) -> str:
    """Where the two differ, or nothing.

    Eager is always told that all tokens are real: some models forget causality without a mask.
    """
    for side in ("none", "left"):
        mask = padding(side, BATCH, LENGTH)
        theirs = logits(eager, IDS, torch.ones_like(IDS) if mask is None else mask)
        difference = error(logits(ours, IDS, mask), theirs, mask)
        if not difference < TOLERANCE:
            return f"logits with padding {side} differ by {difference:.1e}"
    return "" if torch.equal(generated(ours), generated(eager)) else "generated tokens differ"


def generated(model: PreTrainedModel, **options: Any) -> Tensor:
    mask = padding("left", BATCH, LENGTH)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


def _said(reason: Exception) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())}"


calls: list[str] = []
"""The layers that asked swath for attention."""


def recorded(function: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    calls.append(type(module).__name__)
    return function(module, *args, **kwargs)


swath.hf.register(NAME)
AttentionInterface.register(NAME, partial(recorded, partial(attention_forward, REGISTERED[NAME])))


GROUPS = {
    "wanted a mask with values": "attention code of their own, which needs a mask with values",
    f"KeyError: '{NAME}'": "attention classes of their own: Transformers does not take the name",
    "as query and key": "keys that the mask does not know of",
    "wanted shape [batch, 1, queries, keys]": "a mask of its own for each head",
    "position_bias": "a position bias",
    "got a mask of another form": "a mask in which queries see keys with gaps between them",
    "got chunked_attention": "layers of chunks",
    "config: wanted layers of": "layers that keep other things than keys and values",
    "the tensor that PagedCache.update returned": "keys or values changed between the cache and the attention",
    "one that read no pages": "keys or values changed between the cache and the attention",
    "all layers with the same tokens": "layers without attention of their own tokens",
    "a PagedCache made for": "a mask that does not say the layer's window",
}
"""Reasons that many models share, by a part of the message."""

DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"
MARKS = "<!-- sweep table: begin -->", "<!-- sweep table: end -->"


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as a table for docs/transformers.md."""
    rows: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        titles = {
            "right": "eager's results",
            "own": "eager's results, by attention code that never asks swath",
            "unbuilt": "not tried: no tiny model of the type",
        }
        rows.setdefault(titles.get(outcome.kind) or f"{outcome.kind}: {_grouped(outcome.reason)}", []).append(name)
        if outcome.kind == "right" and outcome.paged != "right":
            rows.setdefault(f"right, but not over `PagedCache`: {_grouped(outcome.paged)}", []).append(name)
    order = "eager's results", "eager's results,", "right", "refused", "not tried", "wrong"
    ranked = sorted(rows, key=lambda title: max(i for i, start in enumerate(order) if title.startswith(start)))
    lines = [f"| {title} | {len(rows[title])} | {', '.join(rows[title])} |" for title in ranked]
    versions = f"<sub>Transformers {transformers.__version__}, torch {torch.__version__}.</sub>"
    return "\n".join(["| outcome | types | which |", "| --- | ---: | --- |", *lines, "", versions])


def _grouped(reason: str) -> str:
    return next((title for part, title in GROUPS.items() if part in reason), reason[:160])


def main(arguments: list[str]) -> int:
    """Sweep the model types named, or all. ``--docs`` puts the table into the docs. Returns 1 if one is wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    outcomes = {}
    for name in [a for a in arguments if a != "--docs"] or ALL:
        outcomes[name] = outcome = sweep(name)
        print(f"{name:26} {outcome.kind:8} {outcome.paged:8.8} {outcome.reason[:240]}", flush=True)
    print(f"\n{table(outcomes)}")
    if "--docs" in arguments:
        begin, end = MARKS
        before, after = DOCS.read_text().split(begin)[0], DOCS.read_text().split(end)[1]
        DOCS.write_text(f"{before}{begin}\n\n{table(outcomes)}\n\n{end}{after}")
    kinds = [outcome.kind for outcome in outcomes.values()]
    print("\n" + ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS), f"of {len(kinds)} model types")
    return int("wrong" in kinds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
