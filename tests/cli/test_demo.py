"""The demo: its own code path on a tiny model with random weights, and once on the real one where it is installed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="the demo needs transformers: pip install 'swath[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install 'swath[demo]'")

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typer import Typer
from typer.testing import CliRunner

from swath import Window
from swath.cli.demo import demo as command
from swath.demo import gpt_oss, texts
from swath.demo.cases import cases, notes
from swath.demo.generate import Stream, generate
from swath.demo.measure import Case, full_bf16_bytes, measure
from swath.demo.model import Loaded, load
from swath.demo.report import Report
from swath.demo.run import Demo
from swath.demo.settings import Budget, Settings
from swath.quant import dequantise, quantise, token_scale

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2, 2, 1, 64, 2048
BUDGET = Budget(tokens=96, scored=40, chunk=28, decode_steps=2)
CPU = torch.device("cpu")
app = Typer()
app.command()(command)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights and a tokenizer of bytes, as a directory that --model takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=Q_HEADS * HEAD_DIM, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, initializer_range=0.2,
        bos_token_id=256, eos_token_id=256, pad_token_id=256, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Loaded:
    return load(tiny_dir, CPU, torch.float32)


@pytest.fixture(scope="module")
def ids(tiny: Loaded) -> Tensor:
    return texts.topics(tiny.tokenizer).take(0, BUDGET.tokens)


def settings(tiny_dir: Path, output: Path) -> Settings:
    return Settings(
        output=output, device=CPU, prompt="Why?", max_new_tokens=5, window=16, global_tokens=4, model=tiny_dir,
        budget=BUDGET,
    )  # fmt: skip


def dense_perplexity(llama: Any, ids: Tensor, window: Window | None, kv: str = "none") -> float:
    """The same quantity without swath's attention or cache: one pass of Transformers with a mask, over stored keys."""

    def over_stored(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
        return sdpa_attention_forward(module, q, as_stored(k, kv), as_stored(v, kv), mask, **options)

    AttentionInterface.register("over-stored", over_stored)
    AttentionMaskInterface.register("over-stored", sdpa_mask)
    llama.set_attn_implementation("over-stored")
    positions = torch.arange(len(ids))
    mask = (window or Window()).mask(positions, positions)[None, None]
    with torch.no_grad():
        logits = llama(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
    return math.exp(F.cross_entropy(logits[-BUDGET.scored - 1 : -1], ids[-BUDGET.scored :]).item())


def as_stored(x: Tensor, kv: str) -> Tensor:
    """Keys or values [B, Hkv, T, D] after a round trip through the storage, with a scale for each token and head."""
    if kv == "none":
        return x
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv]
    scale = token_scale(x, dtype)[..., None]
    return dequantise(quantise(x, scale, dtype), scale)


@pytest.mark.parametrize(
    "window", [None, Window(16), Window(16, global_tokens=4)], ids=["full", "window", "window+leading"]
)
@pytest.mark.parametrize("kv", ["none", "int8", "fp8"])
def test_perplexity_through_the_paged_cache_is_that_of_one_dense_pass(
    tiny: Loaded, ids: Tensor, window: Window | None, kv: str
) -> None:
    truth = dense_perplexity(tiny.model, ids, window, kv)
    row = measure(Case("any", tiny.model, window, kv), ids, BUDGET, lambda n: None)
    # A key that differs in its last bit may be stored as the next integer.
    assert row.perplexity == pytest.approx(truth, rel=1e-4 if kv == "none" else 1e-3)
    assert row.kv == ("fp32" if kv == "none" else kv)


def test_windows_and_storage_show_in_the_perplexity(tiny: Loaded, ids: Tensor) -> None:
    """Else the test above could not tell them apart."""
    windows = (None, Window(16), Window(15), Window(16, global_tokens=4))
    found = [dense_perplexity(tiny.model, ids, window, kv) for window in windows for kv in ("none", "int8", "fp8")]
    assert all(abs(math.log(a / b)) > 2e-3 for a, b in combinations(found, 2))


@pytest.mark.parametrize("near", [True, False], ids=["near", "text"])
def test_rows_after_a_long_text_score_the_same_tokens(tiny: Loaded, near: bool) -> None:
    text = texts.topics(tiny.tokenizer)
    ids, window = torch.cat([text.take(96, 64), text.take(0, 96)]), Window(16, global_tokens=4)
    case = Case("any", tiny.model, window, "none", 64, "cache" if near else "text")
    row = measure(case, ids, BUDGET, lambda n: None)
    truth = dense_perplexity(tiny.model, ids, window)
    assert row.tokens_before == 64
    assert row.full_bf16_cache_bytes == LAYERS * 160 * 2 * KV_HEADS * HEAD_DIM * 2
    assert (row.perplexity == pytest.approx(truth, rel=1e-4)) is not near


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no-sinks"])
def test_the_gpt_oss_shape_agrees_with_transformers_own_attention(tiny: Loaded, ids: Tensor, sinks: bool) -> None:
    given = gpt_oss.calibrate(tiny.model, [ids]) if sinks else None
    shaped = gpt_oss.with_sinks(tiny.model, given, 16)
    shaped.set_attn_implementation("eager")
    with torch.no_grad():
        logits = shaped(input_ids=ids[None], use_cache=False).logits[0]
    truth = math.exp(F.cross_entropy(logits[-BUDGET.scored - 1 : -1], ids[-BUDGET.scored :]).item())
    row = measure(Case("any", shaped, None, "none"), ids, BUDGET, lambda n: None)
    assert row.perplexity == pytest.approx(truth, rel=1e-4)


def test_the_gpt_oss_shape_without_sinks_and_a_wide_window_is_the_llama(tiny: Loaded, ids: Tensor) -> None:
    shaped = gpt_oss.with_sinks(tiny.model, None, 512)
    tiny.model.set_attn_implementation("eager")
    shaped.set_attn_implementation("eager")
    with torch.no_grad():
        expected, got = (m(input_ids=ids[None], use_cache=False).logits for m in (tiny.model, shaped))
    torch.testing.assert_close(got, expected)
    weights = dict(tiny.model.named_parameters())
    assert all(p.data_ptr() == weights[n].data_ptr() for n, p in shaped.named_parameters() if n in weights)


def test_sinks_stand_in_windowed_layers_only(tiny: Loaded) -> None:
    shaped = gpt_oss.with_sinks(tiny.model, torch.full((LAYERS, Q_HEADS), 1.5), 16)
    even, odd = (layer.self_attn.sinks for layer in shaped.model.layers)
    assert even.tolist() == [-math.inf] * Q_HEADS
    assert odd.tolist() == [1.5] * Q_HEADS


def test_leading_lse_is_the_logsumexp_of_the_first_scores() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, 9, HEAD_DIM) for heads in (4, 2, 2))
    scores = 0.3 * q @ k[:, :4].repeat_interleave(2, 0).mT
    scores = scores.masked_fill(torch.arange(4) > torch.arange(9)[:, None], -torch.inf)
    torch.testing.assert_close(gpt_oss.leading_lse(q, k, v, 0.3), scores.logsumexp(-1).T)


