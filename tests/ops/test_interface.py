"""The public functions: every parameter counts, and what a call cannot do is an error before anything runs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from conftest import Prepare
from swath import Window, append_kv, attention, merge_states, paged_attention, slots
from swath.testing import Case, make


def test_no_public_function_takes_scratch() -> None:
    """Scratch comes from the caching allocator; no caller passes a workspace."""
    for function in (attention, paged_attention, append_kv, merge_states, slots):
        names = inspect.signature(function).parameters
        assert not [name for name in names if "scratch" in name or "workspace" in name or "buffer" in name]


@pytest.mark.parametrize(
    "change", [{"softcap": -1.0}, {"compute": "int8"}, {"split_size": 5}, {"impl": "cuda"}], ids=str
)
def test_an_unsupported_option_is_an_error_before_anything_runs(change: dict[str, Any]) -> None:
    inputs = make(Case())
    out = torch.full_like(inputs.q, 7.0)
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: wanted"):
        paged_attention(*inputs.args, **{**inputs.options, "out": out, **change})
    assert (out == 7).all()


ALTERED: dict[str, Any] = {
    "window": Window(3),
    "scale": 0.5,
    "softcap": 1.0,
    "gqa": "interleaved",
    "q_start": torch.tensor([10, 20, 30], dtype=torch.int32),
    "sink": torch.tensor([1.0, 2.0, 3.0, 4.0]),
}


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
def test_every_parameter_counts(name: str, dense: bool, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=(1, 2, 3), dense=dense))
    value = ALTERED[name]
    if isinstance(value, torch.Tensor):
        value = value.to(inputs.q.device)
    plain, _ = inputs.run(impl)
    altered, _ = inputs.run(impl, **{name: value})
    assert not torch.equal(plain, altered)
