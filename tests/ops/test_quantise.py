"""quantise_q: every byte of the queries and their scales, and that attention reads them as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import impls, skip_unless_able
from swath import KVQuant, explain, quantise_q
from swath.testing import Case, make

pytestmark = pytest.mark.parametrize("impl", impls("quantise"), indirect=True)

E4M3 = torch.float8_e4m3fn
LARGEST, TINY = np.float32(448.0), np.float32(2.0**-126)
STATIC = {"one a row": None, "static": 0.0173, "static, 0": 0.0, "static, negative": -0.5}


def quantised(q: Tensor, scale: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    skip_unless_able(impl, explain("quantise_q", q, scale, impl=impl).reasons[impl])
    return quantise_q(q, scale, impl=impl)


def queries(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Rows of many sizes: one of zeros, one beyond a static range, one too small for a scale of its own.

    That one in float32 alone: Triton's interpreter reads other bfloat16 below 2^-126 than stand there.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    rows = x.view(-1, shape[-1])
    if len(rows) > 3:
        rows[1], rows[2], rows[3] = 0, 3000 * rows[2], (1e-39 if dtype == torch.float32 else 1e-30) * rows[3]
    return x.to(dtype).to(device)


def expected(q: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row by row in numpy's float32; torch on a CPU rounds to e4m3 half to even, once no magnitude is beyond 448."""
    wide = q.float().cpu().numpy()
    if scale is None:
        largest = np.abs(wide).max(-1, initial=0)
        unit = np.where(largest > 0, np.maximum(largest / LARGEST, TINY), np.float32(1))
        over = unit[..., None]
    else:
        unit = over = scale.cpu().numpy()
    rows = np.clip(wide / np.where(over != 0, over, np.float32(1)), -LARGEST, LARGEST)
    return torch.from_numpy(rows).to(E4M3), torch.from_numpy(np.asarray(unit, dtype=np.float32))


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for came, wanted in zip(got, want, strict=True):
        assert (came.dtype, came.shape) == (wanted.dtype, wanted.shape)
        kind = torch.uint8 if came.dtype == E4M3 else torch.int32
        assert torch.equal(came.cpu().view(kind), wanted.view(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 4, 128), (2, 3, 5, 64), (3, 8, 80), (1, 1, 512), (0, 4, 64), (70, 3, 8)], ids=str
)
@pytest.mark.parametrize("static", STATIC)
def test_every_byte(static: str, shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: str) -> None:
    q = queries(shape, dtype, device)
    scale = None if STATIC[static] is None else torch.tensor(STATIC[static], device=device)
    out, q_scale = quantised(q, scale, impl)
    assert out.is_contiguous()
    assert scale is None or q_scale.data_ptr() != scale.data_ptr()
    assert_same((out, q_scale), expected(q, scale))


def test_ties_and_steps_of_every_size(impl: str, device: str) -> None:
    """Every number that fp8 has, the middle of every two, and the neighbours of that in float32."""
    have = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (have[1:] + have[:-1]) / 2
    middles = torch.cat([middles, middles.nextafter(middles - 1), middles.nextafter(middles + 1), have])
    q = torch.cat([middles, -middles, torch.zeros(-2 * len(middles) % 64)]).view(1, -1, 64).to(device)
    one = torch.ones((), device=device)
    assert_same(quantised(q, one, impl), expected(q, one))


def test_what_is_not_finite(impl: str, device: str) -> None:
    """NaN for all of a row that has a scale of its own; under a static one infinities are saturated."""
    q = torch.linspace(-3, 5, 6 * 64, device=device).view(1, 6, 64)
    clean = quantised(q, None, impl)
    for head, bad in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf), 1):
        q[0, head, 7] = bad
    out, q_scale = quantised(q, None, impl)
    assert q_scale[0, 1:5].isnan().all()
    assert (out[0, 1:5].view(torch.uint8) == 0x7F).all()
    for came, was in zip((out, q_scale), clean, strict=True):
        assert torch.equal(came[0, [0, 5]].view(torch.uint8), was[0, [0, 5]].view(torch.uint8))
    out, q_scale = quantised(q, torch.tensor(0.5, device=device), impl)
    assert out[0, 1:5, 7].view(torch.uint8).tolist() == [0x7F, 0x7F, 0x7E, 0xFE]
    assert bool((out[0, 1:5, :7].view(torch.uint8) != 0x7F).all())
    assert float(q_scale) == 0.5
    out, q_scale = quantised(q, torch.tensor(torch.nan, device=device), impl)
    assert q_scale.isnan()
    assert (out.view(torch.uint8) == 0x7F).all()


def test_rows_with_any_strides(impl: str, device: str) -> None:
    """A slice of a packed projection, and heads before tokens."""
    packed = queries((6, 10, 192), torch.bfloat16, device)
    for q in (packed[:, 2:8, 64:128], packed.transpose(0, 1)[..., :128], packed[:, :8].unflatten(0, (2, 3))[..., :64]):
        assert_same(quantised(q, None, impl), expected(q, None))


def test_the_worked_example(impl: str, device: str) -> None:
    q = torch.tensor([[[0.5, -1.75, 0.25, 0.0]]], device=device)
    out, q_scale = quantised(q, None, impl)
    assert float(q_scale) == 1.75 / 448
    assert out.float().tolist() == [[[128.0, -448.0, 64.0, 0.0]]]


@pytest.mark.parametrize("static", [False, True])
def test_attention_reads_them(static: bool, impl: str, device: str) -> None:
    """Within the budget of fp8 queries; the truth is of the numbers that the bytes stand for."""
    case = Case(
        dtype=E4M3, quant=KVQuant(E4M3, "head"), q_lens=3, q_scale="tensor" if static else "token", head_dim=128
    )
    inputs = make(case, device)
    q = inputs.q.float() * (inputs.q_scale if static else inputs.q_scale[..., None])
    out, q_scale = quantised(q, inputs.q_scale if static else None, impl)
    changed = type(inputs)(**{**vars(inputs), "q": out, "q_scale": q_scale})
    changed.check(*changed.run("cpu" if device == "cpu" else "auto"))
