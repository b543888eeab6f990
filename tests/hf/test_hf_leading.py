"""``PagedCache(leading_positions="cache")``: leading tokens keep their place in the window, as in StreamingLLM."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import build, error, greedy
from hf_sweep import eager_model
from streaming import streaming_logits
from transformers import PreTrainedModel

import swath.hf
from swath.hf import PagedCache, rotary
from swath.hf.rotary import Rotary
from swath.quant import KVQuant
from swath.window import Window

TOLERANCE = 1e-5
"""Of the largest logit, fp32, as in the other tests of PagedCache. Positions in the text give 0.4 and more."""

SIZE, LEADING, LENGTH, PREFILL = 6, 3, 40, 30
WINDOW = Window(SIZE, global_tokens=LEADING)
IDS = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(2))
KINDS: dict[str, dict[str, Any]] = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=3.0),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
}  # fmt: skip

swath.hf.register()


@cache
def llama(kind: str) -> PreTrainedModel:
    return build("llama", "swath", rope_parameters=KINDS[kind] | dict(rope_theta=1e3))


def opened(model: PreTrainedModel, **options: Any) -> PagedCache:
    model.set_attn_implementation("swath")
    return PagedCache(model.config, **(dict(window=WINDOW, leading_positions="cache", page_size=8, chunk=7) | options))


def served(model: PreTrainedModel, ids: Tensor = IDS, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Logits [B, T, vocabulary]: a prompt in passes of 7 tokens, then token by token."""
    cache = opened(model, **options)
    bounds = [0, *range(min(PREFILL, ids.shape[1]), ids.shape[1] + 1)]
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], attention_mask=None if mask is None else mask[:, :b], past_key_values=cache).logits
            for a, b in pairwise(bounds)
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("model_type", rotary.HALVES + rotary.PAIRS)
def test_every_model_type_is_streaming(model_type: str) -> None:
    model = eager_model(model_type)
    assert error(served(model), streaming_logits(model, IDS, SIZE, LEADING)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_frequencies_is_streaming(kind: str) -> None:
    model = copy.deepcopy(llama(kind))
    ours = served(model)
    assert error(ours, streaming_logits(model, IDS, SIZE, LEADING)) < TOLERANCE
    assert error(ours, served(model, leading_positions="text")) > 0.1


@pytest.mark.parametrize("size", [1, 2, 9, 16])
@pytest.mark.parametrize("leading", [1, 8, 11])
def test_sizes(size: int, leading: int) -> None:
    """Leading tokens that fill a page, several, or part of one, before windows that do."""
    model = copy.deepcopy(llama("default"))
    ours = served(model, window=Window(size, global_tokens=leading))
    assert error(ours, streaming_logits(model, IDS, size, leading)) < TOLERANCE


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    truth = streaming_logits(copy.deepcopy(llama("yarn")), IDS, SIZE, LEADING)
    ours = served(copy.deepcopy(llama("yarn")).cuda(), IDS.cuda())
    assert error(ours.cpu(), truth) < TOLERANCE


@pytest.mark.parametrize("quant", ["int8", "fp8", KVQuant(torch.int8, "channel")], ids=str)
def test_stored_keys_are_not_touched(quant: Any) -> None:
    """What quantisation costs is what it costs with positions in the text: about 0.01 of the logits here."""
    model, truth = llama("default"), {p: served(llama("default"), leading_positions=p) for p in ("text", "cache")}
    lost = {p: float((served(model, quant=quant, leading_positions=p) - t).norm() / t.norm()) for p, t in truth.items()}
    assert 0 < lost["cache"] < 1.5 * lost["text"]


def test_padding() -> None:
    model = llama("default")
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [9]])).long()
    ours, alone = served(model, IDS, mask), served(model, IDS[1:, 9:])
    assert error(ours[1:, 9:], alone) < TOLERANCE
    assert error(ours[:1], served(model, IDS[:1])) < TOLERANCE


