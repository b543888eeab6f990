"""Every kernel compiles for every target, without a GPU: shared memory under the target's limit, spills bounded.

A covering set of pairs of kernel variants by default, all of them with ``--all-variants`` (``make compile-all``). Each
target compiles in a process of its own, because Triton keeps one active driver.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from compile_variants import OPTIONS, PAIRED_TARGET, TARGETS, rows_of

from conftest import python_environment
from swath.backends.hopper import attention as hopper
from swath.target import SHARED_BYTES

pytest.importorskip("triton", reason="Triton is not installed")

MAX_SPILL_BYTES = 512
"""Spilled bytes a thread allowed; more costs time that nobody would look for."""


SHARES = [(arch, part) for arch in TARGETS for part in range(4 if arch == PAIRED_TARGET else 1)]
"""The target with the most variants is compiled in four parts, so that test processes end together."""


@pytest.mark.parametrize(("arch", "part"), SHARES)
def test_kernels_compile(arch: str, part: int, all_variants: bool) -> None:
    rows = [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())] if all_variants else None
    rows = rows_of(arch) if rows is None else rows
    results = compile_rows(arch, rows[part :: sum(share[0] == arch for share in SHARES)])
    failures = [r for r in results if "error" in r]
    assert not failures, failures[:3]
    wanted = {"split_kernel", "reduce_kernel", "tile_kernel"} | (
        {"hopper_tile_kernel"} if arch == hopper.ARCH else set()
    )
    assert {r["kernel"] for r in results} >= wanted
    over = [r for r in results if r["shared"] > SHARED_BYTES[arch]]
    assert not over, over
    spilled = [r for r in results if r["spills"] > MAX_SPILL_BYTES]
    assert not spilled, spilled
    if arch == hopper.ARCH:
        from swath.backends.gluon.pipeline import FIRST_NAMED

        tiles = [r for r in results if r["kernel"] == "hopper_tile_kernel"]
        assert not [r["row"] for r in tiles if r["serialised"]], "products wait for one another"
        used = {number for r in tiles for number in r["barriers"]}
        assert used, "Triton lets warps meet at named barriers, as it did"
        assert max(used) < FIRST_NAMED.value, used


def compile_rows(arch: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", "import compile_variants; compile_variants.main()", arch]
    environment = python_environment()
    environment["PYTHONPATH"] += f":{Path(__file__).parent}:{Path(__file__).parents[1]}"
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
