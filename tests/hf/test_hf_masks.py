"""Masks between Transformers and swath: an object without values, and mask functions read by their parts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import HYBRID, error, greedy, logits, padding, tokens
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, Gemma3TextModel, masking_utils
from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, or_masks

import swath.hf
from swath.hf import PagedCache, masks
from swath.hf.mask_functions import read
from swath.hf.mask_runs import runs_of
from swath.hf.masks import band_mask
from swath.window import Window

TOLERANCE = 1e-5
"""Of the largest logit, fp32, as in test_hf.py."""

SLIDING = masking_utils.sliding_window_causal_mask_function(3)

swath.hf.register()


@pytest.mark.parametrize(
    "use",
    [
        lambda mask, scores: scores + mask,
        lambda mask, scores: scores.add_(mask),
        lambda mask, scores: mask + 1,
        lambda mask, scores: (1.0 - mask) * -1e4,
        lambda mask, scores: mask * scores,
        lambda mask, scores: -mask,
        lambda mask, scores: ~mask,
        lambda mask, scores: mask == 0,
        lambda mask, scores: mask < 1,
        lambda mask, scores: bool(mask),
        lambda mask, scores: scores.masked_fill(mask, -1.0),
        lambda mask, scores: torch.where(mask, scores, -1.0),
        lambda mask, scores: torch.cat([mask, scores]),
        lambda mask, scores: torch.zeros_like(mask),
        lambda mask, scores: torch.baddbmm(mask, scores[0], scores[0]),
        lambda mask, scores: torch.nn.functional.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
        lambda mask, scores: torch.as_tensor(mask),
        lambda mask, scores: mask.float(),
        lambda mask, scores: mask.to(torch.bool),
        lambda mask, scores: mask.expand(-1, 4, -1, -1),
        lambda mask, scores: mask.dtype,
        lambda mask, scores: mask.to_dense(),
        lambda mask, scores: mask[:, 0],
        lambda mask, scores: mask[None],
        lambda mask, scores: mask[0],
        lambda mask, scores: mask[:, 1:],
        lambda mask, scores: mask[:, :, 8:],
        lambda mask, scores: mask[scores > 0],
        lambda mask, scores: mask[:, :, ::2],
    ],
)
def test_a_carried_mask_takes_part_in_no_arithmetic(use: Callable[[Any, Tensor], object]) -> None:
    """A model with attention code of its own must not find a mask of ones, of zeros, or any other."""
    with pytest.raises(TypeError, match=r"mask|CarriedMask|must be"):
        use(band_mask(1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_a_carried_mask_travels() -> None:
    """What Transformers, accelerate and models do with masks that they hand on."""
    mask = band_mask(2, 6, 8)
    assert (mask.shape, mask.ndim, mask.dim(), mask.size(-1), mask.size()) == ((2, 1, 6, 8), 4, 4, 8, (2, 1, 6, 8))
    for same in (mask[:, :, :, :8], mask[:], mask.contiguous(), mask.to("cpu", non_blocking=True)):
        assert same.shape == mask.shape
    assert mask.to("meta").device.type == "meta"
    assert copy.deepcopy(mask).band.kv_len == pickle.loads(pickle.dumps(mask)).band.kv_len == 8
    assert not hasattr(mask, "no_such_attribute")
    assert "kv_len=8" in repr(mask)


def written_out(mask: Any) -> Tensor:
    """The values that a carried mask stands for, bool [B, queries, keys]."""
    band, column = mask.band, torch.arange(mask.shape[-1])
    if band.window.bounds is not None:
        low, end = band.columns_seen.unbind(-1)
        return (low[..., None] <= column) & (column < end[..., None])
    visible = band.window.mask(torch.arange(mask.shape[-2]) + band.q_column, column).expand(band.batch, -1, -1)
    if band.padding is None:
        return visible
    first, end = band.padding[:, :, None]
    return visible & ((column >= first) & (column < end))[:, None]


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(-1, None)),
        (..., slice(0, 7)),
        (..., slice(2, 6), slice(3, None)),
        (slice(1, 3), ..., slice(-5, None)),
        (slice(0, 1), slice(None), slice(1, 2), slice(0, 3)),
    ],
)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_cut_mask_is_the_mask_cut(side: str, index: tuple[Any, ...]) -> None:
    real = padding(side, 3, 19)
    mask = band_mask(3, 8, 19, q_offset=11, mask_function=SLIDING, attention_mask=real)
    assert torch.equal(written_out(mask[index]), written_out(mask)[:, None][index][:, 0])
    if real is not None:
        assert mask[index].band.first == tuple(mask[index].band.padding[0].tolist())


BLOCKS, TEXT = torch.tensor([[-1, 0, 0, -1]]), torch.full((1, 4), -1)
PACKED, WHOLE = torch.tensor([[0, 0, 1, 1]]), torch.zeros(1, 4, dtype=torch.long)
OVERLAY = masking_utils.sliding_window_overlay(3)


@pytest.mark.parametrize(
    ("mask_function", "window", "holds"),
    [
        (causal_mask_function, Window(), True),
        (masking_utils.bidirectional_mask_function, Window(causal=False), True),
        (SLIDING, Window(3), True),
        (masking_utils.sliding_window_causal_mask_function(0), Window(0), True),
        (masking_utils.sliding_window_bidirectional_mask_function(3), Window(4, causal=False), True),
        (or_masks(causal_mask_function, blockwise_overlay(TEXT)), Window(), True),
        (or_masks(causal_mask_function, blockwise_overlay(BLOCKS)), Window(), False),
        (and_masks(or_masks(causal_mask_function, blockwise_overlay(TEXT)), OVERLAY), Window(3), True),
        (and_masks(SLIDING, masking_utils.packed_sequence_mask_function(WHOLE)), Window(3), True),
        (and_masks(SLIDING, masking_utils.packed_sequence_mask_function(PACKED)), Window(3), False),
        (or_masks(SLIDING, causal_mask_function), Window(), True),
        (or_masks(causal_mask_function, masking_utils.bidirectional_mask_function), Window(causal=False), True),
    ],
)
def test_mask_functions_are_read(mask_function: Any, window: Window, holds: bool) -> None:
    """What is read is what Transformers writes out."""
    reading = read(mask_function)
    assert reading is not None
    assert reading.reach.window == window
    assert all(bool(condition.all()) for condition in reading.conditions) is holds
    written = masking_utils.sdpa_mask(1, 4, 4, mask_function=mask_function, allow_is_causal_skip=False)[0, 0]
    assert torch.equal(written, window.mask(torch.arange(4), torch.arange(4))) is holds


@pytest.mark.parametrize(
    "mask_function",
    [
        lambda b, h, q, k: k <= q,
        and_masks(causal_mask_function, lambda b, h, q, k: k > 0),
        masking_utils.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)),
    ],
)
def test_mask_functions_that_are_not_read(mask_function: Any) -> None:
    assert read(mask_function) is None


def test_mask_functions_of_no_window() -> None:
    """One that reaches far ahead, and blocks alone."""
    overlay = read(OVERLAY)
    assert overlay is not None
    assert overlay.reach.window is None
    blocks = read(and_masks(causal_mask_function, blockwise_overlay(TEXT)))
    assert blocks is not None
    assert blocks.reach.window is None


IMAGES = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 2, -1, -1, -1], [0, 0, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1]])
AGAIN = torch.tensor([[0, 0, -1, 0, 0, -1, -1, -1, -1, -1, -1, -1]]).expand(2, -1)  # one number in two places
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2], [0] * 12])
CHUNKED = masking_utils.chunked_overlay(4, torch.tensor([0, 3]))
RUNS = {
    "causal": causal_mask_function,
    "sliding": SLIDING,
    "both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "gemma3": or_masks(SLIDING, blockwise_overlay(IMAGES)),
    "gemma4": and_masks(or_masks(causal_mask_function, blockwise_overlay(IMAGES)), OVERLAY),
    "images alone": blockwise_overlay(IMAGES),
    "chunks": and_masks(CHUNKED, causal_mask_function),
    "documents": and_masks(SLIDING, masking_utils.packed_sequence_mask_function(DOCUMENTS)),
    "far": or_masks(masking_utils.sliding_window_causal_mask_function(1), blockwise_overlay(IMAGES)),
}
"""Mask functions of Transformers in which each query sees one run of keys, for two sequences of 12 tokens."""


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_that_transformers_writes_out(name: str, offset: int) -> None:
    written = masking_utils.sdpa_mask(2, 12 - offset, 12, offset, mask_function=RUNS[name], allow_is_causal_skip=False)
    runs, key = runs_of(RUNS[name], torch.arange(offset, 12)), torch.arange(12)
    assert runs is not None
    assert bool(runs.whole)
    assert torch.equal(
        (runs.low[..., None] <= key) & (key < runs.end[..., None]) & torch.ones(2, 1, 1).bool(), written[:, 0]
    )


@pytest.mark.parametrize(
    "mask_function",
    [
        blockwise_overlay(AGAIN),
        or_masks(and_masks(CHUNKED, causal_mask_function), and_masks(SLIDING, lambda b, h, q, k: q != 9)),
        or_masks(causal_mask_function, lambda b, h, q, k: k == 11),
        or_masks(masking_utils.sliding_window_overlay(-3), masking_utils.sliding_window_causal_mask_function(1)),
    ],
    ids=["in two places", "unknown part", "gap", "apart"],
)
def test_what_is_no_run_is_not_read_as_one(mask_function: Any) -> None:
    runs = runs_of(mask_function, torch.arange(12))
    assert runs is None or not bool(runs.whole)


@pytest.mark.parametrize(
    "real", [None, torch.tensor([[1] * 12, [0, 0, 0] + [1] * 9]), torch.tensor([[1] * 12, [1] * 9 + [0] * 3])]
)
@pytest.mark.parametrize("name", RUNS)
def test_masks_of_runs_are_not_written_out(name: str, real: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And show what is written out, each query that is no padding."""
    given = dict(batch_size=2, q_length=12, kv_length=12, mask_function=RUNS[name])
    given["attention_mask"] = None if real is None else real.bool()
    if name == "images alone":  # queries of text see nothing
        with pytest.raises(ValueError, match="attention_mask"):
            band_mask(**given)
        return
    written = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)[:, 0]
    monkeypatch.setattr(masks, "sdpa_mask", lambda **_: pytest.fail("a mask was written out"))
    shown = written_out(band_mask(**given))
    is_real = torch.ones(2, 12, dtype=torch.bool) if real is None else real.bool()
    assert torch.equal(shown[is_real], written[is_real])


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def gemma3() -> Any:
    """Gemma 3 for text and images, on eager attention."""
    torch.manual_seed(0)
    vision = dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=8, patch_size=2,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**HYBRID, query_pre_attn_scalar=8), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=60, boi_token_index=59, eoi_token_index=58,
    )  # fmt: skip
    return randomised(Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager"))


def with_swath(model: Any) -> Any:
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("swath")
    return ours


@pytest.mark.parametrize("length", [4, 5, 6, 19])
def test_token_types_of_text_alone(gemma3: Any, length: int) -> None:
    """A processor returns token types of 0 for a prompt without images; the window is 5."""
    ids, ours = tokens(1, length) % 50 + 2, with_swath(gemma3)
    options = dict(token_type_ids=torch.zeros_like(ids))
    assert error(logits(ours, ids, **options), logits(gemma3, ids, **options)) < TOLERANCE
    theirs = greedy(gemma3, ids, new=8, **options)
    assert torch.equal(greedy(ours, ids, new=8, **options), theirs)
    assert torch.equal(greedy(ours, ids, new=8, past_key_values=PagedCache(ours.config), **options), theirs)


def of_images(ids: Tensor, *spans: tuple[int, int]) -> dict[str, Tensor]:
    """Token types in which these ranges of tokens are images."""
    kinds = torch.zeros_like(ids)
    for begin, end in spans:
        kinds[:, begin:end] = 1
    return {"token_type_ids": kinds}


@pytest.mark.parametrize("spans", [[(3, 7)], [(0, 8)], [(2, 6), (9, 19)]], ids=str)
def test_images_see_all_of_themselves(gemma3: Any, spans: list[tuple[int, int]]) -> None:
    """Their tokens see each other in both directions, also beyond the window of 5: a run of keys for each query."""
    ids, ours = tokens(2, 24) % 50 + 2, with_swath(gemma3)
    options = of_images(ids, *spans)
    assert error(logits(ours, ids, **options), logits(gemma3, ids, **options)) < TOLERANCE
    assert torch.equal(greedy(ours, ids, new=8, **options), greedy(gemma3, ids, new=8, **options))


@pytest.mark.parametrize("length", [3, 19, 40])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_windows_to_both_sides(side: str, length: int) -> None:
    """EmbeddingGemma: a decoder's layers without causality, full and sliding."""
    options = HYBRID | dict(sliding_window=6, query_pre_attn_scalar=8, use_bidirectional_attention=True)
    model = randomised(Gemma3TextModel(Gemma3TextConfig(**options)))
    ids, mask = tokens(2, length), padding(side, 2, length)
    if mask is not None and length < 7:
        mask[1] = 1
    theirs = model(ids, attention_mask=mask).last_hidden_state
    assert error(with_swath(model)(ids, attention_mask=mask).last_hidden_state, theirs, mask) < TOLERANCE
