"""NaN and infinities in K, V and their scales reach no row that may not see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import PORTABLE
from swath import KVQuant
from swath.testing import Case, Inputs, visible

Prepare = Callable[[Case], Inputs]

KEY = 61
"""Of 70: under a window of 9 some rows come before it, some see it, and it has left the window of the last."""
F32, INT8, E5M2 = torch.float32, torch.int8, torch.float8_e5m2
STEPS, TILE, DENSE = (
    Case((70,), q_lens, size=size, dense=dense, num_kv_heads=1)
    for q_lens, size, dense in ((16, 9, False), ((20,), 9, False), ((20,), 9, True))
)
STORED = {
    "steps": STEPS,
    "steps in float32": replace(STEPS, dtype=F32),
    "steps over int8": replace(STEPS, quant=KVQuant(INT8, "token"), dtype=F32),
    "steps over fp8": replace(STEPS, quant=KVQuant(E5M2, "token", "channel")),
    "tile": replace(TILE, global_tokens=2),
    "tile to both sides": replace(TILE, causal=False, quant=KVQuant(E5M2, "none")),
    "dense": DENSE,
    "dense to both sides": replace(DENSE, causal=False, softcap=5.0),
}


def poison(inputs: Inputs, of_v: bool, value: float) -> None:
    """Make the row of ``KEY`` of K or V this value; of int8, whose values are finite, its token scale."""
    if inputs.case.dense:
        inputs.dense[of_v][KEY] = value
        return
    cache = inputs.cache
    page, slot = int(inputs.block_table[0, KEY // cache.page_size]), KEY % cache.page_size
    stored, scale = ((cache.k, cache.k_scale), (cache.v, cache.v_scale))[of_v]
    if stored.dtype == INT8:
        scale[page, :, slot] = value
    else:
        stored[page, :, slot] = torch.tensor(value).to(stored.dtype)


def rows_that_see(case: Case, device: torch.device) -> Tensor:
    positions = torch.arange(case.row_counts[0], device=device) + case.first_position(0)
    return visible(positions, torch.tensor([KEY], device=device), case.size, case.leading(0), case.causal)[:, 0]


def by_row(x: Tensor, case: Case) -> Tensor:
    return x.reshape(case.row_counts[0], case.num_q_heads, -1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_a_key_reaches_the_rows_that_see_it(name: str, value: float, prepare: Prepare, impl: str) -> None:
    """The others keep every bit."""
    case = STORED[name]
    inputs = prepare(case)
    clean = [by_row(x, case) for x in inputs.run(impl)]
    poison(inputs, False, value)
    got = [by_row(x, case) for x in inputs.run(impl)]
    see = rows_that_see(case, inputs.q.device)
    assert 0 < see.sum() < len(see)
    for x, y in zip(got, clean, strict=True):
        assert torch.equal(x[~see], y[~see])
    if value != value:
        assert got[0][see].isnan().all()
        assert got[1][see].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_a_value_reaches_the_rows_that_see_its_key(name: str, value: float, prepare: Prepare, impl: str) -> None:
    """Not others, as a product of 0 with it would; those as float64 says, infinite or NaN. LSEs keep every bit."""
    case = STORED[name]
    if impl not in PORTABLE:
        pytest.skip("tensor cores multiply a tile of rows, and 0 x NaN is NaN: docs/semantics.md says so")
    inputs = prepare(case)
    clean, clean_lse = (by_row(x, case) for x in inputs.run(impl))
    poison(inputs, True, value)
    out, lse = (by_row(x, case) for x in inputs.run(impl))
    see = rows_that_see(case, inputs.q.device)
    assert torch.equal(out[~see], clean[~see])
    assert torch.equal(lse, clean_lse)
    wanted, _ = inputs.run("reference")
    assert torch.equal(by_row(wanted, case)[see].nan_to_num(1, 2, 3), out[see].nan_to_num(1, 2, 3))
    assert not out[see].isfinite().any()
