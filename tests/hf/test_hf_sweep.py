"""Models of Transformers, chosen from the sweep of all (``make hf-sweep``): right, or refused with a reason."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_sweep import ALL, sweep

RIGHT = ("bart", "bert", "cohere2", "gemma3", "gpt2", "modernbert-decoder", "moshi", "phi3", "zamba2")
"""Asks swath for every attention, with masks and layers of many kinds."""

OWN_CODE = ("bloom", "codegen", "mpt", "rembert", "trocr", "xglm")
"""Attention code of the model's own, in some release, which adds the mask to scores or selects with it."""

NEVER_ASKS = ("mamba", "openai-gpt", "xlnet")
"""Makes no mask, and does not ask swath: its own results."""


@pytest.mark.parametrize("model_type", RIGHT)
def test_right(model_type: str) -> None:
    assert sweep(model_type).kind == "right", sweep(model_type).reason


@pytest.mark.parametrize("model_type", OWN_CODE)
def test_attention_code_of_their_own(model_type: str) -> None:
    """They would run without causality if the mask had values."""
    outcome = sweep(model_type)
    refused = outcome.reason.startswith("TypeError: attention_mask: wanted a mask with values")
    assert outcome.kind == "right" or refused, outcome


@pytest.mark.parametrize("model_type", NEVER_ASKS)
def test_those_that_never_ask(model_type: str) -> None:
    assert sweep(model_type).kind == "own"


@pytest.mark.parametrize("model_type", ["doge", "deepseek_v4", "inkling_text", "llama4_text", "gptj"])
def test_masks_and_biases_that_are_no_window(model_type: str) -> None:
    """A mask of each head, keys that the mask does not know of, a bias, chunks, a name that the model lacks."""
    if model_type not in ALL:
        pytest.skip(f"this release of Transformers has no {model_type}")
    assert sweep(model_type).kind in ("refused", "right"), sweep(model_type).reason
