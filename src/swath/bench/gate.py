"""The gate: no time is reported for a result that is outside its error budget.

Some query rows are held to the float64 oracle of ``swath.testing``, each with the budget of its own sums: the last row
of the last sequence and of the longest query, the row whose window begins one key after the first, and random ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swath.bench.inputs import Inputs
from swath.testing import Truth, budget_used, oracle

RANDOM_ROWS = 3


class Verdict(NamedTuple):
    """Of the sampled rows: the worst error relative to the norm, and the worst share of an element's budget."""

    error: float
    budget_used: float

    @property
    def passed(self) -> bool:
        """Whether the result may be timed."""
        return self.budget_used <= 1


class Gate:
    """The truth of some rows of a call."""

    def __init__(self, inputs: Inputs) -> None:
        self._case = inputs.case
        starts = inputs.cu_q.tolist()
        sampled = _sample(inputs)
        self.rows = [starts[b] + i for b, i in sampled]
        self.truths = [_truth(inputs, b, i) for b, i in sampled]

    def check(self, out: Tensor) -> Verdict:
        """Judge a result [..., Hq, D]; rows are counted over its leading dimensions."""
        flat = out.reshape(-1, *out.shape[-2:])
        quantised = self._case.quant.is_quantised
        error = used = 0.0
        for row, truth in zip(self.rows, self.truths, strict=True):
            mine, want = flat[row][None], truth.out
            relative = (mine.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
            error = max(error, float(relative.nan_to_num(nan=torch.inf).max()))
            share = budget_used(mine, None, truth, quantised=quantised, compute=self._case.compute)
            used = max(used, share)
        return Verdict(error, used)


def _sample(inputs: Inputs) -> list[tuple[int, int]]:
    """(sequence, query) pairs, without repeats."""
    q_lens, kv_lens = inputs.lengths.q, inputs.lengths.kv
    owners = [b for b, n in enumerate(q_lens) if n]
    last = owners[-1]
    longest = max(owners, key=lambda b: q_lens[b])
    pairs = [(last, q_lens[last] - 1), (longest, q_lens[longest] - 1), (owners[0], 0)]
    window = inputs.case.window
    if window is not None:
        edges = [(b, window - (kv_lens[b] - q_lens[b])) for b in owners]
        pairs += [(b, i) for b, i in edges if 0 <= i < q_lens[b]][:1]
    generator = torch.Generator().manual_seed(1)
    for _ in range(RANDOM_ROWS):
        b = owners[int(torch.randint(len(owners), (), generator=generator))]
        pairs.append((b, int(torch.randint(q_lens[b], (), generator=generator))))
    return list(dict.fromkeys(pairs))


def _truth(inputs: Inputs, b: int, i: int) -> Truth:
    """Row i of sequence b alone: one query with its position given, over the same keys."""
    case, kv_len = inputs.case, inputs.lengths.kv[b]
    first = int(inputs.cu_q[b])
    q = inputs.q[first + i][None]
    one = torch.tensor([0, 1], device=q.device)
    options: dict[str, Any] = dict(
        cu_seqlens_q=one, q_start=torch.tensor([kv_len - inputs.lengths.q[b] + i]), size=case.window,
        global_tokens=case.leading, scale=case.head_dim**-0.5, sink=inputs.sink,
    )  # fmt: skip
    if case.page_size == 0:
        begin = int(inputs.cu_k[b])
        k, v = (x[begin : begin + kv_len] for x in inputs.dense)
        return oracle.dense(q, k, v, cu_seqlens_k=one * kv_len, **options)
    cache = inputs.cache
    table, seq_lens = inputs.pages[b : b + 1], inputs.seq_lens[b : b + 1]
    return oracle.paged(q, cache.k, cache.v, cache.k_scale, cache.v_scale, table, seq_lens, **options)
