"""Models whose queries see runs of keys: images, prefixes, chunks and canvases, over any cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import HYBRID, SMALL, VOCAB, WINDOW, build, error, greedy, logits, padding, tokens
from test_hf import PROMPTS, generate_batch
from test_hf_cache_pools import READERS
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
)

import swath.hf
from swath.hf import PagedCache
from swath.hf.pages import ends_of_passes
from swath.window import Window

TOLERANCE = 1e-5
PAGE, LENGTH = 8, 26

SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=2,
)  # fmt: skip
GEMMA4_VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
GEMMA4: dict[str, Any] = HYBRID | dict(
    use_bidirectional_attention="vision", hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
    global_head_dim=16,
)  # fmt: skip
IDS = dict(image_token_id=60, boi_token_id=59, eoi_token_id=58)

swath.hf.register()


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        text_config=HYBRID | dict(query_pre_attn_scalar=8), vision_config=SIGLIP, mm_tokens_per_image=4,
        image_token_index=60, boi_token_index=59, eoi_token_index=58,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")


def gemma4(**options: Any) -> PreTrainedModel:
    config = Gemma4Config(text_config=GEMMA4 | options, vision_config=GEMMA4_VISION, audio_config=None, **IDS)
    return Gemma4ForConditionalGeneration._from_config(config, attn_implementation="eager")


def gemma4_shared() -> PreTrainedModel:
    """The last two layers read the keys of the two before, and full layers have heads of another size and K = V."""
    return gemma4(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=[*HYBRID["layer_types"]] * 2,
                  attention_k_eq_v=True, num_global_key_value_heads=1)  # fmt: skip


def paligemma(**options: Any) -> PreTrainedModel:
    text = SMALL | dict(model_type="gemma") | options
    config = PaliGemmaConfig(text_config=text, vision_config=SIGLIP, image_token_index=60, projection_dim=32)
    return PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")


def paligemma2() -> PreTrainedModel:
    return paligemma(model_type="gemma2", sliding_window=WINDOW, query_pre_attn_scalar=8)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": gemma3, "gemma4": gemma4, "gemma4_shared": gemma4_shared, "paligemma": paligemma,
    "paligemma2": paligemma2,
}  # fmt: skip


@cache
def eager(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    return model


@cache
def ours(name: str) -> PreTrainedModel:
    model = copy.deepcopy(eager(name))
    model.set_attn_implementation("swath")
    return model


def kinds(name: str, ids: Tensor, *spans: tuple[int, int]) -> dict[str, Tensor]:
    """Token types in which these ranges are images, or, in a model of prefixes, whatever follows the prefix text."""
    is_prefix = name.startswith("paligemma")
    types = torch.ones_like(ids) if is_prefix else torch.zeros_like(ids)
    for begin, end in spans:
        types[:, begin:end] = 0 if is_prefix else 1
    return {"mm_token_type_ids" if name.startswith("gemma4") else "token_type_ids": types}


CASES = [
    *[(name, spans) for name in ("gemma3", "gemma4", "gemma4_shared") for spans in ([(3, 9)], [(1, 5), (12, LENGTH)])],
    *[(name, spans) for name in ("paligemma", "paligemma2") for spans in ([(0, 11)], [(0, LENGTH)])],
]


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(("name", "spans"), CASES, ids=str)
def test_eager_s_logits_and_tokens(name: str, spans: list[tuple[int, int]], side: str) -> None:
    ids, mask = tokens(2, LENGTH) % 50 + 2, padding(side, 2, LENGTH)
    if mask is not None and spans[0][0] == 0:
        mask[1, :] = (torch.arange(LENGTH) >= 3).long()
    options = kinds(name, ids, *spans)
    truth, theirs = logits(eager(name), ids, mask, **options), greedy(eager(name), ids, mask, new=12, **options)
    assert error(logits(ours(name), ids, mask, **options), truth, mask) < TOLERANCE
    assert torch.equal(greedy(ours(name), ids, mask, new=12, **options), theirs)
    for chunk in (4, 512):
        pages = PagedCache(ours(name).config, page_size=PAGE, chunk=chunk)
        assert error(logits(ours(name), ids, mask, past_key_values=pages, **options), truth, mask) < TOLERANCE
        pages = PagedCache(ours(name).config, page_size=PAGE, chunk=chunk)
        assert torch.equal(greedy(ours(name), ids, mask, new=12, past_key_values=pages, **options), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma"])
def test_on_a_gpu(name: str) -> None:
    """Padded, over both caches."""
    ids = tokens(2, LENGTH).cuda() % 50 + 2
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [7]])).long().cuda()
    options = kinds(name, ids, (0, 11) if name == "paligemma" else (8, 15))
    model, theirs = (copy.deepcopy(each(name)).cuda() for each in (ours, eager))
    truth = greedy(theirs, ids, mask, new=12, **options)
    for pages in (None, PagedCache(model.config, page_size=PAGE, chunk=4)):
        assert torch.equal(greedy(model, ids, mask, new=12, past_key_values=pages, **options), truth)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_the_images_make_a_difference(name: str) -> None:
    """Rows of windowed layers see all of an image in Gemma 3, and in Gemma 4 what lies in the window or ahead."""
    ids = tokens(1, LENGTH) % 50 + 2
    seen, blind = (logits(ours(name), ids, **kinds(name, ids, *spans)) for spans in ([(3, 13)], []))
    assert error(seen, blind) > 0.05


def test_pages_behind_an_image_are_released() -> None:
    """Of a prompt that goes in passes: none ends inside an image, and decode holds what the window needs."""
    model, ids = ours("gemma3"), tokens(1, 64) % 50 + 2
    pages = PagedCache(model.config, page_size=PAGE, chunk=8)
    options = kinds("gemma3", ids, (20, 30))
    assert (
        error(logits(model, ids, past_key_values=pages, **options), logits(eager("gemma3"), ids, **options)) < TOLERANCE
    )
    sliding = pages.layers[0].pages
    assert [(p.start, p.stop) for p in sliding.passes] == [
        (0, 8),
        (8, 16),
        (16, 30),
        (30, 38),
        (38, 46),
        (46, 54),
        (54, 62),
        (62, 64),
    ]
    assert sliding.peak <= 4
    assert sliding.live <= 3


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_beams_and_assisted_decoding(options: dict[str, int]) -> None:
    ids = tokens(1, LENGTH) % 50 + 2
    options = kinds("gemma3", ids, (3, 9)) | options
    theirs = greedy(eager("gemma3"), ids, new=10, **options)
    pages = PagedCache(ours("gemma3").config, page_size=PAGE, chunk=4)
    assert torch.equal(greedy(ours("gemma3"), ids, new=10, past_key_values=pages, **options), theirs)


def test_an_int8_cache_of_images() -> None:
    ids = tokens(2, LENGTH) % 50 + 2
    options = kinds("gemma4", ids, (3, 9))
    exact, pages = logits(ours("gemma4"), ids, **options), PagedCache(ours("gemma4").config, quant="int8", chunk=4)
    assert 0 < error(logits(ours("gemma4"), ids, past_key_values=pages, **options), exact) < 0.05


def test_a_second_image_in_a_later_turn() -> None:
    """Its rows see keys of the turn before, as far as the window reaches, and all of their image."""
    ids, mask = tokens(1, 40) % 50 + 2, torch.ones(1, 40, dtype=torch.long)
    ids[0, 4:8] = ids[0, 25:29] = 60
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for chunk in (4, 512):
        pages = PagedCache(ours("gemma3").config, page_size=PAGE, chunk=chunk)
        theirs = DynamicCache(config=eager("gemma3").config)
        for part, image in ((slice(0, 20), (4, 8)), (slice(20, 40), (5, 9))):
            options = dict(pixel_values=pixels) | kinds("gemma3", ids[:, part], image)
            truth = logits(eager("gemma3"), ids[:, part], mask[:, : part.stop], past_key_values=theirs, **options)
            here = logits(ours("gemma3"), ids[:, part], mask[:, : part.stop], past_key_values=pages, **options)
            assert error(here, truth) < TOLERANCE


def test_keys_that_were_released_are_not_missed_silently() -> None:
    """A mask whose rows reach further back than the layer's window."""
    model, ids = ours("gemma3"), tokens(1, 30) % 50 + 2
    pages = PagedCache(model.config, page_size=PAGE, chunk=4)
    logits(model, ids[:, :24], past_key_values=pages)
    at = torch.arange(30)
    far = (at[None] >= 2) & (at[None] <= at[:, None]) | (at[:, None] == 25) & (at[None] < 28)
    masks = {"full_attention": Window().mask(at, at)[None, None, 24:], "sliding_attention": far[None, None, 24:]}
    with pytest.raises(ValueError, match="attention_mask: wanted keys in a window of 5"):
        model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(ids[:, 24:]), attention_mask=masks, past_key_values=pages,
            position_ids=at[None, 24:],
        )  # fmt: skip


