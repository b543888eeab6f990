"""From the arguments of ``attention`` to a checked Problem, and to a backend."""

from __future__ import annotations

from torch import Tensor

from swath import checks, dispatch
from swath.cache import DenseKeys
from swath.errors import bad_type, bad_value
from swath.problem import Problem
from swath.window import Window

OP = "attention"


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    gqa: str = "grouped",
    q_start: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Problem:
    """Check the arguments of ``attention`` (see there) and make its outputs."""
    window = Window() if window is None else window
    checks.check_tensor("q", q, 3)
    if q.dtype not in checks.Q_DTYPES:
        raise bad_type("q", "bfloat16, float16 or float32", q.dtype)
    checks.check_rows("q", q)
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(name, x, 3, q.device)
        if x.dtype != q.dtype:
            raise bad_type(name, f"q's dtype {q.dtype}", x.dtype)
        checks.check_rows(name, x)
    if v.shape != k.shape:
        raise bad_value("v", f"k's shape {tuple(k.shape)}", tuple(v.shape))
    checks.check_heads(q, k.shape[1], k.shape[2])
    checks.check_int32("cu_seqlens_q", cu_seqlens_q, None, q.device)
    if cu_seqlens_q.shape[0] < 1:
        raise bad_value("cu_seqlens_q", "shape [B + 1]", tuple(cu_seqlens_q.shape))
    num_seqs = cu_seqlens_q.shape[0] - 1
    checks.check_int32("cu_seqlens_k", cu_seqlens_k, num_seqs + 1, q.device)
    if q_start is not None:
        checks.check_int32("q_start", q_start, num_seqs, q.device)
    scoring = checks.check_scoring(q, num_seqs, window, scale, softcap, sink, gqa)
    checks.check_no_grad(q=q, k=k, v=v, sink=sink)
    out, lse = checks.make_outputs(q, out, return_lse)
    return Problem(
        q=q, cu_seqlens_q=cu_seqlens_q, keys=DenseKeys(k, v, cu_seqlens_k), q_start=q_start, window=window,
        scale=scoring.scale, q_scale=None, softcap=scoring.softcap, sink=sink, interleaved=scoring.interleaved,
        out=out, lse=lse,
        max_q_len=checks.check_bound("max_q_len", max_q_len, q.shape[0]),
        max_kv_len=checks.check_bound("max_kv_len", max_kv_len, k.shape[0]),
    )  # fmt: skip


def execute(problem: Problem, impl: str) -> Tensor | tuple[Tensor, Tensor]:
    """Run a prepared call: out, or (out, lse) where an LSE was asked for."""
    dispatch.choose(OP, problem, impl).run(problem)
    return problem.out if problem.lse is None else (problem.out, problem.lse)
