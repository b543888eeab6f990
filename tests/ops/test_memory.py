"""Where keys and queries lie: any strides, entries that name no page, pools and contexts larger than what is read.

tests/backends/test_cpu.py and, on a GPU, test_gpu.py show what a call allocates.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pools import in_a_large_pool

from conftest import Prepare, check, each_backend
from swath import KVQuant
from swath.testing import Case

INT8_TOKEN, INT8_CHANNEL = KVQuant(torch.int8, "token"), KVQuant(torch.int8, "channel")

serving = each_backend("attention", but=("reference",))


@pytest.mark.parametrize("case", [Case(), Case(q_lens=5), Case(q_lens=(5, 0, 40)), Case(q_lens=(5, 0, 40), dense=True)],
                         ids=str)  # fmt: skip
def test_strides_come_from_the_tensors(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(replace(case, strided=True))
    assert not inputs.q.is_contiguous()
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


@pytest.mark.parametrize("layout", ["padded", "packed", "nhd"])
@pytest.mark.parametrize("quant", [None, INT8_TOKEN], ids=["bf16", "int8"])
@pytest.mark.parametrize("q_lens", [1, (60, 1, 2)], ids=str)
def test_caches_that_are_views(
    q_lens: int | tuple[int, ...], quant: KVQuant | None, layout: str, prepare: Prepare, impl: str
) -> None:
    check(prepare(Case(q_lens=q_lens, quant=quant, layout=layout, size=30)), impl)


@pytest.mark.parametrize("steps", [3, 5, 6, 7])
def test_steps_that_are_no_power_of_two(steps: int, prepare: Prepare, impl: str) -> None:
    """Loads and stores are masked: the rows around out survive."""
    inputs = prepare(Case(q_lens=steps, group=3, size=20))
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


@pytest.mark.parametrize("entry", [-1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("q_lens", [1, 4, (60, 1, 2)], ids=str)
def test_hostile_entries_are_never_read(q_lens: int | tuple[int, ...], entry: int, prepare: Prepare, impl: str) -> None:
    """Pages without a visible key are poison, and every entry that names none of the pool is ``entry``."""
    inputs = prepare(Case((170, 33, 129), q_lens, size=30))
    table = inputs.block_table
    table[(table < 0) | (table >= inputs.cache.num_pages)] = entry
    check(inputs, impl)


@serving
def test_a_pool_much_larger_than_the_pages_of_a_call(prepare: Prepare, impl: str) -> None:
    """All other pages are poison."""
    check(in_a_large_pool(prepare(Case(q_lens=(60, 1, 100), quant=INT8_CHANNEL)), 4000), impl)


LONG = Case((64_000,), size=100, bounds="tight")
INT8_LONG, LEADING_LONG = replace(LONG, quant=INT8_TOKEN), replace(LONG, global_tokens=4)


@serving
@pytest.mark.parametrize(
    "case",
    [
        INT8_LONG,
        replace(INT8_LONG, q_lens=4),
        replace(INT8_LONG, q_lens=(30,)),
        LEADING_LONG,
        replace(LEADING_LONG, q_lens=(30,)),
        Case((2**20, 5), 2, size=1000, num_kv_heads=1, group=64, split_size=256, bounds="tight"),
    ],
    ids=str,
)
def test_a_context_much_longer_than_the_window(case: Case, prepare: Prepare, impl: str) -> None:
    """Pages behind the window are freed, and their entries name no page."""
    check(prepare(case), impl)
