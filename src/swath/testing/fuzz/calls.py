"""The call of a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from swath.testing.fuzz.draw import SIZES, Call, Fields, draw
from swath.testing.fuzz.extremes import known_twists
from swath.testing.fuzz.promises import PROMISES

FOR_SLOTS = {
    "dead-pages", "short-table", "hostile-indptr", "column-table", "strided-vectors", "wide-integers", "engine-table",
}  # fmt: skip
"""Twists of what ``slots`` takes."""


def suits_hopper(variant: Fields) -> bool:
    """Whether the hopper backend may take calls of a variant: it refuses most others."""
    wide = variant["dtype"] in (torch.bfloat16, torch.float16)
    attends = variant["op"] in ("attention", "paged_attention")
    square = variant["head_dim"] in (64, 128, 256) and variant.get("v_head_dim") is None
    return attends and wide and square and variant["page_size"] % 8 == 0


WANTED: dict[str, Callable[[Fields], bool]] = {"hopper": suits_hopper}
"""Which variants are drawn for a backend that refuses many."""


def call_of(seed: int, sizes: str = "medium", extreme: bool = False, impl: str = "auto") -> Call:
    """The call of a seed: its function and case, and the twists and promises that are drawn of those that fit."""
    op, case = draw(seed, SIZES[sizes], WANTED.get(impl))
    call, attends = Call(op, case, seed), op in ("attention", "paged_attention")
    twists = [
        name
        for name, one in known_twists(extreme).items()
        if (attends or (op == "slots" and name in FOR_SLOTS))
        and one.fits(case)
        and one.random(call, f"draw {name}").random() < one.share
    ]
    call = replace(call, twists=tuple(twists))
    if not attends:
        return call
    promises = [
        name
        for name, one in PROMISES.items()
        if (extreme or not one.extreme) and one.fits(call) and call.random(f"draw {name}").random() < one.share
    ]
    return replace(call, twists=(*twists, *promises))
