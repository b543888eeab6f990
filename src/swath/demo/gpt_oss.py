"""A model of gpt-oss's shape out of a llama model: every second layer windowed, with one sink logit per head.

No training: a sink logit stands in for the leading tokens that a window hides, so it is set to the weight that
attention gives them where it still sees them, log(sum(exp(score))) over the first keys, averaged over queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import swath

LEADING = 4


@torch.no_grad()
def calibrate(model: Any, texts: list[Tensor]) -> Tensor:
    """Sink logits, fp32 [layers, Hq]: mean over the queries of ``texts`` of the LSE over their first 4 keys."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    config = model.config
    sums = torch.zeros(config.num_hidden_layers, config.num_attention_heads, device=model.device)

    def recording(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        sums[module.layer_idx] += leading_lse(q[0], k[0], v[0], options["scaling"]).mean(0)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("swath-calibration", recording)
    AttentionMaskInterface.register("swath-calibration", sdpa_mask)
    before = config._attn_implementation
    model.set_attn_implementation("swath-calibration")
    try:
        for ids in texts:
            model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return sums / len(texts)


def leading_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """LSE, fp32 [T, Hq], of each query of q [Hq, T, D] over the first 4 of its keys k, v [Hkv, T, D]."""
    first = [x[:, :LEADING].transpose(0, 1) for x in (k, v)]
    ends = [torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (q.shape[1], first[0].shape[0])]
    start = torch.zeros(1, dtype=torch.int32, device=q.device)
    _, lse = swath.attention(q.transpose(0, 1), *first, *ends, scale=scale, q_start=start, return_lse=True)
    return lse


def with_sinks(model: Any, sinks: Tensor | None, window: int) -> Any:
    """``model`` (llama) with ``window`` keys in the odd layers and ``sinks`` [layers, Hq] there, sharing its weights.

    The even layers see every key, the leading ones too, so their sink is left at -inf, which is none; with
    ``sinks`` None all are.
    """
    from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "pad_token_id",
        "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias",
    )  # fmt: skip
    config = GraniteSWAConfig(
        **{name: getattr(model.config, name) for name in shared},
        attention_multiplier=model.config.head_dim**-0.5,
        sliding_window=window,
        layer_types=[
            "sliding_attention" if layer % 2 else "full_attention" for layer in range(model.config.num_hidden_layers)
        ],
    )
    shaped = GraniteSWAForCausalLM(config).to(device=model.device, dtype=model.dtype).eval()
    shaped.load_state_dict(model.state_dict(), strict=False, assign=True)
    for index, layer in enumerate(shaped.model.layers):
        sink = layer.self_attn.sinks.data.fill_(-torch.inf)
        if sinks is not None and index % 2:
            sink.copy_(sinks[index])
    return shaped
