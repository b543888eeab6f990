"""From the arguments of ``merge_states`` to a checked case, and to a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swath import checks, dispatch
from swath.errors import bad_type, bad_value

OP = "merge"


@dataclass(frozen=True, eq=False, slots=True)
class MergeCase:
    """Two attention states over disjoint keys, and where their union goes."""

    out_a: Tensor
    lse_a: Tensor
    out_b: Tensor
    lse_b: Tensor
    out: Tensor
    lse: Tensor


def prepare(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> MergeCase:
    """Check the arguments of ``merge_states`` (see there) and make its outputs."""
    if not isinstance(out_a, Tensor) or out_a.dim() < 2:
        raise bad_value("out_a", "a tensor [..., Hq, D]", tuple(getattr(out_a, "shape", ())))
    if out_a.dtype not in checks.Q_DTYPES:
        raise bad_type("out_a", "bfloat16, float16 or float32", out_a.dtype)
    checks.check_tensor("out_b", out_b, out_a.dim(), out_a.device)
    checks.check_alike("out_b", out_b, "out_a", out_a)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.check_tensor(name, lse, out_a.dim() - 1, out_a.device)
        if lse.shape != out_a.shape[:-1]:
            raise bad_value(name, f"shape {tuple(out_a.shape[:-1])}, as out_a without D", tuple(lse.shape))
        if lse.dtype != torch.float32:
            raise bad_type(name, "float32", lse.dtype)
    checks.check_no_grad(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    return MergeCase(out_a, lse_a, out_b, lse_b, out, torch.empty(lse_a.shape, dtype=lse_a.dtype, device=out_a.device))


def execute(case: MergeCase, impl: str) -> tuple[Tensor, Tensor]:
    """Merge a prepared pair."""
    dispatch.choose(OP, case, impl).run(case)
    return case.out, case.lse
