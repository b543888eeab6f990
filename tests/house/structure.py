"""docs/structure.md: the tree of the package with the first line of each module's docstring.

python tests/house/structure.py > docs/structure.md
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "swath"

INTRODUCTION = """\
# Structure

The package, one line a module: the first line of its docstring. Made by `python tests/house/structure.py`; a test
compares this page with the tree.
"""

CHANGES = {
    "a mask: another rule of which keys a query sees": "a value of `Window`: the rule in `window.py`, its twin for "
    "kernels in `backends/device/window.py`. Every backend asks these two. A mask that is a range of keys for each row "
    "is a function in `bounds.py`",
    "a cache layout, a page table": "a value of `PagedKV` or `PageTable`: `cache.py`, `pages.py` and "
    "`backends/device/cache.py`; the layouts of other libraries in `vendors.py`",
    "a storage type, a granularity of scales": "a value of `KVQuant`: `quant.py` and `backends/device/quant.py`",
    "a serving engine": "an adapter in `engines/` that turns the engine's tensors into the nouns and calls `ops/`",
    "a GPU": "launch rows in `backends/triton/heuristics/`; where Triton's own kernels are not fast enough, a folder "
    "next to `backends/hopper/` that hands its tiles to Triton's planner",
    "an operator": "a file in `ops/`, and a module of its name in each backend: [adding an operator](adding-an-op.md)",
}

DIRECTIONS = """\
Imports go one way: the nouns at the root know no backend; `hopper` imports `gluon`, `gluon` imports `triton`, `triton`
imports `device`; `cpu` and `reference` stand apart; `ops` finds backends by name. `tests/house/test_house.py` checks
it.
"""


def page() -> str:
    """The whole page, Markdown."""
    changes = [
        "| you add | it goes to |",
        "| --- | --- |",
        *(f"| {what} | {where} |" for what, where in CHANGES.items()),
    ]
    return "\n".join([INTRODUCTION, *changes, "", DIRECTIONS, "```text", "src/swath/", *tree(SRC, 1), "```", ""])


def tree(folder: Path, depth: int) -> Iterator[str]:
    """The modules of a folder, then its folders, indented."""
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        if path.is_dir() and any(path.rglob("*.py")):
            yield line(depth, f"{path.name}/", path / "__init__.py")
            yield from tree(path, depth + 1)
        elif path.suffix == ".py" and (path.name != "__init__.py" or folder == SRC):
            yield line(depth, path.name, path)


def line(depth: int, name: str, module: Path) -> str:
    """A name and what its module says of itself in one line."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return f"{'  ' * depth + name:<34}{docstring.partition(chr(10))[0]}".rstrip()


if __name__ == "__main__":
    print(page(), end="")
