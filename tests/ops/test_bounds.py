"""Bounds of query rows: every backend sees the keys ``[lo, hi)`` of each row, and nothing else decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import PORTABLE, Capture, Prepare, check, each_backend
from swath import KVQuant, Window, attention, paged_attention
from swath.ops import paged
from swath.testing import Case, make
from swath.testing.ranges import RULES

INT8_TOKEN, INT8_CHANNEL, E4M3 = KVQuant(torch.int8, "token"), KVQuant(torch.int8, "channel"), torch.float8_e4m3fn

QUERIES: dict[str, dict[str, Any]] = {
    "decode": {},
    "steps": {"q_lens": 3},
    "many steps": {"q_lens": 20},
    "ragged": {"q_lens": (5, 33, 60)},
    "mixed": {"q_lens": (1, 0, 70), "tail": 3},
    "dense": {"q_lens": (5, 33, 60), "dense": True},
}
LEADING: list[dict[str, Any]] = [{}, {"global_tokens": 4, "sink": "fp32"}, {"global_tokens": (0, 3, 40)}]


def with_turns(name: str, queries: str) -> Case:
    """A case of a rule and a kind of queries, with leading tokens, sinks and host bounds by turns."""
    turn = [*RULES].index(name) + [*QUERIES].index(queries)
    bounds = ("none", "tight", "loose")[turn // 3 % 3]
    return Case(ranges=name, bounds=bounds, num_kv_heads=1, spiked=True, **QUERIES[queries], **LEADING[turn % 3])


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("name", RULES)
def test_each_rule(name: str, queries: str, prepare: Prepare, impl: str) -> None:
    """Spiked keys stand at both ends of every range; slots that no row may see hold NaN, also between the ranges."""
    inputs = prepare(with_turns(name, queries))
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


STORED: list[dict[str, Any]] = [
    {"quant": INT8_TOKEN, "q_lens": 4},
    {"quant": INT8_TOKEN, "q_lens": (1, 40, 20), "head_dim": 80},
    {"quant": INT8_CHANNEL, "compute": "int8", "q_lens": 2},
    {"quant": KVQuant(E4M3, "token"), "dtype": E4M3, "q_scale": "token", "q_lens": 5, "global_tokens": 3},
    {"dtype": torch.float32, "softcap": 5.0, "q_lens": (2, 1, 30)},
    {"table": "rows", "unit": "token", "index_dtype": torch.int64, "q_lens": 3, "global_tokens": (0, 3, 40)},
    {"table": "flat", "strided": True, "holes": True, "gqa": "interleaved", "group": 3, "q_lens": (9, 3, 21)},
    {"q_start": (0, -2, 100), "kv_lens": (0, -2, 193), "q_lens": 3, "page_size": 8},
]


@pytest.mark.parametrize("name", ["apart", "random", "blocks in window"])
@pytest.mark.parametrize("fields", STORED, ids=lambda fields: str(Case(**fields)))
def test_beside_other_options(fields: dict[str, Any], name: str, prepare: Prepare, impl: str) -> None:
    check(prepare(Case(ranges=name, spiked=True, **fields)), impl)


@pytest.mark.parametrize("name", ["window", "apart"])
def test_a_prefill_that_copies_8_bit_pages_first(name: str, prepare: Prepare, impl: str) -> None:
    case = Case((330, 90), (129, 70), num_kv_heads=1, group=4, quant=INT8_TOKEN, global_tokens=2, ranges=name)
    check(prepare(replace(case, spiked=True)), impl)


def test_a_prefill_of_more_rows_than_are_looked_at_together(prepare: Prepare, impl: str) -> None:
    """The copied pages are those of all rows: the last ones see others than the first."""
    case = Case((1300,), (1100,), num_kv_heads=1, group=1, quant=INT8_CHANNEL, page_size=64, ranges="chunked")
    inputs = prepare(case)
    rows = torch.tensor([0, 700, 1099], device=inputs.q.device)
    out, lse = inputs.run(impl)
    inputs.check(out, lse, inputs.truth(rows))


@pytest.mark.parametrize(("q_lens", "name"), [(1, "random"), (4, "random"), ((1, 40, 5), "shard")], ids=str)
def test_split_size_frees_a_row_of_promises(
    q_lens: int | tuple[int, ...], name: str, prepare: Prepare, impl: str
) -> None:
    """Slices are enough for any range, and no bit depends on ``max_visible``."""
    shape = Case((70, 230, 129), q_lens, num_kv_heads=1, spiked=True)
    inputs = prepare(replace(shape, ranges=name, global_tokens=2, split_size=64))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    for promise in (1, 10_000):
        window = replace(inputs.options["window"], max_visible=promise)
        again, lse_again = inputs.run(impl, window=window)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("q_lens", [1, 4, (1, 40, 5)], ids=str)
def test_no_result_depends_on_a_false_promise(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((70, 330, 129), q_lens, ranges="random", spiked=True, quant=INT8_TOKEN, num_kv_heads=1))
    inputs.check(*inputs.run(impl, window=replace(inputs.options["window"], max_visible=3)))


@pytest.mark.parametrize("q_lens", [1, 3, (5, 33, 60)], ids=str)
def test_a_window_said_by_bounds_is_that_window(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    by_rule = prepare(Case(q_lens=q_lens, size=18, global_tokens=2, dtype=torch.float32))
    out, lse = by_rule.run(impl)
    bounds = prepare(replace(by_rule.case, size=None, ranges="window")).ranges
    window = Window(global_tokens=2, bounds=bounds)
    torch.testing.assert_close(by_rule.run(impl, window=window), (out, lse), rtol=2e-6, atol=2e-6)
    strided = torch.stack([bounds, bounds], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        by_rule.run(impl, window=replace(window, bounds=strided)), (out, lse), rtol=2e-6, atol=2e-6
    )


def test_other_bounds_are_a_call_of_the_same_signature(
    prepare: Prepare, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of what is remembered has the numbers or the address of the first ones in it."""
    case = Case(q_lens=3, ranges="all")
    inputs = prepare(case)
    known: dict[Any, Any] = {}
    monkeypatch.setattr(paged.STAGES.memory, "_known", known)
    for name in RULES:
        other = replace(case, ranges=name)
        call = replace(inputs, case=other, ranges=make(other, inputs.q.device).ranges)
        call.check(*call.run(impl))
    assert len(known) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("q_lens", [1, 3, (40, 3, 1)], ids=str)
