"""The table of long chats: its measure on a tiny model, and its place in the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo needs transformers: pip install 'swath[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install 'swath[demo]'")

from test_demo import BUDGET, dense_perplexity, ids, tiny, tiny_dir  # noqa: F401 - fixtures

from swath import Window
from swath.demo import long_chats
from swath.demo.long_chats import LongChats, block, perplexities, with_table
from swath.demo.measure import Case

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("near", [True, False], ids=["near", "text"])
def test_the_same_tokens_are_scored_after_any_text(tiny: Any, ids: Tensor, near: bool, monkeypatch: Any) -> None:  # noqa: F811
    """Kept near, what was read before does not count; with a text of ten tokens that is read again and again."""
    monkeypatch.setattr(long_chats, "CHUNK", 16)
    window = Window(16, global_tokens=4)
    case = Case("any", tiny.model, window, "none", leading_positions="cache" if near else "text")
    other = torch.cat([ids[:4], ids[50:56]])  # the leading tokens are those of the passage
    found = [*perplexities(case, ids, BUDGET.scored, other, (0, 40, 70))]
    assert [tokens for tokens, _, _ in found] == [0, 40, 70]
    alone = dense_perplexity(tiny.model, ids, window)
    if not near:
        assert found[0][1] == pytest.approx(alone, rel=1e-4)
        assert found[2][1] != pytest.approx(alone, rel=1e-2)
    else:
        assert found[1][1] == pytest.approx(found[2][1], rel=1e-3)
    held = [held for _, _, held in found]
    assert held[1] <= held[0] * 1.5


def test_the_table() -> None:
    found = LongChats(
        "a model", "bf16", "a GPU", "a text", {"swath": "1"}, "today", {"text": {"0": 21.04}, "cache": {}}
    )
    found.perplexity["cache"] = {"0": 21.0, "4096": 186.4}
    lines = block(found).splitlines()
    assert lines[1:5] == [
        "| tokens before | 0 | 4,096 |",
        "| --- | ---: | ---: |",
        '| `"text"` | 21.0 | not run |',
        '| `"cache"` | 21.0 | 186 |',
    ]
    page = with_table("<!-- long chats table: begin -->\n<!-- long chats table: end -->", json.dumps(asdict(found)))
    assert "a model in bf16 on a GPU" in page


def test_the_page_has_the_stored_figures() -> None:
    page = (ROOT / long_chats.PAGE).read_text(encoding="utf-8")
    stored = (ROOT / "docs" / "img" / "long-chats.json").read_text(encoding="utf-8")
    assert with_table(page, stored) == page, "run: python -m swath.demo.long_chats --page docs/img/long-chats.json"
