"""swath inside Transformers: every family exact against eager, and what cannot be exact refused."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="the Transformers integration needs transformers")

from hf_models import FAMILIES, SLIDING, VOCAB, WINDOW, error, greedy, logits, make, padding, tokens
from transformers import (
    BertConfig,
    BertModel,
    ContinuousBatchingConfig,
    GenerationConfig,
    ModernBertConfig,
    ModernBertModel,
    masking_utils,
)
from transformers.masking_utils import create_causal_mask

import swath.hf
from swath.hf import attention as hf_attention
from swath.hf import masks, versions
from swath.hf.masks import band_mask
from swath.window import Window

TOLERANCE = 1e-5
"""Of the largest logit, fp32: eager and swath differ in the order of sums and in the softmax's precision alone."""

LENGTH = 19
swath.hf.register()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_eager(family: str, side: str) -> None:
    ids, mask = tokens(3, LENGTH), padding(side, 3, LENGTH)
    ours, theirs = logits(make(family, "swath"), ids, mask), logits(make(family, "eager"), ids, mask)
    assert error(ours, theirs, mask) < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_eager(family: str, cache: str | None) -> None:
    """With left padding, well past the window; a static cache has more columns than tokens."""
    ids, mask = tokens(3, LENGTH), padding("left", 3, LENGTH)
    how: dict[str, Any] = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    new = 5 if cache is None else 20
    assert torch.equal(
        greedy(make(family, "swath"), ids, mask, new, **how), greedy(make(family, "eager"), ids, mask, new)
    )


@pytest.mark.parametrize("family", SLIDING)
def test_windows_are_neither_short_nor_long(family: str) -> None:
    ids, ours = tokens(2, LENGTH), make(family, "swath")
    theirs = logits(make(family, "eager"), ids)
    sliding = [t == "sliding_attention" for t in getattr(ours.config, "layer_types", ["sliding_attention"] * 2)]
    found = {}
    for size in (WINDOW - 1, WINDOW, WINDOW + 1):
        swath.hf.register("swath-sized", window=lambda i, size=size: Window(size) if sliding[i] else None)
        ours.set_attn_implementation("swath-sized")
        found[size] = error(logits(ours, ids), theirs)
    assert found[WINDOW] < TOLERANCE
    assert min(found[WINDOW - 1], found[WINDOW + 1]) > 100 * TOLERANCE


def test_dropped_sinks_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, LENGTH)
    theirs = logits(make("gpt_oss", "eager"), ids)
    monkeypatch.setattr(hf_attention, "_local_sink", lambda *_: None)
    assert error(logits(make("gpt_oss", "swath"), ids), theirs) > 100 * TOLERANCE


