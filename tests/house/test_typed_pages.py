"""What the documentation shows is typed: a user's strict type checker has nothing to say about it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import PAGES, README, blocks

import swath

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")

SOURCE = Path(swath.__file__).parent
TYPED = {README.name, "quickstart.md", "semantics.md"}
ENGINE = """
import torch

import swath


def step(
    q: torch.Tensor, pool: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor, with_lse: bool
) -> torch.Tensor:
    cache = swath.PagedKV(pool, pool, k_scale=0.5, v_scale=torch.ones(()))
    table = swath.PageTable(tokens, rows=rows, unit="token")
    alone: torch.Tensor = swath.paged_attention(q, cache, table, lens, window=128, split_size=64)
    out, lse = swath.paged_attention(q, cache, (tokens, rows), lens, return_lse=True, impl="cpu")
    either = swath.paged_attention(q, cache, tokens, lens, window=swath.Window(8), return_lse=with_lse)
    swath.check(cache, table, lens, window=128)
    merged, _ = swath.merge_states(out, lse, alone, lse)
    return merged if isinstance(either, tuple) else either
"""
"""What a serving engine calls."""


def checked(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """mypy --strict over files of a user who has swath installed: what is wrong inside swath is not said there."""
    for name, code in files.items():
        (folder / name).write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", *files]
    environment = {**os.environ, "MYPYPATH": str(SOURCE.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_pages_pass_strict_type_checking(tmp_path: Path) -> None:
    """And a mistake does not: else nothing was looked at."""
    pages = {f"{p.stem}_page.py": p for p in PAGES if p.name in TYPED}
    assert len(pages) == len(TYPED)
    files = {
        name: "\n".join(code for language, code in blocks(page.read_text(encoding="utf-8")) if language == "python")
        for name, page in pages.items()
    }
    files |= {"engine.py": ENGINE, "mistake.py": "import swath\n\nx: int = swath.Window(1)\n"}
    said = checked(tmp_path, files).stdout.splitlines()
    assert any(line.startswith("mistake.py:3: error:") for line in said)
    assert [line for line in said if ": error:" in line and not line.startswith("mistake.py")] == []


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()
