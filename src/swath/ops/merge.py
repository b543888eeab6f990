"""``merge_states``: join attention over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from swath import checks
from swath.errors import bad_type, bad_value
from swath.ops import arguments
from swath.ops.operator import Operator
from swath.problem import MergeCase


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The attention of the same queries over the union of two disjoint key sets.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out`` is the mean of the two outs weighted by ``exp(lse_x - lse)``
    (the merge of FlashAttention's partial results; FlashInfer's ``state_t``). A state with LSE -inf counts
    nothing, whatever its out holds. Give sink logits to one of the two parts only.

    A worked example: outs 1.0 and 3.0 with LSEs log(1) and log(3) merge to (1 * 1 + 3 * 3) / 4 = 2.5, LSE log(4).

    Args:
        out_a, out_b: [..., Hq, D], bf16, fp16 or fp32, of one shape and dtype.
        lse_a, lse_b: fp32 [..., Hq], natural log.
        impl: "auto" or the backend to use.

    Returns:
        (out, lse) shaped as the inputs.
    """
    merged: tuple[Tensor, Tensor] = MERGE_STATES((out_a, lse_a, out_b, lse_b), {}, impl)
    return merged


def prepare(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> MergeCase:
    """Check the arguments of ``merge_states`` (see there) and make its outputs."""
    if checks.check_is_tensor("out_a", out_a).dim() < 2:
        raise bad_value("out_a", "shape [..., Hq, D]", tuple(out_a.shape))
    if out_a.dtype not in arguments.Q_DTYPES:
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


ARGUMENTS = {"out_a": Tensor, "lse_a": Tensor, "out_b": Tensor, "lse_b": Tensor}
MERGE_STATES = Operator("merge_states", "merge", prepare, lambda case: case.result, ARGUMENTS, {}, "(Tensor, Tensor)")