def test_generating_cropping_and_beams() -> None:
    """Stored keys do not depend on the position of a query, so a cache can go back and be shared as ever."""
    model = llama("default")
    whole = served(model)
    with torch.no_grad():
        cache = opened(model)
        cache.activate_past_recording()
        model(IDS[:, :PREFILL], past_key_values=cache)
        cache.crop(-10)
        again = model(IDS[:, PREFILL - 10 :], past_key_values=cache).logits
    assert error(again, whole[:, PREFILL - 10 :]) < TOLERANCE
    tokens = greedy(model, IDS, past_key_values=opened(model))
    logits = served(model, tokens[:, :-1])
    assert torch.equal(logits[:, LENGTH - 1 :].argmax(-1), tokens[:, LENGTH:])
    assert torch.equal(greedy(model, IDS, num_beams=2, past_key_values=opened(model))[:, :LENGTH], IDS)


def test_memory_follows_the_window() -> None:
    model = llama("default")
    cache = opened(model)
    greedy(model, IDS[:1], new=60, past_key_values=cache)
    assert cache.layers[0].pages.live == 1 + 2
    shape = cache.layers[0].store.k.shape
    assert copy.deepcopy(cache).layers[0].store.k.shape == shape


def test_before_the_text_is_longer_than_the_cache() -> None:
    model = llama("default")
    short = IDS[:, : SIZE + LEADING]
    assert torch.equal(served(model, short), served(model, short, leading_positions="text"))


def test_layers_of_two_windows() -> None:
    """Layers without leading tokens, or without a window, are as ever."""
    model = llama("default")
    ours = served(model, window=lambda layer: WINDOW if layer else Window())
    assert error(ours, served(model)) > 0.01
    sliding = KINDS["default"] | dict(rope_theta=50.0)
    full = KINDS["linear"] | dict(rope_theta=1e3)
    hybrid = build("gemma3_text", "swath", rope_parameters=dict(full_attention=full, sliding_attention=sliding))
    assert error(served(hybrid), streaming_logits(hybrid, IDS, SIZE, LEADING)) < TOLERANCE


@pytest.mark.parametrize("pairs", [False, True])
def test_far_positions_cost_nothing(pairs: bool) -> None:
    """A million tokens on, a query turned back is the query of the window."""
    frequencies = 1e4 ** (-torch.arange(0, 8, dtype=torch.float64) / 8)
    turning = Rotary(frequencies, pairs)
    q = torch.randn(1, 1, 2, 20, generator=torch.Generator().manual_seed(0))
    distance = torch.tensor([[1_000_000]])
    a, b = q[..., :16].double().unflatten(-1, (8, 2) if pairs else (2, 8)).unbind(-1 if pairs else -2)
    turned = torch.complex(a, b) * torch.polar(torch.ones(8, dtype=torch.float64), -1e6 * frequencies)
    ours = turning.turn_back(q, distance)
    a, b = ours[..., :16].unflatten(-1, (8, 2) if pairs else (2, 8)).unbind(-1 if pairs else -2)
    torch.testing.assert_close(torch.complex(a, b).to(torch.complex128), turned, rtol=0, atol=1e-6)
    assert torch.equal(ours[..., 16:], q[..., 16:])


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gpt2", {}, "models of type gpt2, of which no rotary embedding is known here"),
        ("cohere2", {}, "models of type cohere2"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "'dynamic'"),
    ],
)
def test_refused(model_type: str, options: dict[str, Any], reason: str) -> None:
    model = build(model_type, "swath", **options)
    with pytest.raises(ValueError, match=f"leading_positions: wanted 'text' .*{reason}"):
        opened(model)
    opened(model, leading_positions="text")


def test_wrong_arguments() -> None:
    model = llama("default")
    with pytest.raises(ValueError, match="leading_positions: wanted 'text' or 'cache', got 'Cache'"):
        opened(model, leading_positions="Cache")
    for window in (None, Window(6), Window(global_tokens=3)):
        with pytest.raises(ValueError, match="leading_positions: wanted 'text' without a layer whose window"):
            opened(model, window=window)
