"""The documentation site: every page has a place in it, every public name is described, and it builds where it can."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAV = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
LISTED = set(re.findall(r"(?:: |- )(\S+\.md)$", NAV, re.MULTILINE))
HOOK = ast.parse((DOCS / "site" / "hook.py").read_text("utf-8"))
PACKAGES = ("swath", "swath.compat", "swath.hf", "swath.testing")
"""Packages whose ``__all__`` is public."""


def outside() -> dict[str, str]:
    """The pages that lie outside docs/, and their names on the site: ``PAGES`` of the hook."""
    (found,) = [n for n in HOOK.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PAGES"]
    return ast.literal_eval(found.value)


def public(package: str) -> list[str]:
    """The names in ``__all__``, without an import: Transformers may be missing."""
    path = ROOT / "src" / Path(*package.split(".")) / "__init__.py"
    tree = ast.parse(path.read_text("utf-8"))
    (found,) = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return ast.literal_eval(found.value)


def test_every_page_has_a_place_in_the_navigation() -> None:
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    pages |= {uri for path, uri in outside().items() if (ROOT / path).exists()}
    assert pages == LISTED, "mkdocs.yml: nav"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(package: str) -> None:
    text = "".join(p.read_text("utf-8") for p in (DOCS / "api").glob("*.md"))
    described = set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", text, re.MULTILINE))
    packages = {name.partition(".")[2] for name in PACKAGES}
    assert described - packages == set(public(package)), "docs/api"


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the site is built where its packages are: make docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "Which keys a query sees" in (tmp_path / "api" / "nouns.html").read_text("utf-8")
