"""KVQuant and the folding table: stored x scale, rounding, granularity by rank, folds that equal dequantisation."""

from __future__ import annotations

import pytest
import torch

from swath import KVQuant, PagedKV
from swath.quant import (
    GRANULARITIES,
    LARGEST,
    calibrate,
    dequantise,
    fold_out,
    fold_p,
    fold_q,
    fold_scores,
    quantise,
    spread,
    token_scale,
)

HEADS, TOKENS, DIM = 3, 10, 8


def scale_of(granularity: str, seed: int = 0) -> torch.Tensor:
    """Gathered for N tokens where it is a token scale."""
    shape = {"tensor": (), "head": (HEADS,), "channel": (HEADS, DIM), "token": (HEADS, TOKENS)}[granularity]
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def test_int8_rounds_half_to_even_and_stays_symmetric() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -128.0, -1e9])
    assert quantise(x, None, torch.int8).tolist() == [0, 2, 2, 0, -2, -2, 126, 127, 127, -127, -127]


@pytest.mark.parametrize("dtype", LARGEST)
def test_values_saturate_at_the_largest(dtype: torch.dtype) -> None:
    stored = quantise(torch.tensor([1e9, -1e9, 0.0]), torch.tensor(2.0), dtype)
    assert stored.float().tolist() == [LARGEST[dtype], -LARGEST[dtype], 0]


@pytest.mark.parametrize("dtype", LARGEST)
def test_token_scale_uses_the_whole_range(dtype: torch.dtype) -> None:
    x = torch.randn(5, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    x[2, 1] = 0
    scale = token_scale(x, dtype)
    assert scale.dtype == torch.float32
    assert scale[2, 1] == 1
    largest = quantise(x, scale[..., None], dtype).float().abs().amax(-1)
    assert largest[2, 1] == 0
    largest[2, 1] = LARGEST[dtype]
    assert (largest == LARGEST[dtype]).all()


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("dtype", LARGEST)
def test_calibrated_values_come_back(dtype: torch.dtype, granularity: str) -> None:
    x = (
        torch.randn(TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1.0, 10, 100])[:, None]
    )
    scale = calibrate(x, dtype, granularity)
    unit = spread(granularity, scale)
    rows = x.transpose(0, 1)
    error = (dequantise(quantise(rows, unit, dtype), unit) - rows).abs()
    half_step = {torch.int8: 0.5, torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17}[dtype] * unit
    relative = {torch.int8: 0.0, torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}[dtype]
    assert (error <= (half_step + relative * rows.abs()) * (1 + 1e-5)).all()


def test_calibrate_has_no_token_scale() -> None:
    with pytest.raises(ValueError, match=r"^granularity: wanted"):
        calibrate(torch.ones(2, 2, 2), torch.int8, "token")


@pytest.mark.parametrize("k_granularity", GRANULARITIES)
@pytest.mark.parametrize("v_granularity", GRANULARITIES)
def test_folded_scales_equal_dequantised_keys(k_granularity: str, v_granularity: str) -> None:
    """q' . k_int with the folds equals attention over dequantised k and v."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(HEADS, n, DIM, generator=generator, dtype=torch.float64) for n in (4, TOKENS, TOKENS))
    k_scale, v_scale = scale_of(k_granularity), scale_of(v_granularity, 1)
    s = fold_scores(fold_q(q, k_granularity, k_scale) @ k.mT, k_granularity, k_scale)
    wanted_s = q @ (k * spread(k_granularity, k_scale)).mT
    torch.testing.assert_close(s, wanted_s)
    p = wanted_s.softmax(-1)
    out = fold_out(fold_p(p, v_granularity, v_scale) @ v, v_granularity, v_scale)
    torch.testing.assert_close(out, p @ (v * spread(v_granularity, v_scale)))


def test_no_scale_folds_nothing() -> None:
    x = torch.ones(1, 2, 3)
    for fold in (fold_q, fold_scores, fold_p, fold_out):
        assert fold(x, "none", None) is x


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_granularity_is_the_rank_of_the_scale(num_kv_heads: int) -> None:
    shapes = {"tensor": (), "head": (num_kv_heads,), "channel": (num_kv_heads, 8), "token": (1, num_kv_heads, 16)}
    k, v = (torch.zeros(1, num_kv_heads, 16, 8, dtype=torch.int8) for _ in range(2))
    for name, shape in shapes.items():
        assert PagedKV(k, v, k_scale=torch.ones(shape), v_scale=torch.ones(())).quant == KVQuant(
            torch.int8, name, "tensor"
        )


@pytest.mark.parametrize(
    ("dtype", "k", "v"),
    [
        (torch.int8, "none", None),
        (torch.int8, "token", "none"),
        (torch.bfloat16, "tensor", None),
        (torch.float32, "none", "head"),
        (torch.int8, "page", None),
        (torch.float8_e5m2, "token", "page"),
    ],
)
def test_granularities_that_cannot_be(dtype: torch.dtype, k: str, v: str | None) -> None:
    with pytest.raises(ValueError, match=r"^[kv]: wanted one of"):
        KVQuant(dtype, k, v)


@pytest.mark.parametrize("dtype", [torch.int16, "int8", None, []])
def test_a_dtype_that_stores_nothing(dtype: object) -> None:
    with pytest.raises(TypeError, match=r"^dtype: wanted"):
        KVQuant(dtype)


def test_int8_has_token_scales_unless_told_otherwise() -> None:
    assert KVQuant(torch.int8) == KVQuant(torch.int8, "token", "token")
    assert KVQuant(torch.int8, v="head") == KVQuant(torch.int8, "token", "head")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
        assert KVQuant(dtype) == KVQuant(dtype, "none", "none")


def test_bytes_per_token_is_what_a_cache_takes() -> None:
    for quant in (KVQuant(torch.bfloat16), KVQuant(torch.int8, "token"), KVQuant(torch.float8_e4m3fn, "token", "none")):
        cache = PagedKV.empty(quant, 4, 2, 16, 64)
        assert cache.nbytes == 4 * 16 * quant.bytes_per_token(2, 64)
        narrow = PagedKV(cache.k, cache.v[..., :40].contiguous(), cache.k_scale, cache.v_scale)
        assert narrow.nbytes == 4 * 16 * quant.bytes_per_token(2, 64, 40)


def test_the_worked_example() -> None:
    x = torch.tensor([[0.5, -2.54, 1.0]])
    scale = token_scale(x, torch.int8)
    torch.testing.assert_close(scale, torch.tensor([0.02]))
    assert quantise(x, scale[..., None], torch.int8).tolist() == [[25, -127, 50]]


def test_calibration_leaves_out_what_is_not_finite() -> None:
    x = torch.tensor([[1.0, -2.0, torch.nan, torch.inf, -torch.inf, 0.0]]).expand(4, 1, 6)
    assert float(calibrate(x, torch.int8, "tensor")) == pytest.approx(2 / 127)
    assert calibrate(x, torch.int8, "channel")[0].tolist() == pytest.approx([1 / 127, 2 / 127, 1, 1, 1, 1])
