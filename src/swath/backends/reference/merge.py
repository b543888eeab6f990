"""merge_states in torch, in float32."""

from __future__ import annotations

import torch

from swath.problem import MergeCase


def why_not(case: MergeCase) -> str | None:
    """Runs everywhere."""
    return None


def plan(case: MergeCase) -> str:
    """The launch in words."""
    return "torch element-wise"


def warm(case: MergeCase) -> None:
    """Nothing to compile."""


def run(case: MergeCase) -> None:
    """Weigh each out by its share of the common denominator; a share of zero takes nothing, not even a NaN."""
    lse = torch.logaddexp(case.lse_a, case.lse_b)
    safe = lse.where(lse > -torch.inf, 0.0)
    merged = torch.zeros(case.out.shape, dtype=torch.float32, device=case.out.device)
    for out, part in ((case.out_a, case.lse_a), (case.out_b, case.lse_b)):
        share = torch.exp(part - safe)[..., None]
        merged += torch.where(part[..., None] > -torch.inf, share * out.float(), 0.0)
    case.out.copy_(merged)
    case.lse.copy_(lse)
