"""The package stands without Triton and without its optional dependencies, in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import swath
from conftest import python_environment

OPTIONAL = ("transformers", "typer", "rich", "matplotlib", "gguf", "hypothesis", "pytest")

EVERY_OPERATOR = f"""
import sys
import torch
import swath
from swath import *
print([name for name in {("triton", *OPTIONAL)} if sys.modules.get(name)])
from swath.testing import Case, make

int8 = swath.KVQuant(torch.int8, "token")
for case in (Case(size=20, global_tokens=2), Case(q_lens=(3, 0, 40), dense=True), Case(quant=int8)):
    inputs = make(case)
    for impl in ("reference", "auto"):
        inputs.check(*inputs.run(impl))
k = torch.randn(3, 2, 64)
for impl in ("reference", "auto"):
    swath.append_kv(inputs.cache, k, k, swath.slots(inputs.block_table, inputs.seq_lens, 16, num_tokens=3), impl=impl)
    out, lse = inputs.run(impl)
    swath.merge_states(out, lse, out, lse, impl=impl)
print(swath.explain("paged_attention", *inputs.args))
"""


def python(program: str, blocked: tuple[str, ...]) -> str:
    """What a program prints in a fresh interpreter in which some modules cannot be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    environment = python_environment() | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", block + program], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("blocked", [("triton",), OPTIONAL, ("triton", *OPTIONAL)], ids=["triton", "optional", "both"])
def test_every_operator_runs_without(blocked: tuple[str, ...]) -> None:
    """And of those that are there ``import swath`` brings none: they are imported on first use."""
    brought, explained = python(EVERY_OPERATOR, blocked).split("\n", 1)
    assert brought == "[]"
    assert "reference  can run it" in explained
    if "triton" in blocked:
        assert "Triton is not installed" in explained


def test_the_block_blocks() -> None:
    """Without torch nothing can run: the way these tests hide a module works."""
    with pytest.raises(AssertionError, match="import of torch halted"):
        python("import swath\nswath.Window", ("torch",))


def test_names_are_imported_when_they_are_asked_for() -> None:
    """``swath --help`` waits for no torch, and a process that loads an exported program finds the operators."""
    assert python("import sys\nimport swath\nprint('torch' in sys.modules)", ()).strip() == "False"
    ops = ("append_kv", "attention", "merge_states", "paged_attention", "quantise_q", "slots")
    program = f"import swath.ops\nimport torch\nprint(*(hasattr(torch.ops.swath, name) for name in {ops}))"
    assert python(program, ()).split() == ["True"] * len(ops)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(swath.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    homes = {name: f"swath.{home}" for name, home in swath._HOMES.items()}
    assert homes == {name: home for name, home in seen.items() if str(home).startswith("swath.")}
    assert sorted(homes) == sorted(swath.__all__)
    assert all(getattr(swath, name).__module__ == home for name, home in homes.items())


WITHOUT_WARPGROUP_MMA = """
import torch
from triton.experimental.gluon.language.nvidia import hopper

del hopper.warpgroup_mma
import swath

pool = torch.randn(4, 2, 16, 64)
table, lens = torch.arange(4, dtype=torch.int32)[None], torch.tensor([50], dtype=torch.int32)
arguments = torch.randn(1, 4, 64), swath.PagedKV(pool, pool.clone()), table, lens
out, want = (swath.paged_attention(*arguments, impl=impl) for impl in ("triton", "reference"))
torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
print("right")
"""


def test_triton_needs_nothing_of_hopper() -> None:
    """Gluon's module for Hopper differs between releases of Triton; other GPUs must not notice."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = python_environment() | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_WARPGROUP_MMA], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.stdout.strip() == "right", ran.stderr[-2000:]
