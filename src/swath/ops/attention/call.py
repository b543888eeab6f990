"""From the arguments of ``attention`` to a checked Problem, and to a backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from swath import checks, dispatch
from swath.cache import DenseKeys
from swath.checks import Accepted
from swath.errors import bad_type, bad_value
from swath.problem import Problem
from swath.signature import Memory, coarse
from swath.window import FULL, Window

OP = "attention"

_memory: Memory[Accepted] = Memory()


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
    window = FULL if window is None else window
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, q_start, window, sink, out)
    values = (max_q_len, coarse(max_kv_len), scale, softcap, gqa, return_lse)
    accepted = _memory.recall(_accept, tensors, values)
    out, lse = checks.make_outputs(q, out, return_lse)
    scoring = accepted.scoring
    problem = Problem(
        q=q, cu_seqlens_q=cu_seqlens_q, keys=DenseKeys(k, v, cu_seqlens_k), q_start=q_start, window=window,
        scale=scoring.scale, q_scale=None, softcap=scoring.softcap, sink=sink, interleaved=scoring.interleaved,
        out=out, lse=lse, max_q_len=accepted.max_q_len, max_kv_len=accepted.max_kv_len,
    )  # fmt: skip
    problem.memo = accepted.memo
    return problem


def execute(problem: Problem, impl: str) -> Tensor | tuple[Tensor, Tensor]:
    """Run a prepared call: out, or (out, lse) where an LSE was asked for."""
    dispatch.choose(OP, problem, impl).run(problem)
    return problem.out if problem.lse is None else (problem.out, problem.lse)


def _accept(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_start: Any, window: Any, sink: Any,
    out: Any, max_q_len: Any, max_kv_len: Any, scale: Any, softcap: Any, gqa: Any, return_lse: Any,
) -> Accepted:  # fmt: skip
    """Every check of a call whose signature was not met before."""
    checks.check_tensor("q", q, 3)
    if q.dtype not in checks.Q_DTYPES:
        raise bad_type("q", "bfloat16, float16 or float32", q.dtype)
    checks.check_rows("q", q)
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(name, x, 3, q.device)
        if x.dtype != q.dtype:
            raise bad_type(name, f"q's dtype {q.dtype}", x.dtype)
        checks.check_rows(name, x)
    checks.check_alike("v", v, "k", k)
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
    checks.check_outputs(q, out, return_lse)
    return Accepted(
        scoring,
        max_q_len=checks.check_bound("max_q_len", max_q_len, q.shape[0]),
        max_kv_len=checks.check_bound("max_kv_len", max_kv_len, k.shape[0]),
    )
