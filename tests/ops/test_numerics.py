"""Scores, softmax and scales: each scale is applied once and to its own head, and every row stays finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import Prepare, check
from swath import KVQuant, PagedKV, attention, paged_attention
from swath.testing import Case, Inputs

INT8_HEAD, INT8_CHANNEL, INT8_TOKEN = (KVQuant(torch.int8, g) for g in ("head", "channel", "token"))
INT8_QUANTS = [KVQuant(torch.int8, "tensor"), INT8_HEAD, INT8_CHANNEL, INT8_TOKEN]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 50.0, -50.0])
def test_the_output_is_finite_at_any_score_scale(scale: float, prepare: Prepare, impl: str) -> None:
    """Scores of thousands of either sign, all equal, or none at all."""
    inputs = prepare(Case((70, 0, 33), (20, 2, 40), scale=scale, dtype=torch.float32))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    assert out.isfinite().all()


def test_a_sink_of_minus_infinity_is_no_sink(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((70, 0, 33), size=20))
    sink = torch.full((4,), -torch.inf, device=inputs.q.device)
    check(replace(inputs, sink=sink), impl)


def test_every_query_shape_has_the_natural_lse(prepare: Prepare, impl: str) -> None:
    """Decode, n-step, ragged, split and dense give the same row and natural-log LSE at a scale that is not D^-0.5."""
    keys = Case((90,), scale=0.3, sink="fp32")
    for case in (keys, replace(keys, q_lens=5), replace(keys, q_lens=(90,)), replace(keys, split_size=64),
                 replace(keys, q_lens=(90,), dense=True)):  # fmt: skip
        check(prepare(case), impl)


def test_the_default_scale_of_dense_and_paged_is_the_same(prepare: Prepare, impl: str) -> None:
    """The default of both is D^-0.5."""
    dense, paged = (prepare(Case((40,), (40,), dense=d, dtype=torch.float32)) for d in (True, False))
    for inputs, public in ((dense, attention), (paged, paged_attention)):
        options = {name: value for name, value in inputs.options.items() if name != "scale"}
        inputs.check(public(*inputs.args, **options, impl=impl), None)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("quant", [None, INT8_CHANNEL, INT8_TOKEN], ids=str)
def test_the_score_scale_is_applied_once(factor: float, quant: KVQuant | None, prepare: Prepare, impl: str) -> None:
    for q_lens in (1, 3, (40, 1)):
        check(prepare(Case((70, 33), q_lens, scale=factor / 8, quant=quant)), impl)


def rescaled(inputs: Inputs, k_factor: Tensor | float, v_factor: Tensor | float) -> Inputs:
    """The same stored numbers with other scales."""
    c = inputs.cache
    return replace(inputs, keys=PagedKV(c.k, c.v, k_scale=c.k_scale * k_factor, v_scale=c.v_scale * v_factor))


@pytest.mark.parametrize("quant", INT8_QUANTS, ids=str)
@pytest.mark.parametrize("q_lens", [1, 3, (48, 17, 1)], ids=str)
def test_cache_scales_are_applied_once_in_partial_pages(
    q_lens: int | tuple[int, ...], quant: KVQuant, prepare: Prepare, impl: str
) -> None:
    """kv_len % page in {0, 1, page - 1}; scales far from 1."""
    inputs = prepare(Case((48, 17, 31), q_lens, quant=quant, dtype=torch.float32))
    check(rescaled(inputs, 0.02, 500.0), impl)


@pytest.mark.parametrize("gqa", ["grouped", "interleaved"])
@pytest.mark.parametrize("quant", [INT8_HEAD, INT8_CHANNEL, INT8_TOKEN], ids=str)
@pytest.mark.parametrize("q_lens", [1, (30, 1, 20)], ids=str)
def test_cache_scales_are_indexed_by_kv_head(
    q_lens: int | tuple[int, ...], quant: KVQuant, gqa: str, prepare: Prepare, impl: str
) -> None:
    """Heads ten times apart."""
    inputs = prepare(Case(q_lens=q_lens, quant=quant, gqa=gqa, num_kv_heads=3))
    tenfold = torch.tensor([0.01, 0.1, 1.0], device=inputs.q.device)
    shaped = {1: tenfold, 2: tenfold[:, None], 3: tenfold[:, None]}[inputs.cache.k_scale.dim()]
    check(rescaled(inputs, shaped.flip(0), shaped), impl)


def test_cache_scales_have_their_documented_shapes_only() -> None:
    stored = torch.zeros(4, 2, 16, 64, dtype=torch.int8)
    documented = {(), (2,), (2, 64), (4, 2, 16)}
    for shape in [*documented, (1,), (64,), (4,), (64, 2), (1, 2), (2, 1), (4, 16, 2), (4, 2, 16, 1), (4, 2, 16, 64)]:
        if shape in documented:
            PagedKV(stored, stored, k_scale=torch.ones(shape), v_scale=torch.ones(()))
        else:
            with pytest.raises(ValueError, match=r"^k_scale: wanted one of the shapes"):
                PagedKV(stored, stored, k_scale=torch.ones(shape), v_scale=torch.ones(()))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", [*INT8_QUANTS, KVQuant(torch.float8_e4m3fn, "token", "channel")], ids=str)
def test_cache_scales_are_bf16_or_fp32(quant: KVQuant, scale_dtype: torch.dtype, prepare: Prepare, impl: str) -> None:
    for q_lens in (1, (60, 1, 2)):
        check(prepare(Case(q_lens=q_lens, quant=quant, scale_dtype=scale_dtype)), impl)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_scale_of_fp8_queries_counts(scale: float, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(dtype=torch.float8_e4m3fn, quant=KVQuant(torch.float8_e4m3fn)))
    unit = torch.tensor(scale, device=inputs.q.device)
    check(replace(inputs, q_scale=unit), impl)
    assert torch.equal(inputs.run(impl, q_scale=unit)[0], inputs.run(impl)[0]) == (scale == 1)


@pytest.mark.parametrize("q_lens", [1, 3, (40, 1, 2)], ids=str)
def test_int8_products_of_tied_keys_and_of_zeros(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=q_lens, quant=INT8_HEAD, compute="int8"))
    check(inputs, impl)
    inputs.cache.k.fill_(64)  # every key ties with every other
    check(inputs, impl)
    inputs.q[0] = 0
    inputs.cache.k.fill_(0)
    check(inputs, impl)


def test_compute_selects_the_products(prepare: Prepare, impl: str) -> None:
    """int8 products round as int8 products do; the reference always computes in float."""
    inputs = prepare(Case(q_lens=(60, 3, 1), quant=INT8_CHANNEL, compute="int8"))
    coarse, lse = inputs.run(impl)
    inputs.check(coarse, lse)
    fine, _ = inputs.run(impl, compute="float")
    replace(inputs, case=replace(inputs.case, compute="float")).check(fine, None)
    assert torch.equal(coarse, fine) == (impl == "reference")
