"""PagedCache under ``generate``: exact without quantisation, bounded by the window, and safe to crop and share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import FAMILIES, SLIDING, WINDOW, error, greedy, logits, make, padding, tokens
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import swath.hf
from swath.hf import PagedCache
from swath.hf.attention import attention_forward
from swath.hf.cache import PagedLayer
from swath.hf.masks import band_mask
from swath.hf.pages import Pages
from swath.hf.settings import Settings
from swath.quant import KVQuant, dequantise, quantise, token_scale
from swath.window import Window

TOLERANCE = 1e-5
LENGTH, PAGE = 19, 8

INT8_BUDGET = 3 / 127
"""RMS error over RMS of the logits: three steps of int8 after two layers, whose K and V are rounded by at most half a
step each. Random weights are the hard case; the largest seen is 2.2 steps."""

FP8_BUDGET = 2 * 2**-4
"""The same for e4m3: twice the largest error of one rounding, which keeps three bits after the first."""

swath.hf.register()


def paged(model: PreTrainedModel, **options: Any) -> PagedCache:
    return PagedCache(model.config, page_size=PAGE, **options)


def live(layer: PagedLayer) -> int:
    return layer.pages.live


def poison_free_pages(cache: PagedCache) -> None:
    """NaN in every page that belongs to nobody."""
    for layer in cache.layers:
        if layer.store is not None:
            free = torch.tensor(layer.pages._free, dtype=torch.long)
            layer.store.k[free] = torch.nan
            layer.store.v[free] = torch.nan


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_eager(family: str, chunk: int) -> None:
    ids, mask = tokens(3, LENGTH), padding("left", 3, LENGTH)
    ours = make(family, "swath")
    cache = paged(ours, chunk=chunk)
    theirs = greedy(make(family, "eager"), ids, mask, 40)
    assert torch.equal(greedy(ours, ids, mask, 40, past_key_values=cache), theirs)
    assert cache.get_seq_length() == LENGTH + 39


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_on_a_gpu(family: str) -> None:
    ids, mask, ours = tokens(3, LENGTH).cuda(), padding("left", 3, LENGTH), make(family, "swath").cuda()
    assert mask is not None
    theirs = greedy(make(family, "eager").cuda(), ids, mask.cuda(), num_beams=2)
    assert torch.equal(greedy(ours, ids, mask.cuda(), num_beams=2, past_key_values=paged(ours, chunk=7)), theirs)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_eager(family: str, side: str) -> None:
    ids, mask = tokens(3, LENGTH), padding(side, 3, LENGTH)
    ours = make(family, "swath")
    out = logits(ours, ids, mask, past_key_values=paged(ours, chunk=7))
    assert error(out, logits(make(family, "eager"), ids, mask), mask) < TOLERANCE


@pytest.mark.parametrize("family", SLIDING)
def test_pages_behind_the_window_are_reused(family: str) -> None:
    """Step by step, with NaN in every page that is free: released neither late nor early."""
    ids, ours, chunk = tokens(2, 64), make(family, "swath"), 16
    theirs = logits(make(family, "eager"), ids)
    cache = paged(ours, chunk=chunk)
    sliding = next(layer for layer in cache.layers if layer.is_sliding)
    assert error(logits(ours, ids[:, :40], past_key_values=cache), theirs[:, :40]) < TOLERANCE
    assert sliding.pages.peak <= 2 * ((WINDOW - 1 + chunk) // PAGE + 2)
    for i in range(40, 64):
        poison_free_pages(cache)
        assert error(logits(ours, ids[:, i : i + 1], past_key_values=cache), theirs[:, i : i + 1]) < TOLERANCE
        # The keys i - WINDOW + 1 .. i of two sequences.
        assert live(sliding) == 2 * (i // PAGE - (i - WINDOW + 1) // PAGE + 1)
        assert sliding.pages.num_pages <= 2 * sliding.pages.peak
    full = [layer for layer in cache.layers if not layer.is_sliding]
    assert [live(layer) for layer in full] == [2 * 64 // PAGE] * len(full)


def test_leading_pages_stay() -> None:
    """Window and leading tokens for a full-attention model; the padded sequence keeps its own leading tokens."""
    window = Window(4, global_tokens=3)
    swath.hf.register("swath-leading", window=window)
    ids, mask = tokens(2, 60), padding("left", 2, 60)
    dense, ours = make("llama", "swath-leading"), make("llama", "swath-leading")
    cache = paged(ours, chunk=16)
    theirs = logits(dense, ids, mask)
    assert (
        error(logits(ours, ids[:, :30], mask[:, :30], past_key_values=cache), theirs[:, :30], mask[:, :30]) < TOLERANCE
    )
    for i in range(30, 60):
        poison_free_pages(cache)
        out = logits(ours, ids[:, i : i + 1], mask[:, : i + 1], past_key_values=cache)
        assert error(out, theirs[:, i : i + 1]) < TOLERANCE
        assert live(cache.layers[0]) <= 2 * (1 + 2)


def test_a_window_of_the_cache_alone() -> None:
    """``PagedCache(window=...)`` is the same as the window given to register."""
    swath.hf.register("swath-leading", window=Window(4, global_tokens=3))
    ids = tokens(1, 30)
    theirs = logits(make("llama", "swath-leading"), ids)
    ours = make("llama", "swath")
    assert error(logits(ours, ids, past_key_values=paged(ours, window=Window(4, global_tokens=3))), theirs) < TOLERANCE
    only_first = paged(ours, window=lambda i: Window(4) if i == 0 else None)
    logits(ours, ids, past_key_values=only_first)
    assert [layer.pages.window for layer in only_first.layers] == [Window(4), Window()]


class FakeQuantLayer(DynamicLayer):
    """Keys and values rounded to int8 with a scale per token and head, and back, for eager attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rounded = []
        for x in (key_states, value_states):
            scale = token_scale(x, torch.int8)[..., None]
            rounded.append(dequantise(quantise(x, scale, torch.int8), scale))
        return super().update(*rounded)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_eager_over_rounded_keys(family: str) -> None:
    """Token by token through one layer; a second would round inputs that differ in their last bits."""
    ids, ours, eager = tokens(2, 30), make(family, "swath"), make(family, "eager")
    for model in (ours, eager):
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
        model.config.layer_types = getattr(model.config, "layer_types", None) and model.config.layer_types[:1]
    cache, twin = paged(ours, quant="int8", chunk=7), DynamicCache()
    twin.layers = [FakeQuantLayer()]
    for part in (ids[:, :20], *ids[:, 20:].split(1, 1)):
        theirs = logits(eager, part, past_key_values=twin)
        assert error(logits(ours, part, past_key_values=cache), theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("quant", "budget"),
    [("int8", INT8_BUDGET), (KVQuant(torch.int8, "channel"), 2 * INT8_BUDGET), ("fp8", FP8_BUDGET)],
    ids=["int8-token", "int8-channel", "fp8-token"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_is_close_to_fp32(family: str, quant: KVQuant | str, budget: float) -> None:
    ids, ours = tokens(2, 40), make(family, "swath")
    theirs = logits(make(family, "eager"), ids)
    cache = paged(ours, quant=quant)
    parts = [logits(ours, part, past_key_values=cache) for part in (ids[:, :32], *ids[:, 32:].split(1, 1))]
    relative = float((torch.cat(parts, 1) - theirs).norm() / theirs.norm())
    assert 1e-4 < relative < budget


def test_bytes_in_use() -> None:
    ours = make("qwen3", "swath")
    cache, plain = paged(ours, quant="int8"), paged(ours)
    assert cache.nbytes_live == cache.nbytes_peak == 0
    for c in (cache, plain):
        logits(ours, tokens(2, 40), past_key_values=c)
    pages = 2 * 5  # of each layer
    per_token = 2 * (2 * 8 + 2 * 4)  # 2 kv heads; 8 int8 elements of K and of V, and two fp32 scales
    assert cache.nbytes_live == cache.nbytes_peak == 2 * pages * PAGE * per_token
    assert plain.nbytes_live == 2 * pages * PAGE * 2 * 2 * 8 * 4
    logits(ours, tokens(2, 1), past_key_values=cache)
    assert cache.nbytes_live == 2 * (2 + 6) * PAGE * per_token
    assert cache.nbytes_peak == (pages + 2 * 6) * PAGE * per_token
    cache.reset()
    assert cache.nbytes_live == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family: str) -> None:
    ids, mask, ours = tokens(2, LENGTH), padding("left", 2, LENGTH), make(family, "swath")
    cache = paged(ours)
    theirs = greedy(make(family, "eager"), ids, mask, num_beams=3)
    assert torch.equal(greedy(ours, ids, mask, num_beams=3, past_key_values=cache), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_goes_back(family: str) -> None:
    ids, ours = tokens(1, LENGTH), make(family, "swath")
    cache = paged(ours)
    theirs = greedy(make(family, "eager"), ids)
    assert torch.equal(greedy(ours, ids, prompt_lookup_num_tokens=3, past_key_values=cache), theirs)
    assert all(live(layer) <= 2 for layer in cache.layers if layer.is_sliding)


def test_a_second_turn() -> None:
    ids, mask = tokens(2, LENGTH), padding("left", 2, LENGTH)
    ours, eager = make("gpt_oss", "swath"), make("gpt_oss", "eager")
    cache = paged(ours)
    first = greedy(ours, ids, mask, past_key_values=cache)
    mask = torch.nn.functional.pad(mask, (0, first.shape[1] - LENGTH), value=1)
    assert torch.equal(greedy(ours, first, mask, past_key_values=cache), greedy(eager, first, mask))


def test_shared_pages_are_copied_before_they_differ() -> None:
    """Sequences that share all their pages, cut back into a full page, continue each its own way."""
    ids, ours = tokens(1, 24), make("qwen3", "swath")
    cache = paged(ours)
    cache.activate_past_recording()
    logits(ours, ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert [live(layer) for layer in cache.layers] == [3, 3]
    cache.crop(-4)
    tails = tokens(3, 9, seed=5)
    whole = torch.cat([ids[:, :20].expand(3, -1), tails], 1)
    theirs = logits(make("qwen3", "eager"), whole)
    assert error(logits(ours, tails, past_key_values=cache), theirs[:, 20:]) < TOLERANCE
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.reorder_cache(torch.tensor([1, 1]))
    more = tokens(2, 3, seed=6)
    theirs = logits(make("qwen3", "eager"), torch.cat([whole[[0, 0]], more], 1))
    assert error(logits(ours, more, past_key_values=cache), theirs[:, -3:]) < TOLERANCE
    cache.reset()
    assert error(logits(ours, ids, past_key_values=cache), logits(make("qwen3", "eager"), ids)) < TOLERANCE


def test_crop_needs_the_keys_it_goes_back_to() -> None:
    ids, ours = tokens(1, 40), make("mistral", "swath")
    cache = paged(ours)
    logits(ours, ids[:, :39], past_key_values=cache)
    logits(ours, ids[:, 39:], past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="crop: wanted fewer tokens"):
        cache.crop(-10)
    cache.crop(-1)
    out = logits(ours, ids[:, 39:], past_key_values=cache)
    assert error(out, logits(make("mistral", "eager"), ids)[:, -1:]) < TOLERANCE
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(3)


def test_crop_needs_the_page_it_goes_on_in() -> None:
    """Even if the next query sees no key there."""
    pages = Pages(Window(1), page_size=16, chunk=64)
    for seen, new in ((0, 39), (39, 1)):
        pages.extend(seen, new, [0], torch.device("cpu"))
    with pytest.raises(ValueError, match="crop: wanted fewer tokens"):
        pages.check_crop(20)
    pages.check_crop(32)
    pages.crop(32)
    assert pages.live == 0, "position 32 begins a page"


def test_pages_are_reused_after_a_crop_to_nothing() -> None:
    ids, ours = tokens(1, 64), make("mistral", "swath")
    cache = paged(ours, chunk=16)
    for _ in range(2):
        out = logits(ours, ids, past_key_values=cache)
        assert error(out, logits(make("mistral", "eager"), ids)) < TOLERANCE
        assert cache.layers[0].pages.peak <= (WINDOW - 1 + 16) // PAGE + 2
        cache.crop(-64)
        assert cache.nbytes_live == cache.get_seq_length() == 0


def test_padding_longer_than_a_call() -> None:
    """A sequence may be all padding in the first calls, and after a crop; nothing else moves its first token."""
    ids, ours = tokens(2, 12), make("qwen3", "swath")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :7] = 0
    cache = paged(ours)
    theirs = logits(make("qwen3", "eager"), ids, mask)
    cache.activate_past_recording()
    for a, b in ((0, 5), (5, 10), (10, 12), (3, 6), (6, 12)):
        cache.crop(a - cache.get_seq_length())
        out = logits(ours, ids[:, a:b], mask[:, :b], past_key_values=cache)
        assert error(out, theirs[:, a:b], mask[:, a:b]) < TOLERANCE
    with pytest.raises(ValueError, match="attention_mask: wanted 7 padded columns"):
        logits(ours, ids[:, :1], torch.ones(2, 13, dtype=torch.long), past_key_values=cache)


def test_right_padding_ends_a_text() -> None:
    ids, mask, ours = tokens(2, LENGTH), padding("right", 2, LENGTH), make("llama", "swath")
    with pytest.raises(ValueError, match="pad on the left"):
        greedy(ours, ids, mask, past_key_values=paged(ours))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_implementation_is_refused(implementation: str) -> None:
    """It would see the new keys only."""
    ours = make("llama", implementation)
    with pytest.raises(ValueError, match="attn_implementation"):
        logits(ours, tokens(1, 4), past_key_values=paged(ours))


def test_keys_that_never_reach_swath_are_noticed() -> None:
    layer = paged(make("llama", "swath")).layers[0]
    x = torch.zeros(1, 2, 3, 8)
    layer.update(x, x)
    with pytest.raises(ValueError, match="read no pages"):
        layer.update(x, x)


@pytest.mark.parametrize("changed", ["key", "value"])
def test_keys_and_values_that_the_model_changes_are_refused(changed: str) -> None:
    """DiffLlama repeats its values after the cache: the pages hold others than those it attends to."""
    ours, x = make("llama", "swath"), torch.randn(1, 2, 3, 8)
    given = dict(zip(("key", "value"), paged(ours).update(x, x, 0), strict=True))
    given[changed] = given[changed] * 2
    with pytest.raises(ValueError, match=rf"{changed}: wanted the tensor that PagedCache.update returned"):
        attention_forward(Settings(), ours.model.layers[0].self_attn, x, attention_mask=None, **given)


def test_rows_that_are_not_the_newest_are_refused() -> None:
    ours, x = make("llama", "swath"), torch.randn(1, 2, 4, 8)
    given = dict(zip(("key", "value"), paged(ours).update(x, x, 0), strict=True))
    with pytest.raises(ValueError, match="attention_mask: wanted rows for the newest tokens"):
        attention_forward(
            Settings(), torch.nn.Module(), x[:, :, :2], attention_mask=band_mask(1, 4, 4)[:, :, :2], **given
        )


def test_another_window_than_the_caches_is_refused() -> None:
    swath.hf.register("swath-later", window=Window(3))
    ours = make("llama", "swath")
    cache = paged(ours)
    ours.set_attn_implementation("swath-later")
    with pytest.raises(ValueError, match="past_key_values: wanted a PagedCache made for"):
        logits(ours, tokens(1, 4), past_key_values=cache)


def test_another_batch_is_refused() -> None:
    ours = make("llama", "swath")
    cache = paged(ours)
    logits(ours, tokens(2, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: wanted 2 sequences"):
        logits(ours, tokens(3, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"quant": "int4"}, "quant"),
        ({"page_size": 20}, "page_size"),
        ({"page_size": 16.0}, "page_size"),
        ({"chunk": 0}, "chunk"),
        ({"window": Window(4, causal=False)}, "window"),
        ({"window": 4}, "window"),
        ({"window": Window(bounds=torch.zeros(2, 2, dtype=torch.int32))}, "window.bounds"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], argument: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: "):
        PagedCache(make("llama", "swath").config, **options)


def test_layers_without_keys_are_refused() -> None:
    config = make("qwen3", "swath").config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"config: .*linear_attention"):
        PagedCache(config)
