"""Every pair of option values in few cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

_Slot = tuple[int, int]
"""The index of an option and of one of its values."""


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which every two values of different options meet at least once; the same cases every time.

    Greedy, as in AETG (Cohen et al., 1997): a case starts with a pair that has not met yet, and each further option
    takes the value that brings the most new pairs, of equals the one used least. A worked example:
    ``pairwise({"a": [0, 1], "b": [0, 1], "c": [0, 1]})`` needs four of the eight combinations.
    """
    names = list(options)
    slots = [[(i, j) for j in range(len(options[name]))] for i, name in enumerate(names)]
    columns = combinations_with_replacement(slots, 2)
    missing = {(x, y) for a, b in columns for x in a for y in b if a is not b or x == y}
    used: dict[_Slot, int] = {slot: 0 for column in slots for slot in column}
    cases: list[dict[str, Any]] = []
    while missing:
        case = _one_case(slots, missing, used)
        missing -= set(combinations_with_replacement(case, 2))
        for slot in case:
            used[slot] += 1
        cases.append({names[i]: options[names[i]][j] for i, j in case})
    return cases


def _one_case(slots: list[list[_Slot]], missing: set[tuple[_Slot, _Slot]], used: dict[_Slot, int]) -> tuple[_Slot, ...]:
    """One value for every option, in the order of the options."""
    chosen = {slot[0]: slot for slot in min(missing)}
    for column, values in enumerate(slots):
        if column not in chosen:

            def gain(value: _Slot) -> tuple[int, int]:
                met = sum((min(value, other), max(value, other)) in missing for other in chosen.values())
                return met, -used[value]

            chosen[column] = max(values, key=gain)
    return tuple(chosen[column] for column in range(len(slots)))
