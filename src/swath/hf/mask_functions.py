"""Reading the mask functions of Transformers: closures that say, for each query and key, whether they see each other.

They are built from a few functions by ``and_masks`` and ``or_masks``. The parts are told by their code objects, their
sizes are read from their variables, and what they say together is a ``Reach``: nothing is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from swath.hf.versions import remap_positions_for_packed_sequence
from swath.window import Window

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Reach:
    """A query at p sees keys ``p - past .. p + future``; None: no limit.

    ``nothing``: it sees none. Otherwise its keys are a run that ends or begins beside p, or holds it, so that unions
    and intersections are a Reach again.
    """

    past: int | None = None
    future: int | None = None
    nothing: bool = False

    def joined(self, other: Reach) -> Reach:
        """What either of them sees."""
        if self.nothing or other.nothing:
            return other if self.nothing else self
        return Reach(_farthest(self.past, other.past), _farthest(self.future, other.future))

    def met(self, other: Reach) -> Reach:
        """What both of them see."""
        if self.nothing or other.nothing:
            return NOTHING
        return Reach(_nearest(self.past, other.past), _nearest(self.future, other.future))

    @property
    def window(self) -> Window | None:
        """The window that reaches as far, if there is one."""
        size = None if self.past is None else self.past + 1
        if self.nothing or self.future not in (0, self.past):
            return None
        return Window(size, causal=self.future == 0 and self.past != 0)


NOTHING = Reach(nothing=True)


@dataclass(frozen=True)
class Reading:
    """What a mask function says, as long as every element of ``conditions`` is true."""

    reach: Reach
    conditions: tuple[Tensor, ...] = ()


def part_of(mask_function: MaskFunction) -> tuple[str, dict[str, Any]] | None:
    """Which of Transformers' builders made a mask function, and the variables it has; None for any other function."""
    if mask_function is causal_mask_function:
        return "causal", {}
    if mask_function is bidirectional_mask_function:
        return "all", {}
    if torch.compiler.is_compiling():
        return None  # dynamo does not show the variables of functions
    name = _NAMES.get(getattr(mask_function, "__code__", None))
    return None if name is None else (name, dict(getclosurevars(mask_function).nonlocals))


def read(mask_function: MaskFunction) -> Reading | None:
    """What a mask function says, or None if a Reach cannot express it, or if it cannot be told from the function."""
    part = part_of(mask_function)
    return None if part is None or part[0] not in _READERS else _READERS[part[0]](part[1])


def _sliding(variables: Any) -> Reading | None:
    size = variables["sliding_window"]
    return Reading(Reach(past=size - 1)) if size >= 0 else None


def _sliding_both_ways(variables: Any) -> Reading | None:
    # Here the window reaches `size` keys to each side, as in FlashAttention's convention.
    size = variables["sliding_window"]
    return Reading(Reach(size, size)) if size >= 0 else None


def _blocks(variables: Any) -> Reading:
    # Tokens of a block see each other; -1 is a token without a block. Text has no blocks.
    return Reading(NOTHING, (variables["block_sequence_ids"] < 0,))


def _packed(variables: Any) -> Reading:
    # Tokens of one sequence see each other. One sequence in every row hides nothing.
    of_sequence = variables["packed_sequence_mask"]
    return Reading(Reach(), (of_sequence == of_sequence[:, :1],))


def _remapped(variables: Any) -> Reading | None:
    # Positions that count up by one lie as far apart as columns do.
    inner = read(variables["mask_function"])
    return None if inner is None else Reading(inner.reach, (*inner.conditions, variables["position_ids"].diff() == 1))


def _both(variables: Any) -> Reading | None:
    return _folded(variables["mask_functions"], Reach(), Reach.met)


def _either(variables: Any) -> Reading | None:
    return _folded(variables["mask_functions"], NOTHING, Reach.joined)


def _folded(mask_functions: Any, start: Reach, fold: Callable[[Reach, Reach], Reach]) -> Reading | None:
    reach = start
    conditions: tuple[Tensor, ...] = ()
    for mask_function in mask_functions:
        part = read(mask_function)
        if part is None:
            return None
        reach, conditions = fold(reach, part.reach), (*conditions, *part.conditions)
    return Reading(reach, conditions)


_ANY = torch.zeros(1, 1, dtype=torch.long)
_NAMES = {
    build.__code__: name
    for name, build in {
        "both": and_masks(causal_mask_function),
        "either": or_masks(causal_mask_function),
        "sliding": sliding_window_overlay(1),
        "sliding both ways": sliding_window_bidirectional_overlay(1),
        "blocks": blockwise_overlay(_ANY),
        "packed": packed_sequence_mask_function(_ANY),
        "chunks": chunked_overlay(1, _ANY),
        "remapped": remap_positions_for_packed_sequence
        and remap_positions_for_packed_sequence(causal_mask_function, _ANY),
    }.items()
    if build is not None
}
"""One mask function of each kind, told by its code."""

_READERS: dict[str, Callable[[Any], Reading | None]] = {
    "causal": lambda _: Reading(Reach(future=0)),
    "all": lambda _: Reading(Reach()),
    "both": _both,
    "either": _either,
    "sliding": _sliding,
    "sliding both ways": _sliding_both_ways,
    "blocks": _blocks,
    "packed": _packed,
    "remapped": _remapped,
}
"""What reads the variables of each kind."""


def _farthest(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _nearest(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)
