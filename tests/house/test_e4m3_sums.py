"""What Hopper's tensor cores lose in sums of e4m3 products, and that error budgets and ``E4M3_KEYS`` allow for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swath.quant import E4M3_KEYS, KVQuant
from swath.testing import Case, Inputs, budget_used, make

E4M3 = torch.float8_e4m3fn
CASE = Case((E4M3_KEYS,), group=2, num_kv_heads=1, head_dim=64, dtype=E4M3, quant=KVQuant(E4M3), q_scale="tensor")
BITS = 13


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, N] @ b [N, D], 32 products at a time: each, and the sum so far, cut to 13 bits of the largest of them."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for first in range(0, a.shape[1], 32):
        terms = a[:, first : first + 32, None].double() * b[None, first : first + 32].double()  # [M, 32, D]
        terms = torch.cat((terms, total[:, None]), 1)
        step = torch.exp2(terms.abs().amax(1, keepdim=True).clamp(min=1e-300).log2().floor() - BITS)
        total = (torch.trunc(terms / step) * step).sum(1)
    return total


def on_tensor_cores(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A decode of one sequence whose products are all of e4m3."""
    pages = inputs.block_table[0, : -(-inputs.case.kv_lens[0] // inputs.case.page_size)].long()
    k, v = (x[pages, 0].flatten(0, 1)[: inputs.case.kv_lens[0]].float() for x in (inputs.cache.k, inputs.cache.v))
    scales = [1.0 if x is None else float(x) for x in (inputs.q_scale, inputs.cache.k_scale, inputs.cache.v_scale)]
    s = product(inputs.q[0].float(), k.T) * (inputs.case.score_scale * scales[0] * scales[1])
    p = torch.exp(s - s.amax(1, keepdim=True))
    out = product((256 * p).float().to(E4M3).float(), v) / 256 * scales[2] / p.sum(1, keepdim=True)
    return out[None].to(inputs.case.out_dtype), (p.sum(1).log() + s.amax(1))[None].float()


@pytest.mark.parametrize("deviation", [0.2, 0.5])
@pytest.mark.parametrize(("keys", "allowed"), [(E4M3_KEYS, True), (6 * E4M3_KEYS, False)])
def test_values_with_a_mean_are_kept_up_to_so_many_keys(keys: int, deviation: float, allowed: bool) -> None:
    inputs = make(replace(CASE, kv_lens=(keys,), compute="fast"))
    inputs.q.copy_(10 * torch.randn(inputs.q.shape))
    inputs.cache.v.copy_(1 + deviation * torch.randn(inputs.cache.v.shape))
    out, _ = on_tensor_cores(inputs)
    assert (budget_used(out, None, inputs.truth(), inputs.case.arithmetic) <= 1) == allowed


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("large", [0, 1])
def test_scores_of_products_of_one_sign(head_dim: int, large: int) -> None:
    """One large product, and many that are small beside it, lose most."""
    inputs = make(replace(CASE, kv_lens=(300,), head_dim=head_dim))
    for x in (inputs.q, inputs.cache.k):
        x.copy_((0.02 if large else 0.5) * torch.randn(x.shape).abs() + 0.02)
        x[..., :large] = 3.0
    _, lse = on_tensor_cores(inputs)
    out, _ = inputs.run("reference")
    assert 0.02 < budget_used(out, lse, inputs.truth(), inputs.case.arithmetic) <= 1