@each_backend("attention", but=PORTABLE)
def test_graph_replay_with_other_bounds(
    q_lens: int | tuple[int, ...], prepare: Prepare, impl: str, captured: Capture
) -> None:
    case = Case((300, 200, 250), q_lens, dtype=torch.bfloat16)
    inputs = prepare(replace(case, ranges="all"))
    canary = inputs.canary()
    with captured(lambda: inputs.run(impl, out=canary.out)) as graph:
        for name in ("window", "all", "chunked", "random", "hostile", "apart"):
            inputs.ranges.copy_(make(replace(case, ranges=name), inputs.q.device).ranges)
            graph.replay()
            replace(inputs, case=replace(case, ranges=name)).check(canary.out, None)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", QUERIES)
@each_backend("attention", but=PORTABLE)
def test_no_call_with_bounds_synchronises(queries: str, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(ranges="random", **QUERIES[queries]))
    public, options = attention if inputs.case.dense else paged_attention, inputs.options
    public(*inputs.args, **options, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        public(*inputs.args, **options, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bad_window(change: Callable[[Tensor], dict[str, Any]]) -> Callable[[Tensor], Window]:
    return lambda bounds: Window(**{"bounds": bounds, **change(bounds)})


WRONG: dict[str, tuple[str, type[Exception], Callable[[Tensor], Window]]] = {
    "a size": ("size", ValueError, bad_window(lambda _: {"size": 4})),
    "not causal": ("causal", ValueError, bad_window(lambda _: {"causal": False})),
    "floats": ("bounds", TypeError, bad_window(lambda b: {"bounds": b.float()})),
    "a list": ("bounds", TypeError, bad_window(lambda b: {"bounds": b.tolist()})),
    "three numbers": ("bounds", ValueError, bad_window(lambda b: {"bounds": torch.cat([b, b[..., :1]], -1)})),
    "one dimension": ("bounds", ValueError, bad_window(lambda b: {"bounds": b.flatten()})),
    "other rows": ("window.bounds", ValueError, bad_window(lambda b: {"bounds": b[:-1]})),
    "other dimensions": ("window.bounds", ValueError, bad_window(lambda b: {"bounds": b.reshape(-1, 2)})),
    "elsewhere": ("window.bounds", ValueError, bad_window(lambda b: {"bounds": b.to("meta")})),
    "negative promise": ("max_visible", ValueError, bad_window(lambda _: {"max_visible": -1})),
    "promise without bounds": ("max_visible", ValueError, bad_window(lambda _: {"bounds": None, "max_visible": 4})),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_bounds_are_named(what: str) -> None:
    argument, error, window = WRONG[what]
    inputs = make(Case(q_lens=3, ranges="window"))
    with pytest.raises(error, match=rf"^{argument}: wanted"):
        inputs.run("reference", window=window(inputs.ranges))