def test_a_dropped_softcap_would_be_noticed() -> None:
    ids, ours = tokens(2, LENGTH), make("gemma2", "swath")
    for layer in ours.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert error(logits(ours, ids), logits(make("gemma2", "eager"), ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_masks_are_never_written_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own builders are recognised, so no queries x keys tensor is made."""
    monkeypatch.setattr(masks, "sdpa_mask", lambda **_: pytest.fail("a mask was written out"))
    logits(make(family, "swath"), tokens(3, LENGTH), padding("left", 3, LENGTH))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("window", "additive"),
    [
        (Window(), False),
        (Window(), True),
        (Window(9), False),
        (Window(causal=False), True),
        (Window(4, causal=False), False),
    ],
    ids=["causal", "causal-additive", "sliding", "full-additive", "both-sides"],
)
def test_masks_of_the_caller(side: str, window: Window, additive: bool) -> None:
    """4-D masks, bool or additive, are read back to a window and padding."""
    ids, real = tokens(2, LENGTH), padding(side, 2, LENGTH)
    visible = window.mask(torch.arange(LENGTH), torch.arange(LENGTH)).expand(2, 1, -1, -1)
    if real is not None:
        visible = visible & real.bool()[:, None, None]
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min) if additive else visible
    theirs = logits(make("llama", "eager"), ids, torch.where(visible, 0.0, torch.finfo(torch.float32).min))
    assert error(logits(make("llama", "swath"), ids, mask), theirs, real) < TOLERANCE


def test_unknown_mask_functions_that_say_the_same() -> None:
    config = make("llama", "swath").config
    embeds = torch.zeros(2, 6, 8)
    mask = create_causal_mask(config, embeds, None, None, and_mask_function=lambda b, h, q, k: k <= q)
    assert mask.band.window == Window()
    with pytest.raises(ValueError, match=r"attention_mask: wanted a causal, sliding or full mask"):
        create_causal_mask(config, embeds, None, None, and_mask_function=lambda b, h, q, k: (k % 2) == (q % 2))


def test_leading_tokens_for_a_full_attention_model() -> None:
    """Leading tokens are the first real ones: the padded sequence alone gives the same logits."""
    window = Window(4, global_tokens=2)
    swath.hf.register("swath-leading", window=window)
    ids, real = tokens(2, LENGTH), padding("left", 2, LENGTH)
    ours = logits(make("llama", "swath-leading"), ids, real)
    for b, first in enumerate((0, 7)):
        position = torch.arange(LENGTH - first)
        visible = window.mask(position, position)[None, None]
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        assert error(ours[b : b + 1, first:], logits(make("llama", "eager"), ids[b : b + 1, first:], mask)) < TOLERANCE


def test_an_override_cannot_reach_what_a_cache_dropped() -> None:
    swath.hf.register("swath-wide", window=Window(WINDOW + 1))
    with pytest.raises(ValueError, match=r"window: wanted keys within Window\(5\)"):
        greedy(make("mistral", "swath-wide"), tokens(1, LENGTH))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoders(kind: str, side: str) -> None:
    """Bidirectional attention, and ModernBERT's window to both sides."""
    common: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "bert":
        model = BertModel(BertConfig(**common)).eval()
    else:
        layers = ["full_attention", "sliding_attention"]
        model = ModernBertModel(
            ModernBertConfig(**common, local_attention=6, layer_types=layers, pad_token_id=0)
        ).eval()
    model.requires_grad_(False).apply(lambda m: m.weight.normal_(0, 0.3) if isinstance(m, torch.nn.Linear) else None)
    ids, mask = tokens(2, LENGTH), padding(side, 2, LENGTH)
    theirs = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("swath")
    assert error(model(ids, attention_mask=mask).last_hidden_state, theirs, mask) < TOLERANCE


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_sinks() -> None:
    """Tensor parallelism leaves the sinks a DTensor of global shape beside plain local heads."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    ids, ours = tokens(2, LENGTH), make("gpt_oss", "swath")
    mesh = init_device_mesh("cpu", (1,))
    for layer in ours.model.layers:
        sharded = distribute_tensor(layer.self_attn.sinks.data, mesh, [Shard(0)])
        layer.self_attn.sinks = torch.nn.Parameter(sharded, requires_grad=False)
    assert error(logits(ours, ids), logits(make("gpt_oss", "eager"), ids)) < TOLERANCE


def generate_batch(model: Any, prompts: list[list[int]]) -> list[Any]:
    """The results of requests longer than a batch, prefilled in chunks beside others that decode."""
    options = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    batching = ContinuousBatchingConfig(block_size=16, num_blocks=32, max_batch_tokens=8)
    return list(model.generate_batch(prompts, generation_config=options, continuous_batching_config=batching).values())


PROMPTS = [tokens(n, seed=n).tolist() for n in (LENGTH, 3, 30)]


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_is_eager(family: str) -> None:
    """Past the window's ring."""
    eager, ours = make(family, "eager"), make(family, "eager")
    swath.hf.set_continuous_batching(ours)
    results = generate_batch(ours, PROMPTS)
    assert [r.error for r in results] == [None] * len(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.generated_tokens == greedy(eager, torch.tensor([prompt]), new=12)[0, len(prompt) :].tolist()


def test_another_window_under_continuous_batching() -> None:
    """Narrower than the ring is right, wider is refused."""
    for family, window in (("llama", Window(4, global_tokens=2)), ("mistral", Window(WINDOW - 2))):
        swath.hf.register("swath-other", window=window)
        ours = make(family, "eager")
        swath.hf.set_continuous_batching(ours, "swath-other")
        for prompt, result in zip(PROMPTS, generate_batch(ours, PROMPTS), strict=True):
            theirs = greedy(make(family, "swath-other"), torch.tensor([prompt]), new=12)
            assert result.generated_tokens == theirs[0, len(prompt) :].tolist()
    swath.hf.register("swath-other", window=Window(WINDOW + 1))
    for result in generate_batch(ours, PROMPTS):
        assert "window: wanted keys within Window(5)" in result.error


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.1")
    with pytest.raises(ImportError, match=r"needs Transformers 5\.17 or newer, this is 5\.16\.1"):
        runpy.run_path(versions.__file__)


def test_outside_continuous_batching() -> None:
    ours = make("llama", "eager")
    swath.hf.set_continuous_batching(ours)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: wanted those of model\.generate_batch"):
        logits(ours, tokens(1, 4))
    ours.set_attn_implementation("swath")
    assert error(logits(ours, tokens(1, 4)), logits(make("llama", "eager"), tokens(1, 4))) < TOLERANCE
    with pytest.raises(ValueError, match=r"name: wanted a name given to register \(.*swath"):
        swath.hf.set_continuous_batching(ours, "eager")


def hidden_middle(mask: Tensor) -> Tensor:
    mask[:, 4:6] = 0
    return mask


STRIPES = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).expand(2, 1, -1, -1) % 3 != 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (hidden_middle(torch.ones(2, LENGTH, dtype=torch.long)), "padding between tokens"),
        (torch.ones(2, 1, LENGTH, LENGTH).tril().log() + 0.5, "a bias between them"),
        (torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril(-1), "a mask of another form"),
        (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & STRIPES, "a mask of another form"),
        (torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool), "a key to see"),
        (torch.ones(2, 4, LENGTH, LENGTH, dtype=torch.bool).tril(), "shape"),
        (torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.long).tril(), "bool or floating point"),
        (torch.ones(2, 1, LENGTH, LENGTH - 2, dtype=torch.bool).tril(), "19 keys"),
    ],
    ids=["hole", "bias", "strict", "striped", "nothing", "per-head", "integers", "short"],
)
def test_other_masks_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        logits(make("llama", "swath"), tokens(2, LENGTH), mask)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_packed_sequences(family: str) -> None:
    """Sequences end to end in a row, told by their positions: each query sees a run of its own sequence."""
    options = dict(position_ids=torch.cat([torch.arange(9), torch.arange(10)])[None], use_cache=False)
    theirs = logits(make(family, "eager"), tokens(1, LENGTH), **options)
    assert error(logits(make(family, "swath"), tokens(1, LENGTH), **options), theirs) < TOLERANCE


