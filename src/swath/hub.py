"""A kernel for the Hugging Face Hub: ``python -m swath.hub FOLDER`` lays out ``swath.compat`` and all that it needs.

The library ``kernels`` loads a kernel from any path, and several versions of one side by side. So the modules import
one another by relative names, their operators have a namespace that no other build has, and they import nothing but
torch, triton and the standard library. The layout is that of https://huggingface.co/docs/kernels/kernel-requirements.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import swath
from swath.errors import bad_value
from swath.target import SHARED_BYTES

PACKAGE = Path(__file__).parent
OUTSIDE = {"torch", "triton", *sys.stdlib_module_names}
"""What a kernel may import."""
BACKENDS = ("cpu", "cuda", "rocm")
NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
VERSION = 1
"""Of the kernel's interface; Transformers asks for this one where it is not told another."""

ENTRY = '''\
"""FlashAttention's functions on swath {version}: causal and windowed attention, dense and paged."""

from .compat import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
__version__ = "{version}"
'''

OLD_ENTRY = '''\
"""The kernel, for releases of ``kernels`` that look for it here."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
globals().update({{name: getattr(sys.modules["{id}"], name) for name in sys.modules["{id}"].__all__}})
'''

CARD = """\
---
license: apache-2.0
tags:
- kernels
---

# {name}

`flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache` of swath {version}: forward only, with
FlashAttention's arguments. Made by `python -m swath.hub`.
"""


def lay_out(folder: Path, name: str = "swath") -> list[Path]:
    """Write the kernel's repository into a folder that is empty or not there, and return its builds.

    Raises:
        ValueError: the folder holds something; or the name is none for a kernel: lower-case letters, digits, dashes.
        ValueError: a module imports what a kernel may not.
    """
    if not NAME.fullmatch(name):
        raise bad_value("name", "lower-case letters, digits and dashes", repr(name))
    if folder.exists() and any(folder.iterdir()):
        raise bad_value("folder", "one that is empty or does not exist", folder)
    sources = {path.relative_to(PACKAGE): relative_imports(path) for path in sorted(needed())}
    sources[Path("__init__.py")] = ENTRY.format(version=swath.__version__)
    joined = "".join(f"{path.as_posix()}\0{text}\0" for path, text in sorted(sources.items()))
    unique = hashlib.sha256(joined.encode()).hexdigest()[:7]
    builds = []
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        write_build(build, sources, name, backend, f"_{name.replace('-', '_')}_{backend}_{unique}")
        builds.append(build)
    write(folder / "README.md", CARD.format(name=name, version=swath.__version__))
    return builds


def write_build(build: Path, sources: dict[Path, str], name: str, backend: str, kernel_id: str) -> None:
    """One build: the modules, and what the library must know of them."""
    for path, text in sources.items():
        if path == Path("ops/torch_ops.py"):
            text = in_namespace(text, kernel_id)
        write(build / path, text)
    write(build / name.replace("-", "_") / "__init__.py", OLD_ENTRY.format(id=kernel_id))
    files = sorted(path for path in build.rglob("*") if path.is_file())
    metadata = {
        "name": name,
        "id": kernel_id,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": archs} if (archs := architectures(backend)) else {}),
        "digest": {"algorithm": "sha256", "files": {p.relative_to(build).as_posix(): digest(p) for p in files}},
    }
    write(build / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def architectures(backend: str) -> list[str]:
    """The GPUs that kernels are compiled for in the tests, as the library writes them."""
    if backend == "cuda":
        return [f"{int(arch[3:]) // 10}.{int(arch[3:]) % 10}" for arch in SHARED_BYTES if arch.startswith("sm_")]
    return [arch for arch in SHARED_BYTES if arch.startswith("gfx")] if backend == "rocm" else []


def needed() -> set[Path]:
    """The modules that ``swath.compat`` imports, and what those import; backends are found by name, not imported."""
    found: set[Path] = set()
    ahead = [PACKAGE / "compat" / "__init__.py", *(PACKAGE / "backends").rglob("*.py")]
    while ahead:
        path = ahead.pop()
        if path in found or path == PACKAGE / "__init__.py":
            continue
        found.add(path)
        ahead += [parent / "__init__.py" for parent in path.parents if PACKAGE in parent.parents]
        for name in imported(path):
            if name.split(".")[0] == "swath":
                ahead += module_files(name)
            elif name.split(".")[0] not in OUTSIDE:
                raise bad_value(path.name, "imports of torch, triton and the standard library", name)
    return {path for path in found if path.exists()}


def imported(path: Path) -> Iterator[str]:
    """The full names of the modules that a module imports when it runs, and of what it imports from them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_files(name: str) -> list[Path]:
    """The file of a module of swath, or none for another name."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]


def relative_imports(path: Path) -> str:
    """The source of a module, with relative names for the modules of swath.

    Raises:
        ValueError: it has ``import swath`` or the like, which has no relative form.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    dots = "." * len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "swath" for alias in node.names):
            raise bad_value(path.name, "imports of the form `from swath.x import y`", ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "swath":
            at = node.lineno - 1
            lines[at] = re.sub(r"^(\s*from )swath\.?", rf"\g<1>{dots}", lines[at])
    return "".join(lines)


def in_namespace(text: str, namespace: str) -> str:
    """The source of ops/torch_ops.py with another namespace of operators."""
    text, count = re.subn(r'^NAMESPACE = "swath"$', f'NAMESPACE = "{namespace}"', text, flags=re.MULTILINE)
    if count != 1:
        raise bad_value("ops/torch_ops.py", 'one line NAMESPACE = "swath"', count)
    return text


def digest(path: Path) -> str:
    """The SHA-256 of a file, in base 64."""
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def write(path: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m swath.hub", description="Lay out a kernel for the Hugging Face Hub."
    )
    parser.add_argument("folder", type=Path, help="where to write it; empty, or not there yet")
    parser.add_argument("--name", default="swath", help="of the kernel: lower-case letters, digits and dashes")
    arguments = parser.parse_args()
    try:
        builds = lay_out(arguments.folder, arguments.name)
    except ValueError as error:
        parser.error(str(error))
    print(*builds, sep="\n")


if __name__ == "__main__":
    main()
