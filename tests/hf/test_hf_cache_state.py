"""PagedCache between calls: refused and failed calls leave it usable, and it can be copied."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import SLIDING_FIRST, error, greedy, logits, make, padding, six_layers, tokens
from transformers import PreTrainedModel

import swath.hf
import swath.hf.layer
from swath.hf import PagedCache
from swath.hf.attention import attention_forward
from swath.hf.settings import Settings
from swath.window import Window

TOLERANCE = 1e-5
PAGE = 8

swath.hf.register()


def paged(model: PreTrainedModel, **options: Any) -> PagedCache:
    return PagedCache(model.config, page_size=PAGE, **options)


def refused_by(cache: PagedCache, call: Callable[[PagedCache], None], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        call(cache)


# Refusals


@pytest.mark.parametrize("order", [SLIDING_FIRST, SLIDING_FIRST[::-1]])
def test_crop_is_all_or_nothing(order: tuple[str, str]) -> None:
    """Full layers could go back, sliding ones cannot: neither does."""
    ids, ours = tokens(1, 64), six_layers("swath", order)
    theirs, cache = logits(six_layers("eager", order), ids), paged(ours)
    for a, b in ((0, 60), (60, 61)):
        logits(ours, ids[:, a:b], past_key_values=cache)
    refused_by(cache, lambda c: c.crop(-30), "^crop: wanted fewer tokens")
    assert cache.get_seq_length() == 61
    assert error(logits(ours, ids[:, 61:], past_key_values=cache), theirs[:, 61:]) < TOLERANCE


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda c: c.batch_select_indices(torch.tensor([0, 2])), "^indices: wanted indices of 2 sequences"),
        (lambda c: c.batch_select_indices(torch.tensor([True])), "^indices: wanted indices of 2 sequences"),
        (lambda c: c.batch_select_indices(torch.tensor(1)), "^indices: wanted one dimension"),
        (lambda c: c.reorder_cache(torch.tensor([-3, 0])), "^beam_idx: wanted indices of 2 sequences"),
        (lambda c: c.batch_repeat_interleave(0), "^repeats: wanted an int >= 1"),
        (lambda c: c.batch_repeat_interleave(1.5), "^repeats: wanted an int"),
        (lambda c: c.crop(3), "^tokens_to_remove: wanted a count <= 0"),
        (lambda c: c.crop(-1.5), "^tokens_to_remove: wanted an int"),
    ],
)
def test_what_is_refused_changes_nothing(call: Callable[[PagedCache], None], match: str) -> None:
    ids, ours = tokens(2, 20), six_layers("swath")
    theirs, cache = logits(six_layers("eager"), ids), paged(ours)
    logits(ours, ids[:, :15], past_key_values=cache)
    refused_by(cache, call, match)
    assert error(logits(ours, ids[:, 15:], past_key_values=cache), theirs[:, 15:]) < TOLERANCE


@pytest.mark.parametrize("mask", [[False, True, True], [True, False, False]])
def test_sequences_are_kept_by_a_bool_for_each(mask: list[bool]) -> None:
    ids, ours = tokens(3, 20), six_layers("swath")
    theirs, cache = logits(six_layers("eager"), ids)[mask], paged(ours)
    logits(ours, ids[:, :15], past_key_values=cache)
    cache.batch_select_indices(torch.tensor(mask))
    assert error(logits(ours, ids[mask][:, 15:], past_key_values=cache), theirs[:, 15:]) < TOLERANCE


def test_an_empty_cache_has_no_batch() -> None:
    """Nothing to select before the first call; after reset, or crop to nothing, the next call may have any batch."""
    ours = six_layers("swath")
    cache = paged(ours)
    for batch, forget in ((2, cache.reset), (3, lambda: cache.crop(-20)), (1, cache.reset)):
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        ids, mask = tokens(batch, 20), padding("left", batch, 20)
        theirs = logits(six_layers("eager"), ids, mask)
        assert error(logits(ours, ids, mask, past_key_values=cache), theirs, mask) < TOLERANCE
        forget()


def test_another_batch_can_be_mended() -> None:
    """The call is refused in its first layer; going back to the tokens before it, the cache goes on."""
    ids, ours = tokens(2, 20), six_layers("swath")
    cache, theirs = paged(ours), logits(six_layers("eager"), ids)
    logits(ours, ids[:, :15], past_key_values=cache)
    refused_by(cache, lambda c: logits(ours, tokens(3, 1), past_key_values=c), "wanted 2 sequences")
    refused_by(
        cache, lambda c: logits(ours, ids[:, 15:], past_key_values=c), "crop or reset it after a call that failed"
    )
    cache.crop(15 - cache.get_seq_length())
    assert error(logits(ours, ids[:, 15:], past_key_values=cache), theirs[:, 15:]) < TOLERANCE


def test_a_cache_of_fewer_layers_is_refused() -> None:
    ours = six_layers("swath")
    cache = PagedCache(make("qwen3", "swath").config)
    refused_by(cache, lambda c: logits(ours, tokens(1, 4), past_key_values=c), "past_key_values: .* 3 or more, got 2")


def test_values_of_another_width_are_refused() -> None:
    cache, x = paged(make("llama", "swath")), torch.zeros(1, 2, 3, 8)
    key, value = cache.update(x, torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ValueError, match="v: wanted a v_head_dim that is a multiple of 8"):
        attention_forward(Settings(), nn.Module(), x, key, value, None)


def test_keys_that_the_layer_before_left_unread_are_noticed() -> None:
    """In the same call, before a wrong result comes back."""
    cache, x = paged(six_layers("swath")), torch.zeros(1, 2, 3, 8)
    cache.update(x, x, 0)
    refused_by(cache, lambda c: c.update(x, x, 1), "attn_implementation: .* read no pages")


def test_a_window_of_the_cache_is_not_for_layers_without_causality() -> None:
    cache, x = paged(make("llama", "swath"), window=Window(4)), torch.zeros(1, 2, 3, 8)
    key, value = cache.update(x, x, 0)
    with pytest.raises(ValueError, match="window: wanted None for a layer whose queries see runs of keys"):
        attention_forward(Settings(), nn.Module(), x, key, value, None, is_causal=False)


# Failed calls


class FailureError(Exception):
    """What the tests raise inside of a model."""


def fail_before(module: nn.Module, call: Callable[[], object]) -> None:
    def hook(*_: object) -> None:
        raise FailureError

    handle = module.register_forward_pre_hook(hook)
    with pytest.raises(FailureError):
        call()
    handle.remove()


@pytest.mark.parametrize("new", [1, 13])
@pytest.mark.parametrize("seen", [0, 30])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_call_that_fails_between_layers_can_be_undone(layer: int, seen: int, new: int) -> None:
    ids, ours = tokens(2, 50), six_layers("swath")
    theirs, cache = logits(six_layers("eager"), ids), paged(ours)
    if seen:
        logits(ours, ids[:, :seen], past_key_values=cache)
    part = ids[:, seen : seen + new]
    fail_before(ours.model.layers[layer].self_attn.o_proj, lambda: logits(ours, part, past_key_values=cache))
    if layer < 5:
        refused_by(cache, lambda c: logits(ours, part, past_key_values=c), "crop or reset it after a call that failed")
    cache.crop(seen - cache.get_seq_length())
    for a, b in ((seen, seen + new), (seen + new, 50)):
        out = logits(ours, ids[:, a:b], past_key_values=cache)
        assert error(out, theirs[:, a:b]) < TOLERANCE


def test_a_failed_call_cannot_be_undone_in_part() -> None:
    ids, ours = tokens(1, 30), six_layers("swath")
    cache = paged(ours)
    logits(ours, ids[:, :20], past_key_values=cache)
    fail_before(ours.model.layers[3], lambda: logits(ours, ids[:, 20:], past_key_values=cache))
    refused_by(cache, lambda c: c.crop(-4), "tokens_to_remove: wanted -10 or less")
    cache.crop(-10)


def test_a_long_call_that_failed_needs_a_reset() -> None:
    """Its passes have written over pages behind the window."""
    ids, ours = tokens(1, 60), six_layers("swath")
    cache, theirs = paged(ours, chunk=PAGE), logits(six_layers("eager"), ids)
    logits(ours, ids[:, :20], past_key_values=cache)
    fail_before(ours.model.layers[3], lambda: logits(ours, ids[:, 20:], past_key_values=cache))
    refused_by(cache, lambda c: c.crop(-40), r"^crop: .* reset\(\) forgets all")
    cache.reset()
    assert error(logits(ours, ids, past_key_values=cache), theirs) < TOLERANCE


def test_sequences_of_a_failed_first_call_are_not_selected() -> None:
    """Some groups of layers have them, others have none yet."""
    ids, ours = tokens(2, 20), six_layers("swath")
    cache, theirs = paged(ours), logits(six_layers("eager"), ids)
    fail_before(ours.model.layers[1], lambda: logits(ours, ids, past_key_values=cache))
    refused_by(cache, lambda c: c.reorder_cache(torch.tensor([1, 0])), "crop or reset it after a call that failed")
    cache.crop(-20)
    assert error(logits(ours, ids, past_key_values=cache), theirs) < TOLERANCE


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_pages_that_were_to_be_copied_when_a_call_failed(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams share a page that they write into; the layers that the call never reached must have copies as well."""
    ids, ours = tokens(1, 20), six_layers("swath")
    whole = torch.cat([ids.expand(3, -1), tokens(3, 9, seed=5)], 1)
    cache, theirs = paged(ours), logits(six_layers("eager"), whole)
    logits(ours, ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    stored, calls = swath.hf.layer.append_kv, 0

    def append(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise FailureError
        stored(*args)

    monkeypatch.setattr(swath.hf.layer, "append_kv", append)
    with pytest.raises(FailureError):
        logits(ours, whole[:, 20:], past_key_values=cache)
    cache.crop(20 - cache.get_seq_length())
    assert error(logits(ours, whole[:, 20:], past_key_values=cache), theirs[:, 20:]) < TOLERANCE


# Copies


def through_a_file(cache: PagedCache) -> PagedCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: PagedCache = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_goes_on_by_itself(copied: Callable[[PagedCache], PagedCache]) -> None:
    """A prompt's cache, copied for each of two continuations."""
    ids, mask, ours = tokens(2, 20), padding("left", 2, 20), six_layers("swath")
    cache = paged(ours)
    logits(ours, ids, mask, past_key_values=cache)
    for seed in (1, 2):
        whole = torch.cat([ids, tokens(2, 20, seed=seed)], 1)
        seen = torch.nn.functional.pad(mask, (0, 20), value=1)
        theirs, own = logits(six_layers("eager"), whole, seen), copied(cache)
        for a, b in ((20, 21), (21, 40)):
            assert error(logits(ours, whole[:, a:b], seen[:, :b], past_key_values=own), theirs[:, a:b]) < TOLERANCE
    assert cache.get_seq_length() == 20


def test_beams_then_crop() -> None:
    ids, ours = tokens(1, 20), six_layers("swath")
    cache, eager = paged(ours), six_layers("eager")
    cache.activate_past_recording()
    text = greedy(ours, ids, new=12, num_beams=3, past_key_values=cache)
    assert torch.equal(text, greedy(eager, ids, new=12, num_beams=3))
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(15 - cache.get_seq_length())  # within the prompt, which all beams share
    assert error(logits(ours, text[:, 15:], past_key_values=cache), logits(eager, text)[:, 15:]) < TOLERANCE


def test_compiled_with_graph_breaks() -> None:
    ids, ours = tokens(2, 22), make("qwen3", "swath")
    theirs, cache = logits(make("qwen3", "eager"), ids), paged(ours)
    compiled = torch.compile(ours, backend="eager")
    for a, b in ((0, 20), (20, 21), (21, 22)):
        assert error(logits(compiled, ids[:, a:b], past_key_values=cache), theirs[:, a:b]) < TOLERANCE


def test_one_graph_is_refused() -> None:
    cache = paged(make("llama", "swath"))

    @torch.compile(backend="eager", fullgraph=True)
    def update(x: Tensor) -> Tensor:
        return cache.update(x, x, 0)[0]

    with pytest.raises(Exception, match="compile without fullgraph=True"):
        update(torch.zeros(1, 2, 3, 8))