def test_a_window_in_the_place_of_an_image_s_is_refused() -> None:
    ids = tokens(1, LENGTH) % 50 + 2
    pages = PagedCache(ours("gemma3").config, window=Window(64, global_tokens=4))
    with pytest.raises(ValueError, match="window: wanted None for a layer whose queries see runs of keys"):
        logits(ours("gemma3"), ids, past_key_values=pages, **kinds("gemma3", ids, (3, 9)))


@pytest.mark.parametrize(
    ("new", "chunk", "reach", "ends"),
    [
        (0, 4, (), []),
        (10, 4, (), [4, 8, 10]),
        (12, 4, (1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 11, 12), [6, 10, 12]),
        (6, 2, (6, 1, 1, 1, 1, 1), [6]),
        (5, 9, (9, 9, 9, 9, 9), [5]),
    ],
)
def test_passes_end_where_no_row_reaches_further(new: int, chunk: int, reach: tuple[int, ...], ends: list[int]) -> None:
    assert ends_of_passes(new, chunk, reach) == ends


# Chunks


@pytest.mark.parametrize("side", ["none", "left"])
def test_chunks_of_llama4_in_pages(side: str) -> None:
    """A layer of chunks keeps as much as a window of a chunk; a sequence's chunks begin at its first token."""
    options = dict(
        layer_types=["chunked_attention", "full_attention"], attention_chunk_size=8, num_local_experts=2,
        intermediate_size_mlp=32, num_experts_per_tok=1, moe_layers=[], no_rope_layers=[1, 0],
    )  # fmt: skip
    theirs, model = (build("llama4_text", implementation, **options) for implementation in ("eager", "swath"))
    ids, mask = tokens(2, LENGTH), padding(side, 2, LENGTH)
    truth = greedy(theirs, ids, mask, new=20)
    for chunk in (3, 512):
        pages = PagedCache(model.config, page_size=PAGE, chunk=chunk)
        assert error(logits(model, ids, mask, past_key_values=pages), logits(theirs, ids, mask), mask) < TOLERANCE
        pages = PagedCache(model.config, page_size=PAGE, chunk=chunk)
        assert torch.equal(greedy(model, ids, mask, new=20, past_key_values=pages), truth)
        assert pages.layers[0].pages.live <= 2 * 2
        assert pages.layers[1].pages.live > 8


