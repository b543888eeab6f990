"""Wrong input is a TypeError or ValueError that names the argument, also where Python drops asserts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wrong_calls import CASES, WRONG, Wrong, call, right

from conftest import python_environment
from swath import PagedKV, paged_attention, target
from swath.testing import Case, make


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_argument_is_named(wrong: Wrong) -> None:
    assert wrong.complaint() is None


@pytest.mark.parametrize("what", [*CASES, "PagedKV", "append_kv", "slots", "slots ragged", "merge_states"])
def test_the_calls_are_right_but_for_one_argument(what: str) -> None:
    """Without this a call wrong in two arguments could pass for the wrong reason."""
    call(what, right(what))


def test_nothing_rests_on_asserts() -> None:
    """The whole table again under ``python -O``."""
    program = Path(__file__).with_name("wrong_calls.py")
    ran = subprocess.run(
        [sys.executable, "-O", program], capture_output=True, text=True, env=python_environment(), check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(WRONG)} wrong calls, asserts off" in ran.stdout


@pytest.mark.skipif(target.interpreting(), reason="TRITON_INTERPRET=1 lets triton run on a CPU")
def test_a_backend_that_cannot_run_here_says_why() -> None:
    inputs = make(Case())
    with pytest.raises(ValueError, match=r"^impl: wanted a backend that can run this call; 'triton' cannot, got .+"):
        inputs.run("triton")


@pytest.mark.parametrize("page_size", [0, 2, 9, 24, 100])
def test_page_sizes_that_cannot_be(page_size: int) -> None:
    pool = torch.zeros(2, 1, page_size, 64)
    with pytest.raises(ValueError, match=r"^page_size: wanted 1, 8 or a multiple of 16, got"):
        PagedKV(pool, pool.clone())


@pytest.mark.parametrize("head_dim", [1, 4, 60, 264, 512])
def test_head_dims_that_cannot_be(head_dim: int) -> None:
    pool = torch.zeros(2, 1, 16, head_dim)
    lens = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^q: wanted a head_dim that is a multiple of 8, at most 256, got"):
        paged_attention(torch.zeros(1, 1, head_dim), PagedKV(pool, pool.clone()), lens[:, None], lens)


def test_inputs_that_require_grad_are_right_without_grad() -> None:
    inputs = make(Case())
    with torch.no_grad():
        paged_attention(inputs.q.clone().requires_grad_(), *inputs.args[1:])
