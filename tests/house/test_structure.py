"""docs/structure.md lists what is there, and each module says in one line what it is."""

from __future__ import annotations

import ast

import pytest
from structure import ROOT, SRC, page

MODULES = sorted(SRC.rglob("*.py"))


def test_the_page_is_the_tree() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    assert text == page(), "run: python tests/house/structure.py > docs/structure.md"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_a_module_says_in_one_line_what_it_is(path: object) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))  # type: ignore[attr-defined]
    assert docstring is not None
    first = docstring.splitlines()[0]
    assert first.endswith((".", "?", "``")), f"not a sentence of one line: {first!r}"