# Text alone, in batches


@pytest.mark.parametrize("name", ["gemma3", "gemma3n_text"])
def test_text_under_continuous_batching(name: str) -> None:
    """Transformers takes tokens alone there. Gemma 3n's last layers read the keys that earlier ones gathered."""
    theirs = eager(name) if name in MODELS else build(name, "eager", **READERS[name])
    model = copy.deepcopy(theirs)
    swath.hf.set_continuous_batching(model)
    results = generate_batch(model, PROMPTS)
    assert [r.error for r in results] == [None] * len(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.generated_tokens == greedy(theirs, torch.tensor([prompt]), new=12)[0, len(prompt) :].tolist()


# Canvases


def test_canvases_of_diffusion_gemma() -> None:
    """Its encoder is causal; every token of a canvas sees the whole text and all of the canvas."""
    text = HYBRID | dict(num_experts=2, top_k_experts=2, moe_intermediate_size=16, global_head_dim=16)
    config = DiffusionGemmaConfig(text_config=text, vision_config=GEMMA4_VISION, canvas_length=6, **IDS)
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion._from_config(config, attn_implementation="eager").eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    swaths = copy.deepcopy(model)
    swaths.set_attn_implementation("swath")
    ids, canvas = tokens(2, LENGTH) % 50 + 2, tokens(2, 6, seed=1) % 50 + 2
    for mask in (None, padding("left", 2, LENGTH)):
        options = dict(attention_mask=mask, decoder_input_ids=canvas)
        if mask is not None:
            options["decoder_attention_mask"] = torch.nn.functional.pad(mask, (0, 6), value=1)
        with torch.no_grad():
            assert error(swaths(ids, **options).logits, model(ids, **options).logits) < TOLERANCE
    texts = []
    for each in (model, swaths):
        torch.manual_seed(1)  # canvases begin with random tokens
        texts.append(each.generate(ids, max_new_tokens=12, max_denoising_steps=4).sequences)
    assert torch.equal(*texts)
    with pytest.raises(TypeError, match="past_key_values: wanted a cache of Transformers"):
        swaths(ids, decoder_input_ids=canvas, past_key_values=PagedCache(swaths.config))
