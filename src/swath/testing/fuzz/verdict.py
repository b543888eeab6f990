"""What can be said about a call: who ran it, and what was wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swath import dispatch
from swath.errors import bad_value
from swath.ops.explain import OPERATORS, explain
from swath.testing.fuzz.draw import Call
from swath.testing.inputs import Inputs
from swath.testing.oracle import Truth


class BrokenError(Exception):
    """Something that a call did not hold to: its error budget, or another promise."""

    def __init__(self, fault: str, kind: str = "promise") -> None:
        super().__init__(fault)
        self.kind = kind


def demand_within_budget(inputs: Inputs, out: Tensor, lse: Tensor | None, truth: Truth, what: str = "") -> float:
    """Every element is within its error budget: the share of it that the worst one uses.

    Raises:
        BrokenError: with the worst element, and ``what`` came before it.
    """
    try:
        return inputs.check(out, lse, truth)
    except AssertionError as error:
        raise BrokenError(f"{what}{error}", "budget") from None


@dataclass(frozen=True)
class Verdict:
    """What came of a call.

    backend: who ran it, "" where it was refused. kind: "" where all is right, else what sort of fault. used: the share
    of its error budget that the worst element took.
    """

    backend: str
    kind: str = ""
    fault: str = ""
    used: float = 0.0


PARTIAL = ("hopper",)
"""Backends that may refuse calls; the others take every one."""


def taker(op: str, args: tuple[Any, ...], options: dict[str, Any], impl: str) -> str:
    """The backend that runs a call under ``impl``, "" for a partial backend that refuses it.

    An operator that ``impl`` does not have runs on what "auto" finds.
    """
    has = impl == "auto" or impl in dispatch.backends(OPERATORS[op].module)
    explained = explain(op, *args, **options, impl=impl if has else "auto")
    if explained.backend is None and impl not in PARTIAL:
        raise bad_value("impl", f"a call that {impl} takes", explained.reasons.get(impl, explained.reasons))
    return explained.backend or ""


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes, in whatever strides."""
    return torch.equal(*(t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (x, y)))


def truncates_bf16(backend: str, device: torch.device | str) -> bool:
    """Triton's interpreter cuts fp32 to bf16 where GPUs round."""
    return backend == "triton" and torch.device(device).type == "cpu"


def numbers(call: Call, name: str) -> torch.Generator:
    """Random numbers for one purpose of a call."""
    return torch.Generator().manual_seed(call.random(name).getrandbits(60))
