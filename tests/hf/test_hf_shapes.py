"""Models whose values are narrower than their keys, whose layers have heads of several sizes, or of 512."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import WINDOW, build, error, greedy, logits, padding, tokens

import swath.hf
from swath.hf import PagedCache
from swath.quant import KVQuant

TOLERANCE = 2e-5
"""Of the largest logit, fp32."""

MOE = dict(num_experts_per_tok=2, n_routed_experts=2, moe_intermediate_size=32, mlp_layer_types=["dense", "sparse"])
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "keys of 192, values of 128, sinks": ("mimo_v2_flash", MOE | dict(head_dim=192, v_head_dim=128)),
    "full layers of 512, K = V": (
        "gemma4_text",
        dict(head_dim=256, global_head_dim=512, attention_k_eq_v=True, num_global_key_value_heads=1,
             hidden_size_per_layer_input=8, vocab_size_per_layer_input=61),
    ),
}  # fmt: skip
swath.hf.register()


@pytest.mark.parametrize("name", MODELS)
def test_eager_s_logits_and_tokens(name: str) -> None:
    model_type, options = MODELS[name]
    eager, ours = (build(model_type, implementation, **options) for implementation in ("eager", "swath"))
    ids, mask = tokens(2, 19), padding("left", 2, 19)
    assert error(logits(ours, ids, mask), logits(eager, ids, mask), mask) < TOLERANCE
    theirs = greedy(eager, ids, mask, new=12)
    assert torch.equal(greedy(ours, ids, mask, new=12), theirs)
    cache = PagedCache(ours.config, page_size=8, chunk=7)
    assert torch.equal(greedy(ours, ids, mask, new=12, past_key_values=cache), theirs)
    windows = [layer.pages.window.size for layer in cache.layers]
    assert windows == [WINDOW, None]


@pytest.mark.parametrize("quant", ["int8", KVQuant(torch.int8, "channel"), KVQuant(torch.int8, "token", "head")])
def test_an_int8_cache_of_narrow_values(quant: Any) -> None:
    """Static scales follow the first tokens of K and of V, each by its own width; pools grow."""
    model_type, options = MODELS["keys of 192, values of 128, sinks"]
    ours = build(model_type, "swath", **options)
    ids = tokens(2, 19)
    exact = logits(ours, ids)
    cache = PagedCache(ours.config, page_size=8, quant=quant)
    parts = [logits(ours, ids[:, :9], past_key_values=cache), logits(ours, ids[:, 9:], past_key_values=cache)]
    assert error(torch.cat(parts, 1), exact) < 0.05
    store = cache.layers[0].store
    assert (store.head_dim, store.v_head_dim) == (192, 128)
    assert cache.layers[0].page_bytes * store.num_pages <= store.nbytes
