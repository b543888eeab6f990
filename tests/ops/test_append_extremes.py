"""append_kv where numbers end: rows too small for a scale, NaN and infinite rows, static scales of 0 and beyond."""

from __future__ import annotations

import pytest
import torch
from test_append import LARGEST, append, assert_same_bytes
from torch import Tensor

from conftest import impls
from swath import KVQuant, PagedKV, paged_attention

pytestmark = pytest.mark.parametrize("impl", impls("append"), indirect=True)

F32, INT8, E4M3, E5M2 = torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
TINY = 2.0**-126
"""The smallest normal float32."""
NAN_BYTE = {INT8: 0, E4M3: 0x7F, E5M2: 0x7F}
QUANTISED = pytest.mark.parametrize("dtype", LARGEST, ids=str)


def appended(rows: Tensor, dtype: torch.dtype, impl: str, scale: Tensor | None = None) -> PagedKV:
    """A cache of one page and one head that holds these rows, as K and as V."""
    granularity = "token" if scale is None else {0: "tensor", 2: "channel"}[scale.dim()]
    num_rows, dim = rows.shape
    quant = KVQuant(dtype, granularity)
    cache = PagedKV.empty(quant, 1, 1, 16, dim, k_scale=scale, v_scale=scale, device=rows.device)
    for pool in (cache.k, cache.v):
        pool.view(torch.int8).zero_()
    append(cache, rows[:, None], rows[:, None], torch.arange(num_rows, device=rows.device), impl)
    assert_same_bytes(cache.v, cache.k)
    return cache


def read(cache: PagedKV, num_rows: int) -> Tensor:
    """The rows as they read, float64."""
    stored, scale = cache.k[0, 0, :num_rows].double(), cache.k_scale.double()
    return stored * (scale[0, 0, :num_rows, None] if scale.dim() == 3 else scale)


@pytest.mark.parametrize("size", [1e-45, 2e-43, 1e-41, 1e-38, 3e-38, 5e-37, 1e-35])
@QUANTISED
def test_rows_of_any_size_read_as_they_are(dtype: torch.dtype, size: float, impl: str, device: str) -> None:
    """To within a step of the stored type, or of the smallest normal number: never NaN, never farther than 0 is."""
    row = torch.linspace(-size, size, 64, dtype=torch.float64).float().to(device)[None]
    cache = appended(row, dtype, impl)
    scale = float(cache.k_scale[0, 0, 0])
    assert scale >= TINY
    assert scale == max(torch.tensor(float(row.max()) / LARGEST[dtype]).float().item(), TINY)
    error = (read(cache, 1) - row.double()).abs()
    step = {INT8: 0.5, E4M3: 2.0**-4, E5M2: 2.0**-3}[dtype]
    allowed = step * scale * (1 if dtype == INT8 else (row.double().abs() / scale).clamp(min=1.0))
    assert (error <= allowed * (1 + 1e-6)).all()
    assert (error <= row.double().abs().max()).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=["nan", "-nan", "inf", "-inf"])
@QUANTISED
def test_a_token_that_is_not_finite_reads_nan(dtype: torch.dtype, bad: float, impl: str, device: str) -> None:
    """All of its row: one scale serves it. The rows beside it are as without it."""
    rows = torch.linspace(-3, 5, 3 * 64).view(3, 64).to(device)
    clean = appended(rows, dtype, impl)
    rows[1, 7] = bad
    cache = appended(rows, dtype, impl)
    assert cache.k_scale[0, 0, 1].isnan()
    assert (cache.k[0, 0, 1].view(torch.uint8) == NAN_BYTE[dtype]).all()
    assert read(cache, 3)[1].isnan().all()
    for got, want in ((cache.k, clean.k), (cache.k_scale, clean.k_scale)):
        assert_same_bytes(got[0, 0, [0, 2]], want[0, 0, [0, 2]])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@QUANTISED
def test_numbers_that_are_not_finite_under_a_static_scale(
    dtype: torch.dtype, granularity: str, impl: str, device: str
) -> None:
    """Infinities are saturated; a NaN stays in fp8, and is 0 in int8, which has none."""
    scale = torch.tensor(0.5, device=device) if granularity == "tensor" else torch.full((1, 64), 0.5, device=device)
    row = torch.zeros(1, 64, device=device)
    row[0, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 3.0])
    stored = appended(row, dtype, impl, scale).k[0, 0, 0]
    largest = LARGEST[dtype]
    assert stored[:2].float().tolist() == [largest, -largest]
    assert stored[2:4].view(torch.uint8).tolist() == [NAN_BYTE[dtype]] * 2
    assert stored[4:].float().tolist() == [6.0] + [0.0] * 59


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-38, 3e38])
@QUANTISED
def test_static_scales_of_any_size(dtype: torch.dtype, scale: float, impl: str, device: str) -> None:
    """0 reads 0 and stores nothing that is not a number; a negative one is a sign."""
    row = torch.linspace(-1, 1, 64, device=device)[None]
    cache = appended(row, dtype, impl, torch.tensor(scale, device=device))
    largest = LARGEST[dtype]
    unit = row.double() / (torch.tensor(scale).double() if scale else 1.0)
    unit = unit.float().clamp(-largest, largest)
    assert_same_bytes(cache.k[0, 0, :1], (unit.round() if dtype == INT8 else unit).to(dtype))
    assert read(cache, 1).isfinite().all()


@QUANTISED
def test_attention_reads_what_was_appended(dtype: torch.dtype, impl: str, device: str) -> None:
    """Rows so small that a scale of theirs would be 0, then a NaN row: it comes out where it is seen."""
    rows = torch.full((3, 64), 2e-43, device=device)
    rows[2] = torch.nan
    cache = appended(rows, dtype, impl)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    q = torch.ones(1, 1, 64, device=device)
    for length, finite in ((2, True), (3, False)):
        out, lse = paged_attention(q, cache, table, torch.tensor([length], device=device).int(), return_lse=True)
        assert bool(out.isfinite().all()) is bool(lse.isfinite().all()) is finite
        assert not finite or out.abs().max() <= 2e-43
