"""merge_states in torch, its weights in float64."""

from __future__ import annotations

import math

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
    """Weigh each out by its share of the common denominator.

    A part with LSE -inf takes nothing, not even a NaN; of those with +inf each takes as much, and the others nothing,
    not even a NaN.
    """
    unit = math.log(2.0) if case.base2 else 1.0
    out_a, lse_a, outs, lses = case.states
    parts = [(out_a, lse_a.double()), *zip(outs, lses.double(), strict=True)]
    top = parts[0][1]
    for _, part in parts[1:]:
        top = torch.maximum(top, part)
    total, merged = torch.zeros_like(top), torch.zeros_like(case.out, dtype=torch.float32)
    for out, part in parts:
        share = torch.exp((part - top) * unit).where(part != top, 1.0).where(part != -torch.inf, 0.0)
        total += share
        counts = (part != -torch.inf) & ((part == top) | (top != torch.inf))
        merged += torch.where(counts[..., None], share[..., None].float() * out.float(), 0.0)
    case.out.copy_(merged / total.where(total != 0, 1.0)[..., None].float())
    case.lse.copy_(top + total.log() / unit)
