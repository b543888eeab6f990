"""merge_states: the union of disjoint key sets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import impls, skip_unless_able, truncates_bf16
from swath import explain, merge_states
from swath.testing.budget import UNIT

pytestmark = pytest.mark.parametrize("impl", impls("merge"), indirect=True)

State = tuple[Tensor, Tensor]


def merge(a: State, b: State, impl: str) -> State:
    skip_unless_able(impl, explain("merge_states", *a, *b, impl=impl).reasons[impl])
    return merge_states(*a, *b, impl=impl)


def state(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, lse_scale: float = 3.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator).to(dtype)
    return out.to(device), (lse_scale * torch.randn(shape[:-1], generator=generator)).to(device)


def exact(a: State, b: State) -> State:
    (out_a, lse_a), (out_b, lse_b) = ([x.double() for x in s] for s in (a, b))
    lse = torch.logaddexp(lse_a, lse_b)
    return sum(out * torch.exp(part - lse)[..., None] for out, part in ((out_a, lse_a), (out_b, lse_b))), lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7, 4, 64), (3, 5, 6, 80), (1, 128), (0, 4, 64), (33, 3, 256)], ids=str)
@pytest.mark.parametrize("lse_scale", [0.0, 3.0, 1000.0])
def test_weights_by_the_denominators(
    lse_scale: float, shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: str
) -> None:
    a, b = (state(shape, dtype, device, seed, lse_scale) for seed in (0, 1))
    out, lse = merge(a, b, impl)
    want, want_lse = exact(a, b)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    e, u = UNIT[torch.float32], UNIT[dtype] * (2 if truncates_bf16(impl, device) else 1)
    size = a[0].double().abs() + b[0].double().abs()
    exponent = 1 + torch.maximum(a[1].abs(), b[1].abs()).double()
    assert ((out.double() - want).abs() <= u * want.abs() + 8 * e * exponent[..., None] * size + 1e-7).all()
    assert ((lse.double() - want_lse).abs() <= 4 * e * exponent).all()


def test_the_worked_example(impl: str, device: str) -> None:
    a, b = (
        (torch.full((1, 1, 64), x, device=device), torch.tensor([[math.log(x)]], device=device)) for x in (1.0, 3.0)
    )
    out, lse = merge(a, b, impl)
    torch.testing.assert_close(out, torch.full_like(out, 2.5))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4)))


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 3.0])
@pytest.mark.parametrize("empty_first", [True, False])
def test_a_state_without_keys_counts_nothing(empty_first: bool, junk: float, impl: str, device: str) -> None:
    full = state((5, 2, 64), torch.bfloat16, device, 0)
    empty = (torch.full_like(full[0], junk), torch.full_like(full[1], -torch.inf))
    out, lse = merge(empty, full, impl) if empty_first else merge(full, empty, impl)
    assert torch.equal(out, full[0])
    torch.testing.assert_close(lse, full[1], rtol=4 * UNIT[torch.float32], atol=1e-6)


def test_two_states_without_keys(impl: str, device: str) -> None:
    out, lse = state((5, 2, 64), torch.bfloat16, device, 0)
    empty = (torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf))
    out, lse = merge(empty, empty, impl)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_strided_states(impl: str, device: str) -> None:
    """Outs sliced from wider rows, LSEs kept head-major as FlashAttention keeps them."""
    a, b = (state((6, 4, 64), torch.float32, device, seed) for seed in (0, 1))
    wide = [torch.cat([out, out], -1)[..., :64] for out, _ in (a, b)]
    turned = [lse.T.contiguous().T for _, lse in (a, b)]
    out, lse = merge((wide[0], turned[0]), (wide[1], turned[1]), impl)
    want, want_lse = merge(a, b, impl)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("lse_base", ["e", "2"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_many_states_at_once(count: int, dtype: torch.dtype | None, lse_base: str, impl: str, device: str) -> None:
    """[N, tokens, Hq, D] beside the merge in float64; a state without keys among them, whatever it holds."""
    outs, lses = state((count, 5, 4, 80), torch.bfloat16, device, 0)
    if count > 2:
        outs[1], lses[1] = torch.nan, -torch.inf
    skip_unless_able(impl, explain("merge_states", outs, lses, impl=impl).reasons[impl])
    out, lse = merge_states(outs, lses, lse_base=lse_base, dtype=dtype, impl=impl)
    unit = math.log(2) if lse_base == "2" else 1.0
    want_lse = torch.logsumexp(unit * lses.double(), 0)
    weights = torch.exp(unit * lses.double() - want_lse)[..., None]
    want = (weights * outs.double().nan_to_num()).sum(0)
    assert (out.dtype, lse.dtype) == (dtype or torch.bfloat16, torch.float32)
    e, u = UNIT[torch.float32], UNIT[out.dtype] * (2 if truncates_bf16(impl, device) else 1)
    size = outs.double().nan_to_num().abs().sum(0)
    exponent = 1 + lses.double().abs().where(lses != -torch.inf, 0).amax(0)
    assert ((out.double() - want).abs() <= u * want.abs() + 8 * e * exponent[..., None] * size + 1e-7).all()
    assert ((lse.double() * unit - want_lse).abs() <= 4 * e * exponent).all()


def test_two_states_are_a_stack_of_two(impl: str, device: str) -> None:
    a, b = (state((6, 4, 64), torch.bfloat16, device, seed) for seed in (0, 1))
    want, want_lse = merge(a, b, impl)
    out, lse = merge_states(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]]), impl=impl)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("lse_base", ["e", "2"])
def test_states_of_infinite_lse_count_alone(lse_base: str, impl: str, device: str) -> None:
    outs, lses = state((4, 3, 2, 64), torch.float32, device, 0)
    lses[1] = lses[3] = torch.inf
    out, lse = merge_states(outs, lses, lse_base=lse_base, impl=impl)
    torch.testing.assert_close(out, (outs[1] + outs[3]) / 2)
    assert (lse == torch.inf).all()
    outs[0], outs[2] = torch.nan, torch.inf
    assert torch.equal(merge_states(outs, lses, lse_base=lse_base, impl=impl)[0], out)
