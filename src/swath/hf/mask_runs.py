"""The keys that each row of a mask function sees, as one run, told from its parts: nothing is written out.

A row of Transformers' causal, sliding, chunked, packed and block masks sees one run of keys, and so does a row of their
intersections. A row of a union does if the two runs touch: an image's keys and those before them, say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from swath.hf.mask_functions import MaskFunction, part_of

FAR = 2**30
"""Behind all keys."""


@dataclass(frozen=True)
class Runs:
    """Row i of sequence b sees the keys ``low[b, i] .. end[b, i] - 1``: int64 [B or 1, rows], none where low >= end.

    whole: whether that is all, a tensor: a union of runs that do not touch is no run.
    """

    low: Tensor
    end: Tensor
    whole: Tensor

    def met(self, other: Runs) -> Runs:
        """What both see."""
        low, end = torch.maximum(self.low, other.low), torch.minimum(self.end, other.end)
        return Runs(low, end, self.whole & other.whole)

    def joined(self, other: Runs) -> Runs:
        """What either sees."""
        mine, theirs = self.low < self.end, other.low < other.end
        touch = torch.maximum(self.low, other.low) <= torch.minimum(self.end, other.end)
        low = torch.minimum(torch.where(mine, self.low, FAR), torch.where(theirs, other.low, FAR))
        end = torch.maximum(torch.where(mine, self.end, 0), torch.where(theirs, other.end, 0))
        return Runs(low, end, self.whole & other.whole & (touch | ~mine | ~theirs).all())


def runs_of(mask_function: MaskFunction, rows: Tensor) -> Runs | None:
    """The runs of the rows at the positions ``rows``, int64 [rows]; None where the function is no part known here."""
    part = part_of(mask_function)
    if part is None or part[0] not in _PARTS:
        return None
    return _PARTS[part[0]](part[1], rows[None])


def _run(low: Tensor | int, end: Tensor | int, rows: Tensor) -> Runs:
    whole = torch.ones((), dtype=torch.bool, device=rows.device)
    return Runs(low + torch.zeros_like(rows), end + torch.zeros_like(rows), whole)


def _folded(variables: Any, rows: Tensor, fold: Callable[[Runs, Runs], Runs]) -> Runs | None:
    parts = [runs_of(each, rows[0]) for each in variables["mask_functions"]]
    known = [part for part in parts if part is not None]
    return reduce(fold, known) if known and len(known) == len(parts) else None


def _chunks(variables: Any, rows: Tensor) -> Runs:
    # A sequence's chunks begin at its first token, behind the padding.
    size, first = variables["chunk_size"], variables["left_padding"].to(rows.device)[:, None]
    low = (rows - first) // size * size + first
    return _run(low, low + size, low)


def _same(ids: Tensor, rows: Tensor, least: int) -> Runs | None:
    """Rows that see the keys with their own number, ids [B, keys]; rows with numbers below ``least`` see none."""
    ids, length = ids.to(rows.device), ids.shape[1]
    if rows.shape[1] and int(rows[0, -1]) >= length:
        return None  # rows that have no number
    at = torch.arange(length, device=rows.device).expand_as(ids)
    begins = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    low = torch.where(begins, at, 0).cummax(1).values
    after = torch.where(begins, at, length).flip(1).cummin(1).values.flip(1)  # the next beginning, or the one at hand
    end = torch.nn.functional.pad(after[:, 1:], (0, 1), value=length)
    numbered = ids >= least
    # Numbers that rise from one run to the next come in one run each.
    highest = torch.nn.functional.pad(
        torch.where(numbered, ids, least - 1).cummax(1).values[:, :-1], (1, 0), value=least - 1
    )
    whole = (~(begins & numbered) | (ids > highest)).all()
    end = torch.where(numbered, end, 0)
    return Runs(low[:, rows[0]], end[:, rows[0]], whole)


_PARTS: dict[str, Callable[[Any, Tensor], Runs | None]] = {
    "causal": lambda _, rows: _run(0, rows + 1, rows),
    "all": lambda _, rows: _run(0, FAR, rows),
    "both": lambda variables, rows: _folded(variables, rows, Runs.met),
    "either": lambda variables, rows: _folded(variables, rows, Runs.joined),
    "sliding": lambda v, rows: _run(rows - v["sliding_window"] + 1, FAR, rows),
    "sliding both ways": lambda v, rows: _run(rows - v["sliding_window"], rows + v["sliding_window"] + 1, rows),
    "blocks": lambda v, rows: _same(v["block_sequence_ids"], rows, 0),
    "packed": lambda v, rows: _same(v["packed_sequence_mask"], rows, torch.iinfo(torch.int32).min),
    "chunks": _chunks,
}
"""The runs of each kind of part, from its variables and rows [1, rows]."""
