"""``merge_states``: join attention over disjoint sets of keys."""

from __future__ import annotations

from torch import Tensor

from swath import library
from swath.ops.merge import call


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
    if library.must_dispatch(out_a, lse_a):
        return library.merge_states(out_a, lse_a, out_b, lse_b, impl)
    return call.execute(call.prepare(out_a, lse_a, out_b, lse_b), impl)
