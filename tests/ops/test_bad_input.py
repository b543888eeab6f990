"""Wrong input is a TypeError or ValueError that names the argument, also where Python drops asserts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from wrong_calls import CASES, WRONG, Wrong, call, right

from conftest import python_environment
from swath import PagedKV, append_kv, merge_states, paged_attention, slots, target
from swath.testing import Case, make


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_argument_is_named(wrong: Wrong) -> None:
    assert wrong.complaint() is None


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_argument_is_named_under_fake_tensors(wrong: Wrong) -> None:
    assert wrong.complaint(FakeTensorMode(allow_non_fake_inputs=True)) is None


@pytest.mark.parametrize("what", sorted({*CASES, *(wrong.what for wrong in WRONG)}))
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


@pytest.mark.parametrize("head_dim", [1, 4, 60, 260, 520])
def test_head_dims_that_cannot_be(head_dim: int) -> None:
    pool = torch.zeros(2, 1, 16, head_dim)
    lens = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^q: wanted a head_dim that is a multiple of 8, at most 512, got"):
        paged_attention(torch.zeros(1, 1, head_dim), PagedKV(pool, pool.clone()), lens[:, None], lens)


@pytest.mark.parametrize("v_head_dim", [0, 4, 60])
def test_v_head_dims_that_cannot_be(v_head_dim: int) -> None:
    cache = PagedKV.empty(torch.float32, 2, 1, 16, 64, v_head_dim=v_head_dim)
    lens = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^v: wanted a v_head_dim that is a multiple of 8, at most head_dim 64, got"):
        paged_attention(torch.zeros(1, 1, 64), cache, lens[:, None], lens)


def test_inputs_that_require_grad_are_right_without_grad() -> None:
    inputs = make(Case())
    with torch.no_grad():
        paged_attention(inputs.q.clone().requires_grad_(), *inputs.args[1:])


def test_out_is_no_part_of_the_cache() -> None:
    """It is looked for in every call: addresses are in no signature."""
    inputs = make(Case(dtype=torch.float32))
    inputs.run(out=torch.empty_like(inputs.q))
    inside = inputs.cache.v.flatten()[-inputs.q.numel() :].view(inputs.q.shape)
    with pytest.raises(ValueError, match=r"^out: wanted memory that is not the cache's, got"):
        inputs.run(out=inside)


TRANSFORMED = {
    "q": lambda x, c: paged_attention(x, c["cache"], c["block_table"], c["seq_lens"]),
    "k": lambda x, c: append_kv(c["cache"], x, c["new"], c["slot_mapping"]),
    "out_a": lambda x, c: merge_states(x, c["lse"], c["out"], c["lse"]),
    "seq_lens": lambda x, c: slots(c["block_table"], x.int(), 16, num_tokens=3),
}


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_tensors_of_transforms_are_refused(name: str, transform: Callable[..., Any]) -> None:
    """They have no memory of their own, and swath no rule for them."""
    inputs = make(Case(dtype=torch.float32))
    x = {"q": inputs.q, "k": torch.zeros(3, 2, 64), "out_a": torch.zeros(3, 4, 64), "seq_lens": torch.ones(3)}[name]
    others = {
        "cache": inputs.cache, "block_table": inputs.block_table, "seq_lens": inputs.seq_lens, "out": x,
        "new": x, "slot_mapping": torch.arange(3), "lse": torch.zeros(3, 4),
    }  # fmt: skip
    with pytest.raises(TypeError, match=rf"^{name}: wanted a tensor outside torch.func"):
        transform(lambda x: TRANSFORMED[name](x, others))(x[None] if transform is torch.vmap else x)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"softcap": -1.0}, "softcap: wanted .*, got -1.0"),
        ({"scale": "x"}, "scale: wanted .*, got str"),
        ({"split_size": 100}, "split_size: wanted a multiple of 64"),
        ({"softmax_scale": 1.0}, "softmax_scale: wanted scale=, as swath calls it"),
        ({"impl": []}, "impl: wanted a str, got list"),
        ({"window": "local"}, "window: wanted a Window, an int or None, got str"),
        ({"q_start": torch.zeros(2, dtype=torch.int32)}, r"q_start: wanted shape \[3\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_torch_compile_says_the_argument(changes: dict[str, Any], said: str) -> None:
    """In the words of an eager call, inside the error that the compiler raises."""
    inputs = make(Case())
    torch._dynamo.reset()
    with pytest.raises(Exception, match=said):
        torch.compile(lambda: paged_attention(*inputs.args, **changes), backend="eager", fullgraph=True)()
