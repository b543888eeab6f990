"""quantise_q in torch: the twin that every other backend must equal byte for byte."""

from __future__ import annotations

from swath.problem import QuantiseCase
from swath.quant import quantise, token_scale


def why_not(case: QuantiseCase) -> str | None:
    """Runs everywhere."""
    return None


def plan(case: QuantiseCase) -> str:
    """The launch in words."""
    return "torch element-wise"


def warm(case: QuantiseCase) -> None:
    """Nothing to compile."""


def run(case: QuantiseCase) -> None:
    """The scale of each row, or the static one, and the rows over it."""
    scale = token_scale(case.q, case.out.dtype) if case.scale is None else case.scale
    case.q_scale.copy_(scale)
    case.out.copy_(quantise(case.q, scale[..., None] if case.scale is None else scale, case.out.dtype))