def test_a_model_with_windows_of_its_own_keeps_them(ids: Tensor, tiny_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=257, hidden_size=Q_HEADS * HEAD_DIM, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, initializer_range=0.2,
        sliding_window=24,
    )  # fmt: skip
    mistral = MistralForCausalLM(config).eval()
    plain = settings(tiny_dir, tmp_path)
    todo = cases(mistral, [], plain)
    names = ["the model's own windows", "window 16", "window 16 + 4 leading"]
    assert list(dict.fromkeys(case.attention for case in todo)) == names
    assert "this one is mistral" in notes(mistral, plain)
    truth = dense_perplexity(mistral, ids, Window(24))
    assert measure(todo[0], ids, BUDGET, lambda n: None).perplexity == pytest.approx(truth, rel=1e-4)


def test_a_run_leaves_a_table_json_and_a_plot(tiny_dir: Path, tmp_path: Path) -> None:
    out = Console(width=100, record=True, file=StringIO())
    demo = Demo(settings(tiny_dir, tmp_path / "made" / "here"), out)
    demo.run()
    saved = json.loads(demo.settings.json_path.read_text())
    assert saved["complete"]
    names = ["full attention", "window 16", "window 16 + 4 leading", "gpt-oss shape, sinks", "gpt-oss shape, no sinks"]
    assert [(r["attention"], r["kv"]) for r in saved["rows"]] == [(n, kv) for n in names for kv in ("fp32", "int8")]
    full = LAYERS * BUDGET.tokens * 2 * KV_HEADS * HEAD_DIM * 2
    by_name = {(r["attention"], r["kv"]): r["peak_cache_bytes"] for r in saved["rows"]}
    assert by_name["full attention", "fp32"] == 2 * full
    assert by_name["full attention", "int8"] == full * (HEAD_DIM + 4) // (2 * HEAD_DIM)
    assert by_name["window 16", "int8"] < by_name["gpt-oss shape, sinks", "int8"] < by_name["full attention", "int8"]
    assert {r["full_bf16_cache_bytes"] for r in saved["rows"]} == {full}
    assert saved["generation"]["new_tokens"] == 5
    assert saved["conditions"]["budget"]["tokens"] == BUDGET.tokens
    assert demo.settings.plot_path.read_bytes().startswith(b"\x89PNG")
    text = out.export_text()
    assert all(name in text for name in names)
    assert "Perplexity of the last 40 of the first 96 tokens" in text


