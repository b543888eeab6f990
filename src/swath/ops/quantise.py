"""``quantise_q``: queries in fp8, as they multiply with the keys of an fp8 cache."""

from __future__ import annotations

import torch
from torch import Tensor

from swath import checks
from swath.errors import bad_type, bad_value
from swath.ops import arguments
from swath.ops.operator import Operands, Operator, Options, Stages
from swath.problem import Accepted, Outputs, QuantiseCase

QUERY_FP8 = torch.float8_e4m3fn


def quantise_q(q: Tensor, scale: Tensor | None = None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Queries as float8_e4m3fn with their scale, in one pass: the ``q`` and the ``q_scale`` of ``paged_attention``.

    ``q = out x q_scale``, rounded half to even and saturated at 448. Without ``scale`` each token and head has a scale
    of its own, max|q| / 448, or 1 for a row of zeros; a row with a NaN or an infinity is NaN.

    Args:
        q: [T, Hq, D] or [B, S, Hq, D], bf16, fp16 or fp32; any strides with the last one 1.
        scale: fp32 [], a static scale for all rows; NaN in q stays NaN, an infinity is 448. 0 counts as 1.
        impl: "auto" or the backend to use.

    Returns:
        (out, q_scale): out as q in float8_e4m3fn, contiguous; q_scale fp32, as q without D, or [] for a static one.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    quantised: tuple[Tensor, Tensor] = QUANTISE_Q((q, scale), {}, impl)
    return quantised


def _outputs(_accepted: Accepted, operands: Operands, _options: Options) -> Outputs:
    q, scale = operands
    out = torch.empty_like(q, dtype=QUERY_FP8, memory_format=torch.contiguous_format)
    return out, torch.empty(q.shape[:-1] if scale is None else (), dtype=torch.float32, device=q.device)


def _case(accepted: Accepted, operands: Operands, _options: Options, outputs: Outputs) -> QuantiseCase:
    fields: Operands = (*operands, *outputs, accepted.memo)
    return QuantiseCase(*fields)


def prepare(q: Tensor, scale: Tensor | None = None) -> QuantiseCase:
    """Check the arguments of ``quantise_q`` (see there) and make its outputs."""
    return STAGES.prepare((q, scale), {})


def _check(q: Tensor, scale: Tensor | None) -> Accepted:
    """Every check of a call whose signature was not met before."""
    if checks.check_is_tensor("q", q).dim() not in (3, 4):
        raise bad_value("q", "shape [T, Hq, D] or [B, S, Hq, D]", tuple(q.shape))
    if q.dtype not in arguments.Q_DTYPES:
        raise bad_type("q", "bfloat16, float16 or float32", q.dtype)
    if not 1 <= q.shape[-1] <= arguments.MAX_HEAD_DIM:
        raise bad_value("q", f"a head_dim of 1 to {arguments.MAX_HEAD_DIM}", q.shape[-1])
    checks.check_rows("q", q)
    if scale is not None and checks.check_tensor("scale", scale, 0, q.device).dtype != torch.float32:
        raise bad_type("scale", "float32", scale.dtype)
    checks.check_no_grad(q=q, scale=scale)
    return Accepted({}, q.shape[-1])


STAGES = Stages(_check, _outputs, _case)
ARGUMENTS, DEFAULTS = {"q": Tensor, "scale": Tensor | None}, {"scale": None}
QUANTISE_Q = Operator(
    "quantise_q", "quantise", prepare, lambda case: case.result, ARGUMENTS, DEFAULTS, "(Tensor, Tensor)", stages=STAGES
)
