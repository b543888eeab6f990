"""The project's own limits: sizes, import directions, no asserts, no dead parameters, nothing left to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from conftest import OPS
from swath.dispatch import BACKENDS

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "swath"
SOURCES = sorted(SRC.rglob("*.py"))
PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
TEXT = [*PYTHON, *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]

FILE_LINES = 400
HOST_LINES = 50
JIT_LINES, JIT_PARAMETERS = 45, 12
KERNEL_LINES, KERNEL_PARAMETERS = 120, 48

FORBIDDEN = re.compile(r"\b(TODO|FIXME|XXX|HACK|TBD|[Ll]orem ipsum)\b|/wor" + "k/")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, Function)]


def is_jit(function: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines(function: Function) -> int:
    """Lines from the def to the end, without the docstring."""
    count = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        count -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return count


def parameters(function: Function) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside, by its full name."""
    return imports_of(path, parsed(path))


def imports_of(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                filter(None, (module_of(path).rsplit(".", node.level)[0] if node.level else "", node.module))
            )
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 30
    assert sum(is_jit(f) for path in SOURCES for f in functions(path)) > 10 or not (SRC / "backends").exists()


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    in_device = "device" in path.relative_to(SRC).parts
    too_long = []
    for f in functions(path):
        limit = HOST_LINES if not is_jit(f) else JIT_LINES if in_device else KERNEL_LINES
        if lines(f) >= limit:
            too_long.append(f"{f.name}: {lines(f)} lines, limit {limit}")
    assert not too_long


@pytest.mark.parametrize("path", [p for p in SOURCES if any(map(is_jit, functions(p)))], ids=name_of)
def test_kernels_take_few_parameters(path: Path) -> None:
    limit = JIT_PARAMETERS + 1 if "device" in path.relative_to(SRC).parts else KERNEL_PARAMETERS
    too_many = {f.name: len(parameters(f)) for f in functions(path) if is_jit(f) and len(parameters(f)) >= limit}
    assert not too_many


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_asserts(path: Path) -> None:
    """``python -O`` drops them; errors at the public door are TypeError and ValueError."""
    assert not [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)]


def test_nothing_autotunes() -> None:
    """Launches come from tables: no search at import, in the serving path or under capture."""
    assert not [path for path in SOURCES if "triton.autotune" in path.read_text(encoding="utf-8")]


def test_no_failure_is_swallowed() -> None:
    """No handler of everything, and none that does nothing."""
    silent = [
        f"{name_of(path)}:{node.lineno}"
        for path in PYTHON
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or isinstance(node.body[0], ast.Pass))
    ]
    assert not silent


