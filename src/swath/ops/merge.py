"""``merge_states``: join attention over disjoint sets of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swath import checks
from swath.errors import bad_type, bad_value
from swath.ops import arguments
from swath.ops.operator import Operator
from swath.problem import MergeCase

LSE_BASES = ("e", "2")


def merge_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor | None = None,
    lse_b: Tensor | None = None,
    *,
    lse_base: str = "e",
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The attention of the same queries over the union of disjoint key sets: of two, or of N at once.

    ``lse = log(sum of exp(lse_i))`` and ``out`` is the mean of the outs weighted by ``exp(lse_i - lse)`` (the merge of
    FlashAttention's partial results; FlashInfer's ``state_t``). A state with LSE -inf counts nothing, whatever its out
    holds. Give sink logits to one of the parts only.

    A worked example: outs 1.0 and 3.0 with LSEs log(1) and log(3) merge to (1 * 1 + 3 * 3) / 4 = 2.5, LSE log(4).

    Args:
        out_a, out_b: [..., Hq, D], bf16, fp16 or fp32, of one shape and dtype. Without ``out_b`` and ``lse_b``, N
            states stacked: out_a [N, ..., Hq, D], such as [N, tokens, Hq, D], and lse_a [N, ..., Hq].
        lse_a, lse_b: fp32 [..., Hq].
        lse_base: "e" for natural logs, as swath's own, or "2", as FlashInfer's; of what comes and of what is returned.
        dtype: of the merged out; None is that of the outs.
        impl: "auto" or the backend to use.

    Returns:
        (out, lse) shaped as one state.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    options = {"lse_base": lse_base, "dtype": dtype}
    merged: tuple[Tensor, Tensor] = MERGE_STATES((out_a, lse_a, out_b, lse_b), options, impl)
    return merged


def prepare(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor | None = None,
    lse_b: Tensor | None = None,
    *,
    lse_base: str = "e",
    dtype: torch.dtype | None = None,
) -> MergeCase:
    """Check the arguments of ``merge_states`` (see there) and make its outputs."""
    stacked = out_b is None and lse_b is None
    _check_state("a", out_a, lse_a, 3 if stacked else 2)
    if not stacked:
        checks.check_alike("out_b", checks.check_tensor("out_b", out_b, out_a.dim(), out_a.device), "out_a", out_a)
        _check_state("b", out_b, lse_b, 2)
    elif out_a.shape[0] == 0:
        raise bad_value("out_a", "at least one state, [N, ..., Hq, D]", tuple(out_a.shape))
    checks.check_choice("lse_base", lse_base, LSE_BASES)
    if dtype is not None and dtype not in arguments.Q_DTYPES:
        raise bad_type("dtype", "bfloat16, float16, float32 or None", dtype)
    checks.check_no_grad(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    out = torch.empty(out_a.shape[stacked:], dtype=dtype or out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape[stacked:], dtype=lse_a.dtype, device=out_a.device)
    return MergeCase(out_a, lse_a, out_b, lse_b, out, lse, base2=lse_base == "2")


def _check_state(which: str, out: Any, lse: Any, least: int) -> None:
    """An out of at least ``least`` dimensions and its LSE."""
    name = f"out_{which}"
    if checks.check_is_tensor(name, out).dim() < least:
        wanted = "shape [..., Hq, D]" if least == 2 else "shape [N, ..., Hq, D] where there is no out_b"
        raise bad_value(name, wanted, tuple(out.shape))
    if out.dtype not in arguments.Q_DTYPES:
        raise bad_type(name, "bfloat16, float16 or float32", out.dtype)
    name = f"lse_{which}"
    checks.check_tensor(name, lse, out.dim() - 1, out.device)
    if lse.shape != out.shape[:-1]:
        raise bad_value(name, f"shape {tuple(out.shape[:-1])}, as out_{which} without D", tuple(lse.shape))
    if lse.dtype != torch.float32:
        raise bad_type(name, "float32", lse.dtype)


ARGUMENTS = {
    "out_a": Tensor,
    "lse_a": Tensor,
    "out_b": Tensor | None,
    "lse_b": Tensor | None,
    "lse_base": str,
    "dtype": torch.dtype | None,
}
DEFAULTS = {"lse_base": "e", "dtype": None}
MERGE_STATES = Operator(
    "merge_states", "merge", prepare, lambda case: case.result, ARGUMENTS, DEFAULTS, "(Tensor, Tensor)"
)
