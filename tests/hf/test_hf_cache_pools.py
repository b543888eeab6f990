"""What PagedCache stores: pools that follow what is held, keys that several layers read, static scales."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import HYBRID, WINDOW, build, error, greedy, logits, make, padding, tokens
from transformers import PreTrainedModel

import swath.hf
from swath.hf import PagedCache
from swath.hf.attention import attention_forward
from swath.hf.layer import CALIBRATION_TOKENS
from swath.hf.pages import Pages
from swath.hf.settings import Settings
from swath.quant import KVQuant, calibrate, dequantise, spread
from swath.window import Window

TOLERANCE = 1e-5
PAGE = 8

swath.hf.register()


def paged(model: PreTrainedModel, **options: Any) -> PagedCache:
    return PagedCache(model.config, page_size=PAGE, **options)


SHARED: dict[str, Any] = dict(
    num_hidden_layers=6, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=HYBRID["vocab_size"],
)  # fmt: skip
READERS: dict[str, dict[str, Any]] = {
    "gemma3n_text": SHARED | dict(activation_sparsity_pattern=[0.0] * 6, laurel_rank=4, altup_num_inputs=2),
    "gemma4_text": SHARED | dict(global_head_dim=16),
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("model_type", READERS)
def test_layers_read_the_keys_of_another(model_type: str, chunk: int, options: dict[str, int]) -> None:
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    ids, mask = tokens(batch, 19), padding("left", batch, 19)
    theirs = greedy(build(model_type, "eager", **READERS[model_type]), ids, mask, **options)
    ours = build(model_type, "swath", **READERS[model_type])
    cache = paged(ours, chunk=chunk)
    assert torch.equal(greedy(ours, ids, mask, past_key_values=cache, **options), theirs)
    sliding = [layer.pages for layer in cache.layers[:4] if layer.is_sliding]
    assert all(pages.live <= 2 * pages.batch for pages in sliding), "old pages are released, if only by the next call"


def test_keys_read_again_need_one_pass() -> None:
    """A layer that the configuration does not announce: its first keys are gone when it asks for them."""
    ours, x = make("mistral", "swath"), torch.randn(1, 2, 13, 8)
    key, value = paged(ours, chunk=4).update(x, x, 0)
    read = partial(attention_forward, Settings(), ours.model.layers[1].self_attn, x, key, value, None)
    read(sliding_window=WINDOW)
    with pytest.raises(ValueError, match=r"chunk: wanted at least 13, .* got 4"):
        read(sliding_window=WINDOW)


def test_keys_of_an_earlier_call_are_not_read_again() -> None:
    ours, x = make("llama", "swath"), torch.randn(1, 2, 13, 8)
    cache = paged(ours)
    key, value = cache.update(x, x, 0)
    read = partial(attention_forward, Settings(), ours.model.layers[1].self_attn, x, key, value, None)
    assert torch.equal(read()[0], read()[0])
    cache.layers[0].pages.select([0])
    with pytest.raises(ValueError, match="key: wanted keys of the newest call"):
        read()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, WINDOW])
def test_layers_on_several_devices(window: int | None) -> None:
    """One table for both; a model may be spread over devices."""
    ours = make("mistral" if window else "llama", "swath")
    caches = [paged(ours, chunk=7) for _ in range(2)]
    for length in (20, 1, 3):
        x = torch.randn(2, 4, length, 8)
        for layer_idx, device in enumerate(("cuda", "cpu")):
            module, outs = ours.model.layers[layer_idx].self_attn, []
            for cache, to in zip(caches, (device, "cpu"), strict=True):
                key, value = cache.update(x[:, :2].to(to), x[:, 2:].to(to), layer_idx)
                out, _ = attention_forward(Settings(), module, x.to(to), key, value, None, sliding_window=window)
                outs.append(out.cpu())
            assert error(*outs) < TOLERANCE


def test_a_pass_goes_to_the_device_of_a_layer() -> None:
    here, there = torch.device("cpu"), torch.device("meta")
    (only,) = Pages(Window(), page_size=PAGE, chunk=16).extend(0, 5, [0, 2], here)
    assert only.on(here) is only
    moved = only.on(there)
    assert {x.device for x in (moved.slot_mapping, moved.block_table, moved.seq_lens)} == {there}
    assert moved.max_kv_len == only.max_kv_len == 5


# What the pools take


@pytest.mark.parametrize("window", [Window(0, global_tokens=3), Window(0), Window(1), Window(9, global_tokens=9)])
def test_pages_behind_any_window_are_reused(window: Window) -> None:
    """Also where a query does not see its own key."""
    swath.hf.register("swath-behind", window=window)
    ids, mask, ours = tokens(2, 60), padding("left", 2, 60), make("llama", "swath-behind")
    cache, theirs = paged(ours, chunk=16), logits(ours, ids, mask)
    assert (
        error(logits(ours, ids[:, :40], mask[:, :40], past_key_values=cache), theirs[:, :40], mask[:, :40]) < TOLERANCE
    )
    leading, size = window.global_tokens, window.size or 0
    for i in range(40, 60):
        out = logits(ours, ids[:, i : i + 1], mask[:, : i + 1], past_key_values=cache)
        assert error(out, theirs[:, i : i + 1]) < TOLERANCE
        held = sum(-(-leading // PAGE) + p // PAGE - max(p - max(size, 1) + 1, 0) // PAGE + 1 for p in (i, i - 7))
        assert cache.layers[0].pages.live <= held


def test_a_window_without_its_query_can_be_cropped() -> None:
    pages = Pages(Window(0, global_tokens=3), page_size=PAGE, chunk=16)
    for seen, new in ((0, 39), (39, 1)):
        pages.extend(seen, new, [0], torch.device("cpu"))
    assert pages.live == 2, "the leading tokens' page and that of the newest token"
    pages.check_crop(36)
    pages.check_crop(24)
    with pytest.raises(ValueError, match="crop"):
        pages.check_crop(20)
    pages.crop(24)
    assert pages.live == 1, "position 24 begins a page"


@pytest.mark.parametrize("chunk", [16, 512])
def test_memory_comes_back_after_a_long_prompt(chunk: int) -> None:
    ids, ours = tokens(2, 200), make("mistral", "swath")
    cache, theirs = paged(ours, chunk=chunk), logits(make("mistral", "eager"), ids)
    logits(ours, ids[:, :150], past_key_values=cache)
    assert cache.nbytes_live <= cache.nbytes_allocated <= 2 * cache.nbytes_live
    sizes = set()
    for i in range(150, 200):
        assert error(logits(ours, ids[:, i : i + 1], past_key_values=cache), theirs[:, i : i + 1]) < TOLERANCE
        assert cache.nbytes_allocated == sum(layer.store.nbytes for layer in cache.layers)
        sizes.add(cache.layers[0].pages.num_pages)
    # A sequence has at most 2 pages, one of them for the newest tokens, and one to spare.
    assert len(sizes) == 1, "decode neither grows nor shrinks"
    assert sizes.pop() <= 2 * 3


def test_pools_follow_what_is_held() -> None:
    """A full layer grows by half, so that a step seldom copies; it shrinks after a crop, and keeps its contents."""
    ids, ours = tokens(2, 200), make("llama", "swath")
    cache, theirs = paged(ours, quant="int8"), paged(ours, quant="int8")
    pages, sizes = cache.layers[0].pages, []
    for a, b in ((0, 100), *((i, i + 1) for i in range(100, 160))):
        logits(ours, ids[:, a:b], past_key_values=cache)
        sizes.append(pages.num_pages)
    assert sorted(set(sizes)) == [2 * 13 + 2, 2 * 14 * 3 // 2]
    cache.crop(-140)
    out = logits(ours, ids[:, 20:30], past_key_values=cache)
    assert pages.num_pages == 2 * 4 + 2
    logits(ours, ids[:, :20], past_key_values=theirs)
    assert error(out, logits(ours, ids[:, 20:30], past_key_values=theirs)) < TOLERANCE


# Static scales


def stored(cache: PagedCache, name: str) -> Tensor:
    """Keys or values of the first layer and sequence, [T, Hkv, D], scales applied."""
    layer, scale = cache.layers[0], getattr(cache.layers[0].store, f"{name}_scale")
    pages = getattr(layer.store, name)[layer.pages._rows[0].pages]
    granularity = layer.store.quant.k
    return dequantise(pages, spread(granularity, scale)).transpose(1, 2).flatten(0, 1)[: layer.length]


@pytest.mark.parametrize("cuts", [(1, 24), (4, 24), (1, 2, 3, 24)])
@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [(torch.int8, "tensor"), (torch.int8, "head"), (torch.int8, "channel"), (torch.float8_e4m3fn, "head")],
)
def test_static_scales_cover_the_calls_after_a_short_first_one(
    dtype: torch.dtype, granularity: str, cuts: tuple[int, ...]
) -> None:
    """The keys of the first layer do not depend on what is stored: their scales must be those of one call."""
    ids, ours = tokens(1, 24), make("llama", "swath")
    at_once, plain, cache = (
        paged(ours, quant=q) for q in (KVQuant(dtype, granularity), None, KVQuant(dtype, granularity))
    )
    for c in (at_once, plain):
        logits(ours, ids, past_key_values=c)
    for a, b in pairwise((0, *cuts)):
        logits(ours, ids[:, a:b], past_key_values=cache)
    for name in ("k", "v"):
        scale = getattr(cache.layers[0].store, f"{name}_scale")
        torch.testing.assert_close(scale, getattr(at_once.layers[0].store, f"{name}_scale"))
        exact = stored(plain, name)
        if dtype == torch.int8:  # half a step for each time that a value is rounded
            step = spread(granularity, scale)
            step = step if granularity == "tensor" else step.transpose(0, 1)
            assert ((stored(cache, name) - exact).abs() <= 0.5001 * len(cuts) * step).all()
        else:
            assert (stored(cache, name) - exact).norm() < len(cuts) * 2**-4 * exact.norm()


def test_static_scales_stay_after_the_first_tokens() -> None:
    """A token at a time; they cover the tokens of calls that found fewer than that before them."""
    ids, ours, quant = tokens(1, CALIBRATION_TOKENS + 20), make("llama", "swath"), KVQuant(torch.int8, "channel")
    plain, cache = paged(ours), paged(ours, quant=quant)
    logits(ours, ids, past_key_values=plain)
    for i in range(ids.shape[1]):
        logits(ours, ids[:, i : i + 1], past_key_values=cache)
    for name in ("k", "v"):
        first = stored(plain, name)[:CALIBRATION_TOKENS]
        scale = getattr(cache.layers[0].store, f"{name}_scale")
        torch.testing.assert_close(scale, calibrate(first, torch.int8, "channel"))


def test_static_scales_begin_anew_with_the_text() -> None:
    ours, quant = make("llama", "swath"), KVQuant(torch.int8, "channel")
    used, new = paged(ours, quant=quant), paged(ours, quant=quant)
    logits(ours, tokens(3, 50), past_key_values=used)
    ids = tokens(2, 30, seed=7)
    for forget in (used.reset, lambda: used.crop(-30)):
        forget()
        out = logits(ours, ids, past_key_values=used)
        new.reset()
        assert torch.equal(out, logits(ours, ids, past_key_values=new))


def test_static_scales_are_not_those_of_padding() -> None:
    ids, mask, ours = tokens(1, 20), torch.ones(1, 20, dtype=torch.long), make("llama", "swath")
    mask[0, :8], ids[0, :8] = 0, 0
    values = ours.model.layers[0].self_attn.v_proj.weight
    ours.model.embed_tokens.weight[0] = values[0]  # the padding's value would be the largest of all
    scales = []
    for a in (0, 8):
        cache = paged(ours, quant=KVQuant(torch.int8, "tensor"))
        logits(ours, ids[:, a:], mask[:, a:], past_key_values=cache)
        scales.append(cache.layers[0].store.v_scale)
    assert torch.equal(*scales)
