"""Which backend runs a call, and what explain and warmup say and do about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import swath
from conftest import OPS, impls
from swath import KVQuant, dispatch, explain, warmup
from swath.testing import Case, make


def backend(reason: str | None, log: list[str], name: str) -> SimpleNamespace:
    return SimpleNamespace(
        why_not=lambda case: reason,
        run=lambda case: log.append(f"run {name}"),
        plan=lambda case: f"plan of {name}",
        warm=lambda case: log.append(f"warm {name}"),
    )


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three backends, of which the fastest cannot run anything."""
    log: list[str] = []
    reasons = {"fast": "no such hardware", "middle": None, "slow": None}
    found = {name: backend(reason, log, name) for name, reason in reasons.items()}
    monkeypatch.setattr(dispatch, "backends", lambda op: found)
    return log


def test_auto_takes_the_first_that_can(log: list[str]) -> None:
    make(Case()).run("auto")
    assert log == ["run middle"]


def test_a_named_backend_runs_or_says_why_not(log: list[str]) -> None:
    inputs = make(Case())
    inputs.run("slow")
    assert log == ["run slow"]
    with pytest.raises(ValueError, match=r"^impl: .* 'fast' cannot, got no such hardware"):
        inputs.run("fast")
    with pytest.raises(ValueError, match=r"^impl: wanted 'auto' or one of 'fast', 'middle', 'slow', got 'quick'"):
        inputs.run("quick")
    assert log == ["run slow"]


def test_nobody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "backends", lambda op: {"fast": backend("too cold", [], "fast")})
    with pytest.raises(ValueError, match=r"^impl: .*'fast': 'too cold'"):
        make(Case()).run("auto")
    assert explain("paged_attention", *make(Case()).args).backend is None


def test_explain_runs_nothing(log: list[str]) -> None:
    explained = explain(swath.paged_attention, *make(Case()).args)
    assert (explained.op, explained.backend, explained.launch) == ("paged_attention", "middle", "plan of middle")
    assert explained.reasons == {"fast": "no such hardware", "middle": None, "slow": None}
    assert "fast       no such hardware" in str(explained)
    assert explain("paged_attention", *make(Case()).args, impl="slow").backend == "slow"
    cannot = explain("paged_attention", *make(Case()).args, impl="fast")
    assert cannot.backend is None
    assert str(cannot).startswith("paged_attention: fast cannot run this call\n")
    with pytest.raises(ValueError, match=r"^impl: wanted 'auto' or one of 'fast', 'middle', 'slow', got 'other'"):
        explain("paged_attention", *make(Case()).args, impl="other")
    assert log == []


def test_warmup_compiles_what_would_run(log: list[str]) -> None:
    warmup("paged_attention", *make(Case()).args)
    warmup(swath.attention, *make(Case(q_lens=(3, 4, 5), dense=True)).args, impl="slow")
    assert log == ["warm middle", "warm slow"]


def arguments() -> dict[str, tuple[Any, ...]]:
    inputs = make(Case(quant=KVQuant(torch.int8, "token")))
    new, (out, lse) = torch.zeros(3, 2, 64), inputs.run("reference")
    return {
        "paged_attention": inputs.args,
        "attention": make(Case(q_lens=(3, 4, 5), dense=True)).args,
        "append_kv": (inputs.cache, new, new, torch.arange(3)),
        "quantise_q": (new,),
        "merge_states": (out, lse, out, lse),
    }


@pytest.mark.parametrize("op", arguments())
def test_every_operator_can_be_explained_and_warmed(op: str) -> None:
    args = arguments()[op]
    explained = explain(op, *args)
    assert explained.backend is not None
    assert explained.launch
    warmup(op, *args)


@pytest.mark.parametrize("op", ["slots", "flash", swath.check])
def test_what_has_no_backends_has_no_explanation(op: Any) -> None:
    with pytest.raises(ValueError, match=r"^op: wanted one of 'attention'"):
        explain(op)


def test_every_op_has_the_reference_last() -> None:
    for op in OPS:
        assert list(dispatch.backends(op))[-1] == "reference"
        assert [*dispatch.backends(op)] == [*reversed(impls(op))]