def is_interface(path: Path, function: Function) -> bool:
    """A function whose parameters are decided elsewhere: a backend's, a Protocol's, a callback's, an engine's."""
    offers = path.stem in BACKENDS or "backends" in path.relative_to(SRC).parts
    backend = offers and function.name in ("why_not", "run", "plan", "warm")
    callback = any(not is_jit(function) for _ in function.decorator_list)
    engine = "engines" in path.parts and path.name != "common.py"
    return backend or callback or engine or path.name == "dispatch.py"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_dead_parameters(path: Path) -> None:
    dead = []
    for f in functions(path):
        if is_interface(path, f):
            continue
        used = {node.id for statement in f.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        dead += [f"{f.name}({p})" for p in parameters(f) if p not in used | {"self", "cls"} and not p.startswith("_")]
    assert not dead


@pytest.mark.parametrize("path", TEXT, ids=name_of)
def test_nothing_is_left_to_do(path: Path) -> None:
    if path != Path(__file__):
        found = [match.group() for match in FORBIDDEN.finditer(path.read_text(encoding="utf-8"))]
        assert not found


NOUNS = ("errors", "vendors", "window", "bounds", "quant", "pages", "checks", "cache", "problem", "target")
USERS = ("swath.hf", "swath.engines", "swath.compat", "swath.hub", "swath.cli", "swath.bench", "swath.demo")
ABOVE = ("swath.ops", "swath.dispatch", "swath.backends", *USERS)
BACKENDS_NEVER = ("swath.ops", "swath.dispatch", "swath.testing", *USERS)
NEVER = {
    **{f"swath.{noun}": ABOVE for noun in NOUNS},
    "swath.testing.oracle": ("swath.",),
    "swath.backends": BACKENDS_NEVER,
    "swath.backends.device": ("swath.",),
    "swath.backends.reference": ("swath.backends", "triton"),
    "swath.backends.cpu": ("swath.backends", "triton"),
    "swath.backends.triton": ("swath.backends.gluon", "swath.backends.hopper"),
    "swath.backends.gluon": ("swath.backends.hopper",),
    "swath.backends.triton.arguments": ("triton",),
    "swath.backends.triton.attention": ("triton",),
    "swath.backends.triton.features": ("triton",),
    "swath.backends.triton.heuristics": ("triton",),
    "swath.backends.triton.work": ("triton",),
    "swath.backends.hopper.attention": ("triton",),
    "swath.backends.hopper.heuristics": ("triton",),
    "swath.ops": ("swath.backends", "swath.testing", *USERS),
    "swath.engines": ("swath.backends", "swath.hf", "swath.cli", "swath.bench", "swath.demo", "swath.testing"),
    "swath.engines.common": ("vllm", "sglang"),
}
"""Modules (and what lies under them) and what they must never import."""


@pytest.mark.parametrize("module", NEVER)
def test_import_directions(module: str) -> None:
    paths = [p for p in SOURCES if f"{module_of(p)}.".startswith(f"{module}.")]
    assert paths
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in paths
        for name in imports(path)
        for never in NEVER[module]
        if f"{name}.".startswith(f"{never.rstrip('.')}.") and not name.startswith(f"{module}.")
    ]
    assert not wrong


def test_device_helpers_import_triton_and_each_other() -> None:
    """Then Triton and Gluon kernels can share them, and nothing on the host leaks in."""
    allowed = ("triton", "swath.backends.device", "typing", "__future__")
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in SOURCES
        if "device" in path.relative_to(SRC).parts
        for name in imports(path)
        if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)
    ]
    assert not wrong


def test_device_helpers_allocate_nothing() -> None:
    """They take index tensors and state as arguments: Gluon needs a layout where Triton does not."""
    makers = {"arange", "full", "zeros", "dot"}
    wrong = [
        f"{name_of(path)}:{node.lineno} calls {node.func.attr}"
        for path in SOURCES
        if "device" in path.relative_to(SRC).parts
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers
    ]
    assert not wrong


def test_dispatch_finds_backends_and_nobody_imports_them() -> None:
    answers = {f"swath.backends.{backend}.{op}" for op in OPS for backend in BACKENDS}
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in SOURCES
        for name in imports(path)
        if name in answers and (module_of(path), name) not in RUNNERS
    ]
    assert not wrong


RUNNERS = {
    ("swath.backends.hopper.attention", "swath.backends.triton.attention"),
    ("swath.bench.tune", "swath.backends.triton.attention"),
    ("swath.bench.tune", "swath.backends.hopper.attention"),
}
"""Who plans launches by a backend's runner: hopper's is triton's with tiles of its own, and tuning tries other rows."""


def test_no_import_circle() -> None:
    """Imports inside functions count too: they are how a circle hides. Those for type checkers alone do not, nor does
    the package that a module is in."""
    modules = {module_of(path): path for path in SOURCES}
    graph = {
        module: {name for name in runtime_imports(path) if name in modules and not module.startswith(name)}
        for module, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def runtime_imports(path: Path) -> Iterator[str]:
    """``imports`` without those under ``if TYPE_CHECKING``."""
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    yield from imports_of(path, tree)


def test_the_limits_bite(tmp_path: Path) -> None:
    """The measures above see what they should."""
    file = tmp_path / "sample.py"
    body = "\n".join(f"    x{i} = a" for i in range(60))
    file.write_text(
        f'def long(a, dead):\n    """Doc.\n\n    More.\n    """\n{body}\n\n@triton.jit\ndef kernel(a):\n    pass\n'
    )
    long, kernel = functions(file)
    assert lines(long) == 61
    assert parameters(long) == ["a", "dead"]
    assert (is_jit(long), is_jit(kernel)) == (False, True)
    assert FORBIDDEN.search("# " + "TO" + "DO: later")