def test_long_texts_add_rows(tiny_dir: Path, tmp_path: Path) -> None:
    """If the text is long enough. The picture leaves these rows out."""
    (tmp_path / "text").write_text("some words of a text " * 8)
    for path, rows in ((None, 12), (tmp_path / "text", 10)):
        budget = replace(BUDGET, before=2048)
        demo = Demo(replace(settings(tiny_dir, tmp_path / "out"), text=path, budget=budget), Console(file=StringIO()))
        demo.run()
        saved = json.loads(demo.settings.json_path.read_text())
        assert len(saved["rows"]) == rows
        assert ("After 2k tokens: other text of 2,048 tokens" in saved["conditions"]["notes"]) is (rows == 12)
    assert "trained with full attention, up to 2,048 tokens." in saved["conditions"]["notes"]


def test_quick_measures_fewer_rows(tiny: Loaded, tiny_dir: Path, tmp_path: Path) -> None:
    quick = Settings(**{**vars(settings(tiny_dir, tmp_path)), "quick": True})
    named = [(case.attention, case.kv) for case in cases(tiny.model, [], quick)]
    windows = [("window 16", "int8"), ("window 16 + 4 leading", "int8")]
    assert named == [("full attention", "none"), ("full attention", "int8"), *windows]


def test_without_quantisation_or_leading_tokens_there_are_no_rows_for_them(
    tiny: Loaded, tiny_dir: Path, tmp_path: Path
) -> None:
    plain = Settings(**{**vars(settings(tiny_dir, tmp_path)), "quick": True, "kv": "none", "global_tokens": 0})
    named = [(case.attention, case.kv) for case in cases(tiny.model, [], plain)]
    assert named == [("full attention", "none"), ("window 16", "none")]


