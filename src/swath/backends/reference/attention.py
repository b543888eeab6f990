"""The reference schedule: one query row at a time, in float64, straight from the formula. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from swath.problem import Problem


def why_not(problem: Problem) -> str | None:
    """Runs everywhere, slowly."""
    return None


def plan(problem: Problem) -> str:
    """The launch in words."""
    return "torch, float64, one row at a time"


def warm(problem: Problem) -> None:
    """Nothing to compile."""


def run(problem: Problem) -> None:
    """Write out and lse of every row of every sequence, computed in float64."""
    for rows in problem.sequences():
        k, v, live = _all_keys(problem, rows.index, rows.kv_len)
        key_pos = torch.arange(k.shape[1], device=k.device)
        q = rows.dequantised_q(0, rows.q.shape[0], torch.float64)
        for i in range(rows.q.shape[0]):
            visible = rows.mask(i, i + 1, key_pos)[0] & live
            out, lse = _one_row(problem, q[i], k[:, visible], v[:, visible])
            rows.out[i] = out
            if rows.lse is not None:
                rows.lse[i] = lse


def _all_keys(problem: Problem, b: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    keys = problem.keys.slice(b, 0, min(kv_len, problem.keys.capacity))
    return *keys.dequantised(torch.float64), keys.live


def _one_row(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [Hq, D] over its visible keys k [Hkv, N, D], v [Hkv, N, Dv]: out [Hq, Dv], lse [Hq]."""
    heads = problem.by_kv_head(q[None])[:, 0]  # [Hkv, group, D]
    s = problem.scale * (heads @ k.mT)
    if problem.softcap > 0:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    lse = torch.logsumexp(s, -1)
    if problem.sink is not None:
        sink = problem.by_kv_head(problem.sink.to(s.dtype)[None])[:, 0]
        lse = torch.logaddexp(lse, sink)
    p = torch.exp(s - lse.where(lse != -torch.inf, 0.0)[..., None])
    out = problem.by_q_head((p @ v)[:, None])[0]
    return out, problem.by_q_head(lse[:, None])[0]
