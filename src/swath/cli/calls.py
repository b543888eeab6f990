"""Calls made up for ``explain``, ``doctor`` and the page of support: tensors of the right shape, contents unset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from swath.quant import KVQuant
from swath.testing import Case, make_unset

MAX_STEPS = 8
"""Up to this many query tokens are n-step decode, q [B, S, Hq, D]; more are a chunked prefill, q [T, Hq, D]."""


def case_of(batch: int = 1, q_len: int = 1, kv_len: int = 256, **others: Any) -> Case:
    """``batch`` sequences alike, of 8 query heads and 2 kv heads of 128 over a bf16 cache unless ``others`` say so."""
    q_lens = q_len if q_len <= MAX_STEPS else (q_len,) * batch
    given: dict[str, Any] = {"group": 4, "head_dim": 128, "quant": KVQuant(torch.bfloat16), "bounds": "tight"} | others
    return Case(kv_lens=(kv_len,) * batch, q_lens=q_lens, **given)


def form_of(case: Case) -> str:
    """How ``paged_attention`` takes the queries."""
    return "chunked prefill" if case.ragged else "decode" if case.q_lens == 1 else "n-step decode"


def arguments(op: str, case: Case, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of the public function ``op``, one of ``explain.OPS``, for a case."""
    inputs = make_unset(replace(case, dense=op == "attention"), device)
    if op in ("attention", "paged_attention"):
        return list(inputs.args), inputs.options
    rows = inputs.q.flatten(0, -3)
    if op == "append_kv":
        k, v = (rows.new_empty(rows.shape[0], case.num_kv_heads, dim) for dim in (case.head_dim, case.v_dim))
        return [inputs.cache, k, v, rows.new_zeros(rows.shape[0], dtype=torch.int64)], {}
    if op == "quantise_q":
        return [rows], {}
    lse = rows.new_empty(rows.shape[:2], dtype=torch.float32)
    return [rows, lse, rows, lse], {}
