"""Models under torch.compile: one graph with swath as with sdpa, and masks that are no window refused when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import error, greedy, logits, make, padding, tokens
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig
from transformers.masking_utils import and_masks, causal_mask_function

import swath.hf
from swath.hf.masks import band_mask

TOLERANCE = 1e-5
"""Of the largest logit, fp32, as in test_hf.py."""

swath.hf.register()


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(family: str) -> Any:
    """Traced by dynamo in one piece, and run as it stands: what inductor makes of it is not swath's business."""
    return torch.compile(make(family, "swath"), backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("family", "side", "use_cache"), [("llama", "none", False), ("gemma3", "none", False), ("gemma3", "left", True)]
)
def test_forward_is_one_graph(family: str, side: str, use_cache: bool) -> None:
    """Also for a second length, which the graph takes as a number that it does not know."""
    ours, eager = compiled(family), make(family, "eager")
    for length in (13, 20):
        ids, mask = tokens(2, length), padding(side, 2, length)
        out = logits(ours, ids, mask, use_cache=use_cache)
        assert error(out, logits(eager, ids, mask), mask) < TOLERANCE


def test_static_caches_compile_as_with_sdpa() -> None:
    """Masks are made outside the graph there; it is not compiled again as the text grows."""
    ids, mask = tokens(2, 13), padding("left", 2, 13)
    theirs, graphs = greedy(make("gemma3", "eager"), ids, mask), {}
    for implementation in ("sdpa", "swath"):
        counters.clear()
        torch._dynamo.reset()
        config = CompileConfig(backend="eager", fullgraph=True, mode="default")
        config._compile_all_devices = True
        ours = make("gemma3", implementation)
        assert torch.equal(greedy(ours, ids, mask, cache_implementation="static", compile_config=config), theirs)
        graphs[implementation] = counters["stats"]["unique_graphs"]
    assert graphs["swath"] == graphs["sdpa"] > 0


HOLE = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1]])
PACKED = torch.cat([torch.arange(4), torch.arange(5)])[None]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", dict(attention_mask=HOLE), "padding between tokens"),
        ("llama", dict(position_ids=PACKED, use_cache=False), "a mask of another form"),
        ("mistral", dict(position_ids=PACKED, use_cache=False), "a mask of another form"),
    ],
)
def test_masks_that_are_no_window_are_refused_when_the_graph_runs(
    family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"attention_mask: wanted a causal, .* got {message}"), torch.no_grad():
        compiled(family)(tokens(1, 9), **options)


@pytest.mark.parametrize("hidden", [0, 3, 8])
def test_mask_functions_are_checked_when_the_graph_runs(hidden: int) -> None:
    """The graph takes an unknown one for causal: a column that it hides from all rows is no padding either."""

    def rows(x: Tensor) -> Tensor:
        mask_function = and_masks(causal_mask_function, lambda b, h, q, k: k != hidden)
        return x + band_mask(1, 9, 9, mask_function=mask_function, use_vmap=True).band.varlen_on(x.device)[0]

    with pytest.raises(RuntimeError, match="a mask of another form"):
        torch.compile(rows, backend="eager", fullgraph=True)(torch.zeros(2))


def test_masks_of_the_caller_are_checked_when_the_graph_runs() -> None:
    """A dense mask is taken for the layer's own window."""
    ids, ours = tokens(2, 13), compiled("llama")
    causal = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    assert error(logits(ours, ids, causal), logits(make("llama", "eager"), ids)) < TOLERANCE
    with pytest.raises(RuntimeError, match="a mask of another form"):
        logits(ours, ids, causal.triu(-4))


def test_attention_code_of_a_models_own_is_refused() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=100, hidden_size=32, n_layer=2, n_head=4)
    model = torch.compile(AutoModelForCausalLM.from_config(config, attn_implementation="swath").eval(), backend="eager")
    with pytest.raises(TypeError, match="attention_mask: wanted a mask with values"):
        logits(model, tokens(2, 13))
