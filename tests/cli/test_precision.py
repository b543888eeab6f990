"""What 8 bits cost: the tool that measures it, on a small model and a short haystack; and 64k keys for every form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the extra 'hf'")
pytest.importorskip("rich", reason="the command line needs the extra 'bench'")

from transformers import LlamaConfig, LlamaForCausalLM

from swath import hf
from swath.demo import precision
from swath.demo.precision import FORMS, Haystack, attended, exact, needles, share_found
from swath.demo.settings import Budget
from swath.window import Window

SMALL = Haystack(keys=3000, tokens=24, q_heads=4, kv_heads=2, head_dim=64, score=6.0)
LONG = Haystack(tokens=24, q_heads=4, kv_heads=2)
ERRORS = {
    "16 or 32 bits": 1e-5,
    "int8 cache": 0.02,
    "int8 cache and products": 0.5,
    "int8 cache, fast": 0.02,
    "fp8 cache": 0.06,
    "fp8 cache and queries": 0.07,
    "fp8 cache and queries, fast": 0.07,
}
"""Relative to float64 of the numbers before any rounding. p in 127ths of the largest, as the cpu backend has it, leaves
nothing of keys that weigh less than a 254th of that: here all but the needle."""


@pytest.mark.parametrize("form", FORMS)
def test_needles_are_found_among_64k_keys(form: str) -> None:
    """All but a few of those that float64 finds."""
    found = needles(LONG)
    want, out = exact(found), attended(found, FORMS[form], torch.float32)
    assert share_found(want, found) > 0.9
    assert share_found(out, found) > share_found(want, found) - 0.05
    assert float((out.double() - want).norm() / want.norm()) < ERRORS[form]


def test_needles_outside_a_window_are_not_found() -> None:
    """The test of the test: half of the keys hold half of the needles."""
    found = needles(SMALL)
    assert share_found(exact(found), found) > 0.9
    assert share_found(attended(found, FORMS["int8 cache"], torch.float32), found) > 0.9
    half = attended(found, FORMS["int8 cache"], torch.float32, window=Window(SMALL.keys // 2))
    assert 0.2 < share_found(half, found) < 0.8


def test_perplexities_of_every_form() -> None:
    """Of a model that knows nothing: about as many as it has words, and no two the same, but for "fast", which allows
    what a CPU does not do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(96, (300,))
    said = precision.perplexities(SimpleNamespace(model=model), ids, Budget(300, 100, 128, 0))
    assert said.keys() == FORMS.keys()
    assert len(set(said.values())) == len([name for name in FORMS if "fast" not in name])
    base = said["16 or 32 bits"]
    assert all(abs(math.log(x / base)) < 0.05 for x in said.values())


def test_forms_are_checked_where_they_are_registered() -> None:
    with pytest.raises(ValueError, match=r"^compute: wanted one of 'float', 'int8', 'fast', got 'int4'"):
        hf.register("wrong", compute="int4")
    with pytest.raises(TypeError, match=r"^fp8_queries: wanted a bool, got int"):
        hf.register("wrong", fp8_queries=1)


def test_products_need_a_cache_that_has_them() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    hf.register("swath-products", compute="int8")
    model.set_attn_implementation("swath-products")
    with pytest.raises(ValueError, match=r"^compute: wanted 'float'"), torch.no_grad():
        model(input_ids=torch.arange(5)[None], past_key_values=hf.PagedCache(model.config))


def test_the_command_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "Haystack", lambda keys, _tokens: Haystack(keys, 16, 4, 2, 64, score=6.0))
    output = tmp_path / "precision.json"
    precision.main(["--only", "needles", "--keys", "1000,2000", "--device", "cpu", "--output", str(output)])
    said = json.loads(output.read_text())
    assert said["needles"].keys() == {"1000", "2000"}
    assert all(forms.keys() == {"float64", *FORMS} for forms in said["needles"].values())
    assert "perplexity" not in said
