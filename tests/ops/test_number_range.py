"""Numbers at the ends of their range: scores, soft caps, scales, sinks and LSEs, as float64 says or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import impls
from swath import KVQuant, PagedKV, attention, merge_states
from swath.testing import Case, Inputs
from swath.testing.budget import UNIT

Prepare = Callable[[Case], Inputs]

F32, B16, INT8, E4M3 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
LARGEST = torch.finfo(F32).max
ENDS = (-math.inf, -LARGEST, -3e38, -2e38, -1e30, -100.0, 0.0, 100.0, 1e30, 2e38, 3e38, LARGEST, math.inf)
SMALL = Case((40, 0, 21), (7, 3, 21), dtype=F32, size=18)
"""Rows that see some keys, and rows that see none."""


def check(inputs: Inputs, impl: str, **changes: Any) -> None:
    inputs.check(*inputs.run(impl, **changes))


@pytest.mark.parametrize(
    "score", [s * x for s in (1, -1) for x in (1e-30, 1e4, 1e6, 3e7, 1e20, 1e29, 2e30, 1e37, 2e38)]
)
@pytest.mark.parametrize("dtype", [F32, B16], ids=str)
@pytest.mark.parametrize("keys", [1, 80])
def test_scores_to_the_ends_of_float32(keys: int, dtype: torch.dtype, score: float, impl: str, device: str) -> None:
    """The value of the only key of the largest score, and that score; in 16 bits up to 6e7, as the semantics say."""
    if dtype == B16 and abs(score) > 6e7:
        pytest.skip("beyond what 16-bit queries may have")
    if impl == "hopper":
        pytest.skip("a few query tokens are the triton backend's")
    q = torch.ones(1, 1, 64, dtype=dtype, device=device)
    k = torch.full((keys, 1, 64), score / 64, device=device).to(dtype)
    k[1:] = k[1:] * 1.25 if score < 0 else k[1:] / 2
    largest = 64 * float(k[0, 0, 0].double())
    v = torch.randn(keys, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, keys))
    out, lse = attention(q, k, v, cu_q, cu_k, scale=1.0, return_lse=True, impl=impl)
    wanted = v[:1] if abs(score) > 1 else v.double().mean(0, keepdim=True)
    added = 0.0 if abs(score) > 1 else math.log(keys)
    torch.testing.assert_close(out.double(), wanted.double(), rtol=2 * UNIT[dtype], atol=8 * UNIT[dtype])
    assert float(lse) == pytest.approx(largest + added, rel=32 * UNIT[F32], abs=32 * UNIT[F32])


@pytest.mark.parametrize("sink", [*ENDS, math.nan], ids=str)
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, dtype=B16, q_lens=2), replace(SMALL, q_lens=2, split_size=64)],
                         ids=str)  # fmt: skip
def test_sinks_to_the_ends_of_float32(case: Case, sink: float, prepare: Prepare, impl: str) -> None:
    """A row that sees no key has its sink logit as its LSE, however small or large, exactly."""
    inputs = prepare(case)
    sinks = torch.tensor([sink, 0.5, sink, -0.5], device=inputs.q.device)
    inputs = replace(inputs, sink=sinks)
    out, lse = inputs.run(impl)
    truth = inputs.truth()
    empty = truth.keys[:, 0] == 0
    rows = lse.reshape(-1, 4)[truth.rows]
    assert empty.any()
    assert torch.equal(rows[empty].nan_to_num(nan=7.0), sinks.nan_to_num(nan=7.0).expand(int(empty.sum()), 4))
    if sink != sink:
        assert rows[:, ::2].isnan().all()
        assert out.reshape(-1, 4, 64)[truth.rows][~empty][:, ::2].isnan().all()
        assert out.reshape(-1, 4, 64)[:, 1::2].isfinite().all()
    else:
        inputs.check(out, lse, truth)


def merged(lse_a: float, lse_b: float) -> tuple[float, float, float]:
    """The weights of two states and the LSE of their union."""
    if math.isnan(lse_a) or math.isnan(lse_b):
        return math.nan, math.nan, math.nan
    top = max(lse_a, lse_b)
    weights = [0.0 if x == -math.inf else 1.0 if x == top else math.exp(x - top) for x in (lse_a, lse_b)]
    total = sum(weights)
    lse = top + math.log(total) if total else -math.inf
    return weights[0] / (total or 1.0), weights[1] / (total or 1.0), lse


@pytest.mark.parametrize("impl", impls("merge"), indirect=True)
def test_lses_to_the_ends_of_float32(impl: str, device: str) -> None:
    """Every two of them, NaN too: +inf takes all, -inf nothing, two of a kind the mean."""
    ends = [*ENDS, 100.5, math.nan]
    pairs = [(a, b) for a in ends for b in ends]
    lse_a, lse_b = (torch.tensor(x, dtype=F32, device=device) for x in zip(*pairs, strict=True))
    out_a, out_b = (torch.full((len(pairs), 1, 64), x, device=device) for x in (1.0, -3.0))
    out, lse = merge_states(out_a, lse_a[:, None], out_b, lse_b[:, None], impl=impl)
    for i, (a, b) in enumerate(zip(lse_a.tolist(), lse_b.tolist(), strict=True)):
        w_a, w_b, wanted = merged(a, b)
        assert float(lse[i, 0]) == pytest.approx(wanted, rel=4 * UNIT[F32], nan_ok=True), (a, b)
        assert float(out[i, 0, 5]) == pytest.approx(w_a - 3 * w_b, rel=32 * UNIT[F32], nan_ok=True), (a, b)


CAPS = (1e-30, 1e-6, 0.01, 1.0, 50.0, 1e3, 1e5, 1e8, 1e30, math.inf)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("quant", [None, KVQuant(INT8, "token"), KVQuant(E4M3, "head")], ids=str)
def test_soft_caps_of_any_size(softcap: float, quant: KVQuant | None, prepare: Prepare, impl: str) -> None:
    """The error of a capped score is one of the score, not of the cap."""
    for q_lens in (2, (7, 3, 21)):
        for dtype in (F32, B16):
            case = replace(SMALL, q_lens=q_lens, quant=quant, dtype=dtype, softcap=softcap, spiked=True)
            inputs = prepare(case)
            out, lse = inputs.run(impl)
            capped = case if softcap < math.inf else replace(case, softcap=0.0)
            replace(inputs, case=capped).check(out, lse)


@pytest.mark.parametrize("scale", [0.0, *(s * x for s in (1, -1) for x in (1e-30, 1e-3, 10.0, 1e30))])
@pytest.mark.parametrize("quant", [None, KVQuant(INT8, "channel"), KVQuant(INT8, "token")], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 1e30, 1e-3])
def test_scales_of_any_size(softcap: float, quant: KVQuant | None, scale: float, prepare: Prepare, impl: str) -> None:
    for q_lens in (2, (7, 3, 21)):
        case = replace(SMALL, q_lens=q_lens, scale=scale, softcap=softcap, quant=quant)
        if softcap and scale and not 1e-37 < abs(scale) / softcap < 1e38:
            with pytest.raises(
                ValueError, match=r"^softcap: wanted scale / softcap from 1e-37 to 1e\+38 in size, got "
            ):
                prepare(case)
        else:
            check(prepare(case), impl)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e38, -1e300, 1e-38, 1e-300])
def test_other_factors_are_refused_with_the_limits(value: float, prepare: Prepare, impl: str) -> None:
    inputs = prepare(SMALL)
    with pytest.raises(ValueError, match=r"^scale: wanted 0, None, or a float from 1e-37 to 1e\+38 in size, got "):
        inputs.run(impl, scale=value)
    if value != math.inf:
        with pytest.raises(ValueError, match=r"^softcap: wanted 0, inf, or a float from 1e-37 to 1e\+38, got "):
            inputs.run(impl, softcap=value)


def rescaled(inputs: Inputs, k_factor: float, v_factor: float) -> Inputs:
    """Every other head's scales times a factor; every other token's, but all under 16-bit queries: V's token scales in
    a tile may there be only so far apart."""
    step = 1 if inputs.q.dtype == B16 else 2
    scales = []
    for scale, factor in ((inputs.cache.k_scale, k_factor), (inputs.cache.v_scale, v_factor)):
        changed = scale.clone()
        part = changed if changed.dim() == 0 else changed[..., ::step] if changed.dim() == 3 else changed[::2]
        part.copy_((part.double() * factor).clamp(-LARGEST, LARGEST))
        scales.append(changed)
    return replace(inputs, keys=PagedKV(inputs.cache.k, inputs.cache.v, k_scale=scales[0], v_scale=scales[1]))


@pytest.mark.parametrize("factors", [(0.0, 0.0), (-1.0, -1.0), (1e-30, 1e30), (1e-36, 1e-32), (100.0, 1e36)], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "token"])
@pytest.mark.parametrize("dtype", [F32, B16], ids=str)
def test_cache_scales_of_any_size(
    dtype: torch.dtype, granularity: str, factors: tuple[float, float], prepare: Prepare, impl: str
) -> None:
    for q_lens in (2, (7, 3, 21)):
        inputs = prepare(replace(SMALL, q_lens=q_lens, dtype=dtype, quant=KVQuant(INT8, granularity)))
        check(rescaled(inputs, *factors), impl)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e-30, 20.0])
@pytest.mark.parametrize("kind", ["tensor", "token"])
def test_query_scales_of_any_size(kind: str, factor: float, prepare: Prepare, impl: str) -> None:
    inputs = prepare(replace(SMALL, q_lens=2, dtype=E4M3, quant=KVQuant(INT8, "token"), q_scale=kind))
    check(replace(inputs, q_scale=inputs.q_scale * factor), impl)


@pytest.mark.parametrize("bad", ["q", "q_scale", "k_scale"])
@pytest.mark.parametrize("case", [
    SMALL, replace(SMALL, dtype=B16), replace(SMALL, softcap=5.0), replace(SMALL, q_lens=2, dtype=B16),
    replace(SMALL, quant=KVQuant(INT8, "token")), replace(SMALL, quant=KVQuant(INT8, "head"), dtype=B16),
    replace(SMALL, q_lens=2, quant=KVQuant(INT8, "head"), dtype=B16, softcap=5.0),
    replace(SMALL, q_lens=2, quant=KVQuant(INT8, "head"), compute="int8"),
    replace(SMALL, q_lens=2, quant=KVQuant(E4M3, "token"), dtype=E4M3, q_scale="token"),
], ids=str)  # fmt: skip
def test_rows_of_nan_are_nan(case: Case, bad: str, prepare: Prepare, impl: str) -> None:
    """Where they see a key; the others keep their bits."""
    inputs = prepare(case)
    target = inputs.q if bad == "q" else inputs.q_scale if bad == "q_scale" else inputs.cache.k_scale
    if target is None:
        pytest.skip(f"the case has no {bad}")
    clean, clean_lse = inputs.run(impl)
    heads = slice(0, 2)
    if bad == "k_scale":
        target[(slice(None), slice(0, 1)) if target.dim() == 3 else slice(0, 1)] = torch.nan
    elif bad == "q":
        target[..., heads, 3] = torch.nan
    else:
        target[..., heads] = torch.nan
    out, lse = inputs.run(impl)
    seen = inputs.truth().keys[:, 0] > 0
    rows = [x.reshape(-1, *x.shape[inputs.q.dim() - 2 :])[inputs.truth().rows] for x in (out, lse, clean, clean_lse)]
    assert rows[0][seen][:, heads].isnan().all()
    assert rows[1][seen][:, heads].isnan().all()
    assert torch.equal(rows[0][:, 2:], rows[2][:, 2:])
    assert torch.equal(rows[1][:, 2:], rows[3][:, 2:])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [F32, B16], ids=str)
@pytest.mark.parametrize("q_lens", [2, (7, 3, 21)], ids=str)
def test_infinite_scores(q_lens: Any, dtype: torch.dtype, sign: float, prepare: Prepare, impl: str) -> None:
    """+inf: the row is NaN and its LSE +inf. -inf: as if the row did not see the key."""
    inputs = prepare(replace(SMALL, q_lens=q_lens, dtype=dtype, size=None))
    inputs.q[..., 0] = 1.0
    page = int(inputs.block_table[0, 0])
    clean, clean_lse = inputs.run(impl, window=None)
    inputs.cache.k[page, :, 3, 0] = sign * torch.inf
    out, lse = inputs.run(impl)
    want, want_lse = inputs.run("reference")
    first: Any = 0 if q_lens == 2 else slice(0, 7)
    others: Any = slice(1, None) if q_lens == 2 else slice(7, None)
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse[others], clean_lse[others])
    if sign > 0:
        assert out[first].isnan().all()
        assert want[first].isnan().all()
        assert (lse[first] == torch.inf).all()
        assert (want_lse[first] == torch.inf).all()
    else:
        rounding = 16 * UNIT[dtype]
        torch.testing.assert_close(out[first], want[first], rtol=rounding, atol=rounding)
        torch.testing.assert_close(lse[first], want_lse[first], rtol=64 * UNIT[F32], atol=64 * UNIT[F32])
