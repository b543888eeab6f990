"""The gate: no time is reported for a result that is outside its error budget.

Some query rows are held to the float64 oracle of ``swath.testing``, each with the budget of its own sums: the last row
of the last sequence and of the longest query, the row whose window begins one key after the first, and random ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.testing import budget_used

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
        self.rows = sorted(starts[b] + i for b, i in _sample(inputs.case))
        self.truth = inputs.call.truth(torch.tensor(self.rows, device=inputs.q.device))

    def check(self, out: Tensor, *, p_e4m3: bool = False) -> Verdict:
        """Judge a result [..., Hq, D]; rows are counted over its leading dimensions. ``p_e4m3``: see ``Provider``."""
        flat, want = out.reshape(-1, *out.shape[-2:]), self.truth.out
        off = (flat[self.truth.rows].double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
        used = budget_used(flat, None, self.truth, replace(self._case.arithmetic, p_e4m3=p_e4m3))
        return Verdict(float(off.nan_to_num(nan=torch.inf).max()), used)


def _sample(case: BenchCase) -> list[tuple[int, int]]:
    """(sequence, query) pairs, without repeats."""
    q_lens, kv_lens = case.row_counts, case.kv_lens
    owners = [b for b, n in enumerate(q_lens) if n]
    last = owners[-1]
    longest = max(owners, key=lambda b: q_lens[b])
    pairs = [(last, q_lens[last] - 1), (longest, q_lens[longest] - 1), (owners[0], 0)]
    if case.size is not None:
        edges = [(b, case.size - (kv_lens[b] - q_lens[b])) for b in owners]
        pairs += [(b, i) for b, i in edges if 0 <= i < q_lens[b]][:1]
    generator = torch.Generator().manual_seed(1)
    for _ in range(RANDOM_ROWS):
        b = owners[int(torch.randint(len(owners), (), generator=generator))]
        pairs.append((b, int(torch.randint(q_lens[b], (), generator=generator))))
    return list(dict.fromkeys(pairs))
