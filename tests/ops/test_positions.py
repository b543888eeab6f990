"""Positions, windows and counts to the ends of int32: queries see the keys that the rule says in whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from swath import KVQuant
from swath.testing import Case, Inputs

Prepare = Callable[[Case], Inputs]

TOP, BOTTOM = 2**31 - 1, -(2**31)
SHAPES = {
    "decode": Case((50, 40), 1),
    "steps": Case((50, 40), 4, dtype=torch.float32),
    "slices": Case((150, 40), 3, split_size=64),
    "tile": Case((50, 40), (20, 3)),
    "dense": Case((50, 40), (20, 3), dense=True, dtype=torch.float32),
    "copied": Case((50, 40), (130, 20), group=4, quant=KVQuant(torch.int8, "channel")),
}
STARTS = [(TOP, BOTTOM), (TOP - 2, BOTTOM + 1), (TOP - 19, -TOP), (1_900_000_000, -1_900_000_000), (45, -1)]
WINDOWS: list[tuple[int | None, int, bool]] = [
    (None, 0, True), (None, 0, False), (TOP, 0, True), (TOP, 0, False), (TOP - 10, 3, True), (2_000_000_000, 0, True),
    (2_000_000_000, 5, False), (1 << 30, 0, True), ((1 << 30) + 1, TOP, True), (8, TOP, False), (0, 7, True),
    (8, 2, True),
]  # fmt: skip
"""Size, leading keys, causal."""


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_positions_to_the_ends_of_int32(
    name: str, window: tuple[int | None, int, bool], prepare: Prepare, impl: str
) -> None:
    """Rows that stand past the largest int32 among them, as those of several steps from there."""
    size, leading, causal = window
    turn = WINDOWS.index(window) + list(SHAPES).index(name)
    for start in (STARTS[turn % 5], STARTS[(turn + 2) % 5]):
        case = replace(SHAPES[name], q_start=start, size=size, global_tokens=leading, causal=causal)
        inputs = prepare(case)
        inputs.check(*inputs.run(impl))


@pytest.mark.parametrize("name", SHAPES)
def test_counts_of_leading_keys_to_the_ends_of_int32(name: str, prepare: Prepare, impl: str) -> None:
    for counts, causal in (((TOP, BOTTOM), True), ((TOP - 1, 3), False)):
        case = replace(SHAPES[name], size=5, global_tokens=counts, causal=causal, q_start=(TOP, 30))
        inputs = prepare(case)
        inputs.check(*inputs.run(impl))


@pytest.mark.parametrize("length", [TOP, 1 << 30])
@pytest.mark.parametrize("name", ["decode", "steps", "slices", "tile"])
def test_lengths_to_the_end_of_int32(name: str, length: int, prepare: Prepare, impl: str) -> None:
    """As far as pages go: the keys that the table has none for are not visible."""
    case = SHAPES[name]
    inputs = prepare(replace(case, q_start=tuple(case.first_position(b) for b in range(case.num_seqs))))
    truth = inputs.truth()
    inputs.seq_lens.fill_(length)
    inputs.check(*inputs.run(impl), truth)
