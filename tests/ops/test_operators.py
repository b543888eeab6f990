"""Attention against the float64 truth: every option alone and in pairs, for every backend that exists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from options import DENSE, PAGED, alone, in_pairs

from swath.testing import Case, Inputs

Prepare = Callable[[Case], Inputs]


def within_budget(inputs: Inputs, impl: str) -> None:
    """Right in every element, and nothing written but the rows that sequences own."""
    canary = inputs.canary() if inputs.case.strided else None
    out, lse = inputs.run(impl, out=None if canary is None else canary.out)
    inputs.check(out, lse)
    assert canary is None or canary.broken() == 0


@pytest.mark.parametrize("case", alone(PAGED), ids=str)
def test_paged_option_alone(case: Case, prepare: Prepare, impl: str) -> None:
    within_budget(prepare(case), impl)


@pytest.mark.parametrize("case", in_pairs(PAGED), ids=str)
def test_paged_options_in_pairs(case: Case, prepare: Prepare, impl: str) -> None:
    within_budget(prepare(case), impl)


@pytest.mark.parametrize("case", alone(DENSE, dense=True, q_lens=(5, 33, 60)), ids=str)
def test_dense_option_alone(case: Case, prepare: Prepare, impl: str) -> None:
    within_budget(prepare(case), impl)


@pytest.mark.parametrize("case", in_pairs(DENSE, dense=True), ids=str)
def test_dense_options_in_pairs(case: Case, prepare: Prepare, impl: str) -> None:
    within_budget(prepare(case), impl)
