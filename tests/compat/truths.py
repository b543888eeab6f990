"""What FlashAttention's documentation says that its functions compute, in float64, for the tests of swath.compat."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from swath.testing import Truth, check_budget
from swath.testing.oracle import _sequence

WINDOWS = [
    (False, (-1, -1)), (True, (-1, -1)), (False, (9, 0)), (True, (9, 0)), (True, (9, 9)), (True, (9, -1)),
    (False, (9, 9)), (False, (9, 3)), (False, (3, 9)), (False, (-1, 5)), (False, (7, -1)), (False, (0, 0)),
    (False, (-1, 0)), (True, (0, 5)), (False, (300, 300)), (True, (1000, 0)), (False, (1000, 2)), (False, (2, 1000)),
]  # fmt: skip
"""causal and window_size: each kind that the functions take."""


def seen_by(q_len: int, kv_len: int, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Which keys a query sees, bool [q_len, kv_len]: the last query stands at the last key."""
    left, right = window_size
    i, j = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
    right = 0 if causal else right
    return ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))


def truth(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None, **scoring: Any) -> Truth:
    """One sequence: q [Sq, Hq, D], k and v [Sk, Hkv, D]; ``scoring`` is ``softcap`` and ``sink``."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    unit = torch.ones(1, 1, 1, dtype=torch.float64)
    scoring["sink"] = None if scoring.get("sink") is None else scoring["sink"].cpu()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _sequence(torch.arange(len(q)), q, (k, v, unit), seen, k.shape[1], False, scale=scale, **scoring)


def check(out: Tensor, lse: Tensor | None, wanted: Truth) -> None:
    """Hold one sequence's out [Sq, Hq, D] and lse [Hq, Sq] to its error budget."""
    check_budget(out.cpu(), None if lse is None else lse.cpu().T, wanted)


def check_ragged(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int], *seen: Any, **how: Any
) -> None:
    """Hold every sequence of a batch laid end to end to its budget; ``seen`` is as in ``seen_by``."""
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        mask = seen_by(q1 - q0, k1 - k0, *seen)
        check(out[q0:q1], lse[:, q0:q1], truth(q[q0:q1], k[k0:k1], v[k0:k1], mask, **how))