RUNS = {
    "lopsided": lambda p, k: (k <= p + 3) & (k >= p - 8),
    "prefix": lambda p, k: (k <= p) | (k < 7),
    "chunks": lambda p, k: (k <= p) & (k // 5 == p // 5),
    "an image": lambda p, k: (k <= p) | ((k // 6 == 1) & (p // 6 == 1)),
}
"""Masks in which each query sees keys in one run."""


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", RUNS)
def test_masks_of_runs(name: str, side: str) -> None:
    ids, real = tokens(2, LENGTH), padding(side, 2, LENGTH)
    at = torch.arange(LENGTH)
    visible = RUNS[name](at[:, None], at[None]).expand(2, 1, -1, -1)
    if real is not None:
        visible = visible & real.bool()[:, None, None]
    theirs = logits(make("llama", "eager"), ids, torch.where(visible, 0.0, torch.finfo(torch.float32).min))
    assert error(logits(make("llama", "swath"), ids, visible), theirs, real) < TOLERANCE


@pytest.mark.parametrize(
    "keyword", [{"dropout": 0.1}, {"position_bias": torch.zeros(1)}, {"output_attentions": True}, {"cache": object()}]
)
def test_keywords_that_change_the_result_are_refused(keyword: dict[str, Any]) -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=next(iter(keyword))):
        hf_attention.attention_forward(swath.hf.settings.Settings(), torch.nn.Module(), x, x, x, None, **keyword)


def test_layers_without_a_mask() -> None:
    """A module that made no mask: causal from its keywords, but only where the queries' place is beyond doubt."""
    settings, module = swath.hf.settings.Settings(), torch.nn.Module()
    x = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    out, _ = hf_attention.attention_forward(settings, module, x, x, x, None, sliding_window=3)
    band = band_mask(1, 6, 6, mask_function=masking_utils.sliding_window_causal_mask_function(3))
    assert torch.equal(out, hf_attention.attention_forward(settings, module, x, x, x, band)[0])
    with pytest.raises(ValueError, match="a mask for 2 causal queries over 6 keys"):
        hf_attention.attention_forward(settings, module, x[:, :, :2], x, x, None)
    both_ways, _ = hf_attention.attention_forward(settings, module, x, x, x, None, sliding_window=3, is_causal=False)
    torch.testing.assert_close(both_ways, F.scaled_dot_product_attention(x, x, x).transpose(1, 2))  # as eager: all keys
    with pytest.raises(ValueError, match="1 sequences, 6 queries and 6 keys"):
        hf_attention.attention_forward(settings, module, x, x, x, band_mask(1, 6, 7))


def test_training_is_refused() -> None:
    with pytest.raises(ValueError, match="forward only"):
        make("llama", "swath").requires_grad_(True)(tokens(1, 4))


@pytest.mark.parametrize("name", ["", "my_flash", "paged|mine", "org/name", "sdpa2"])
def test_names_that_transformers_would_misread(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match="name"):
        swath.hf.register(name)


@pytest.mark.parametrize("window", [Window(4, causal=False), Window(4, torch.zeros(2, dtype=torch.int32)), 128])
def test_windows_that_fit_no_model(window: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="window"):
        swath.hf.register("swath-unfit", window=window)


def test_window_functions_are_checked() -> None:
    swath.hf.register("swath-odd", window=lambda _: 128)
    with pytest.raises(TypeError, match="layer_idx"):
        logits(make("llama", "swath-odd"), tokens(1, 4))
