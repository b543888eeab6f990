"""Twists with numbers at the ends of their types: drawn with ``--extreme`` alone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from swath.testing.cases import Case
from swath.testing.fuzz.twists import EXTREMES, TWISTS, Twist, like, twist
from swath.testing.inputs import Inputs

LAST = 2**31 - 1
"""The last position there is: positions are int32."""


def known_twists(extreme: bool) -> dict[str, Twist]:
    """All that may be drawn."""
    return {**TWISTS, **EXTREMES} if extreme else TWISTS


def sees_all(case: Case) -> bool:
    """Whether every key of a sequence with rows exists, wherever its rows may be put."""
    return case.q_start is None and case.size is None and not case.ranges


@twist(0.3, lambda case: sees_all(case) and case.num_seqs > 0, EXTREMES)
def far_positions(inputs: Inputs, r: Random) -> Inputs:
    """Queries stand near either end of int32, under windows that reach back to the keys, or do not."""
    case = inputs.case
    counts = (max(LAST - n - r.randint(0, 3), 0) for n in case.row_counts)
    starts = [r.choice((far, far, 1_200_000_000, -(2**31), -(2**30))) for far in counts]
    size = r.choice((None, LAST, LAST - 1, 2_000_000_000, 1))
    q_start = torch.tensor(starts, dtype=torch.int32, device=inputs.q.device)
    return replace(inputs, case=replace(case, size=size), q_start=q_start)


@twist(0.2, lambda case: sees_all(case) and not case.dense, EXTREMES)
def far_lengths(inputs: Inputs, r: Random) -> Inputs:
    """Lengths up to the largest int32 over tables of a few whole pages."""
    lens, size = list(inputs.case.kv_lens), inputs.cache.page_size
    lens = [r.choice((LAST, LAST - 1, 2**30)) if n > 0 and n % size == 0 else n for n in lens]
    return replace(inputs, seq_lens=like(lens, inputs.seq_lens), case=replace(inputs.case, bounds="none"))


@twist(0.3, lambda case: case.sink != "none", EXTREMES)
def huge_sinks(inputs: Inputs, r: Random) -> Inputs:
    """Sink logits up to infinity, to both sides."""
    if not isinstance(inputs.sink, Tensor):
        return inputs
    largest = torch.finfo(inputs.sink.dtype).max
    logits = [r.choice((torch.inf, -torch.inf, largest, -largest, 1e4, -1e4, 0.0)) for _ in inputs.sink.tolist()]
    return replace(inputs, sink=torch.tensor(logits, device=inputs.q.device).to(inputs.sink.dtype))


@twist(0.2, lambda case: case.softcap > 0, EXTREMES)
def wild_caps(inputs: Inputs, r: Random) -> Inputs:
    """Soft caps that cap nothing, or everything."""
    return replace(inputs, case=replace(inputs.case, softcap=r.choice((1e-6, 1e3, 1e4, 1e6, 1e8))))


def sees_itself(case: Case) -> bool:
    """Whether a row that stands on a key sees it, and no leading token."""
    return case.size != 0 and case.global_tokens == 0 and not case.ranges


@twist(0.15, lambda case: sees_itself(case) and case.softcap == 0 and case.compute == "float", EXTREMES)
def deep_scores(inputs: Inputs, r: Random) -> Inputs:
    """Scores of 10^30 and more, to both sides, of one key a row: beside another no score this large is exact enough."""
    return replace(inputs, case=replace(inputs.case, scale=r.choice((1e28, -1e28, 1e33, -1e33)), size=1))