def test_an_interrupt_keeps_the_rows_so_far(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def interrupted(*args: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(measure(args[0], args[1][:40], Budget(40, 8, 20, 1), lambda n: None))
        return done[-1]

    monkeypatch.setattr("swath.demo.run.measure", interrupted)
    text = tmp_path / "text"
    text.write_text("How much wood would a woodchuck chuck? " * 40)
    options = ["--model", str(tiny_dir), "--text", str(text), "--output", str(tmp_path), "--device", "cpu", "--quick"]
    result = CliRunner().invoke(app, [*options, "--max-new-tokens", "2", "--prompt", "Why?"])
    assert result.exit_code == 130
    assert result.stderr.strip() == f"swath: interrupted; 2 rows kept in {tmp_path / 'demo.json'}"
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert [r["perplexity"] for r in saved["rows"]] == [r.perplexity for r in done]
    assert not saved["complete"]


@pytest.fixture
def paths(tmp_path: Path, tiny_dir: Path) -> dict[str, str]:
    """What a user may give by mistake."""
    (tmp_path / "short").write_text("short!")
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny_dir, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    shutil.copytree(tiny_dir, tmp_path / "garbled")
    (tmp_path / "garbled" / "config.json").write_text("{")
    return {path.name.upper(): str(path) for path in tmp_path.iterdir()}


HUGE = str(10**20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:99"], "device: wanted cpu"),
        (["--quick", "--text", "SHORT"], "text: wanted at least 1024 tokens, got 6 in short"),
        (["--quick", "--text", "BINARY"], "text: wanted a text file in UTF-8, got other bytes at 0 of BINARY"),
        (["--quick", "--text", "EMPTY"], "EMPTY: Is a directory"),
        (["--quick", "--text", "ABSENT"], "ABSENT: No such file"),
        (["--quick", "--prompt", ""], "prompt: wanted a text of a token or more"),
        (["--quick", "--window", HUGE], "size: wanted at most"),
        (["--quick", "--global-tokens", HUGE], "global_tokens: wanted at most"),
        (["--quick", "--output", "SHORT"], "SHORT: is no folder"),
        (["--quick", "--output", "/dev/null/x"], "/dev/null"),
        (["--model", "EMPTY"], "config.json"),
        (["--model", "ABSENT"], "model: wanted a directory with a model of Hugging Face, got ABSENT"),
        (["--model", "SHORT"], "model: wanted a directory with a model of Hugging Face, got SHORT"),
        (["--model", "BROKEN"], "model: wanted a model that Transformers can load from BROKEN"),
        (["--model", "GARBLED"], "model: wanted a model that Transformers can load from GARBLED"),
        ([], "model: wanted a context of at least 2081 tokens, got 2048"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_used_is_one_line(
    options: list[str], message: str, paths: dict[str, str], tiny_dir: Path, tmp_path: Path
) -> None:
    paths = paths | {"ABSENT": str(tmp_path / "absent")}
    for name, path in paths.items():
        message = message.replace(name, path)
    options = [paths.get(o, o) for o in options]
    for option, value in (("--model", str(tiny_dir)), ("--output", str(tmp_path / "out")), ("--device", "cpu")):
        options += [] if option in options else [option, value]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2, result.exception
    assert result.stderr.startswith("swath: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_stream_shows_whole_characters_only(tiny: Loaded) -> None:
    shown: list[str] = []
    stream = Stream(tiny.tokenizer, stop={256}, show=shown.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in [*tiny.tokenizer("naïve €").input_ids, 256]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(shown) == stream.text == "naïve €"
    assert "�" not in "".join(shown)
    assert len(stream.times) == len("naïve €".encode()) + 1
    assert stream.tokens_per_s() > 0


def test_generation_is_greedy_and_windowed(tiny: Loaded) -> None:
    """The tokens are those of Transformers' own attention as long as the window covers them."""
    prompt = tiny.tokenizer("Why?").input_ids
    tiny.model.set_attn_implementation("eager")
    expected = tiny.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=8,
    )
    result = generate(
        Case("any", tiny.model, Window(16, global_tokens=4), "none"), tiny.tokenizer, "Why?", 8, lambda s: None
    )
    assert result.text == tiny.tokenizer.decode(expected[0, len(prompt) :], skip_special_tokens=True)
    assert result.full_bf16_cache_bytes == full_bf16_bytes(tiny.model.config, result.prompt_tokens + result.new_tokens)


def test_a_report_is_replaced_whole(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "demo.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Report(conditions={"model": "any"}).write(path)
    assert path.read_text() == "old"
