"""cu_seqlens that lie: nothing outside ``out`` is written, nothing outside q, K and V is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from swath import KVQuant
from swath.testing import Case, Inputs
from swath.testing.inputs import SENTINEL

Prepare = Callable[[Case], Inputs]

ROWS = 70
"""Of q: T."""
TOP, BOTTOM = 2**31 - 1, -(2**31)
BASE = Case((90, 40, 64), (ROWS - 8, 3, 5), num_kv_heads=1)
CASES = {
    "tiles": BASE,
    "tiles of float32": replace(BASE, dtype=torch.float32, size=30),
    "dense": replace(BASE, dense=True, size=18),
    "slices": replace(BASE, split_size=64, size=50, sink="fp32"),
    "copied": replace(BASE, group=10, quant=KVQuant(torch.int8, "channel")),
}
IN_ORDER = {
    "beyond the end": (0, 8, 11, 4000),
    "far beyond the end": (0, 8, 11, TOP),
    "all beyond the end": (ROWS, ROWS + 1, 500, TOP),
    "late": (66, 67, 69, ROWS),
    "late, a sequence of many rows": (66, 67, 69, TOP),
    "below 0": (-40, 5, 8, ROWS),
    "far below 0": (BOTTOM, -5, 8, 11),
    "all below 0": (BOTTOM, -9, -5, -1),
}
OUT_OF_ORDER = {
    "back to 0": (0, 40, 0, ROWS),
    "back and beyond": (60, 2, TOP, 3),
    "down": (TOP, 30, 5, BOTTOM),
    "up and down": (BOTTOM, TOP, BOTTOM, TOP),
}


def surrounded(inputs: Inputs, bounds: tuple[int, ...]) -> Inputs:
    """The call with these bounds, q amid rows of NaN. Slots that no query saw before hold numbers: now some may."""
    for x in inputs.dense if inputs.case.dense else (inputs.cache.k, inputs.cache.v):
        if x.dtype.is_floating_point:
            x.copy_(x.nan_to_num(0.5))
    around = torch.full((3 * ROWS, *inputs.q.shape[1:]), torch.nan, dtype=inputs.q.dtype, device=inputs.q.device)
    around[ROWS : 2 * ROWS] = inputs.q
    cu = torch.tensor(bounds, dtype=torch.int32, device=inputs.q.device)
    return replace(inputs, q=around[ROWS : 2 * ROWS], cu_seqlens_q=cu)


@pytest.mark.parametrize("bounds", IN_ORDER)
@pytest.mark.parametrize("name", CASES)
def test_query_bounds_are_cut_to_the_rows_there_are(name: str, bounds: str, prepare: Prepare, impl: str) -> None:
    inputs = surrounded(prepare(CASES[name]), IN_ORDER[bounds])
    canary = inputs.canary()
    out, lse = inputs.run(impl, out=canary.out)
    assert canary.broken() == 0
    cut = inputs.cu_seqlens_q.clamp(0, ROWS)
    owned = torch.arange(ROWS, device=out.device)
    owned = (owned >= cut[0]) & (owned < cut[-1])
    assert (out[~owned] == SENTINEL).all()
    inputs.check(out, lse, replace(inputs, cu_seqlens_q=cut).truth())


@pytest.mark.parametrize("bounds", OUT_OF_ORDER)
@pytest.mark.parametrize("name", CASES)
def test_query_bounds_in_no_order_harm_nobody(name: str, bounds: str, prepare: Prepare, impl: str) -> None:
    """Which sequence a row of several belongs to is not defined, but that it is one of them."""
    inputs = surrounded(prepare(CASES[name]), OUT_OF_ORDER[bounds])
    canary = inputs.canary()
    out, _ = inputs.run(impl, out=canary.out)
    assert canary.broken() == 0
    assert not out.isnan().any()


@pytest.mark.parametrize("bounds", [(0, 90, 130, 150), (0, 90, 130, TOP), (150, 160, 170, TOP), (-3, 90, 130, 194),
                                    (0, 40, 20, 194), (TOP, BOTTOM, 0, 50)], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [None, 18])
def test_key_bounds_are_cut_to_the_keys_there_are(
    size: int | None, bounds: tuple[int, ...], prepare: Prepare, impl: str
) -> None:
    """Positions are what the bounds say; the keys that do not exist are not visible, as beyond a page table."""
    inputs = prepare(replace(BASE, dense=True, size=size, causal=False, dtype=torch.float32))
    keys = []
    for x in inputs.dense:
        around = torch.full((len(x) + 600, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
        around[300:-300] = torch.where(x.isnan(), 0.5, x)
        keys.append(around[300:-300])
    cu = torch.tensor(bounds, dtype=torch.int32, device=inputs.q.device)
    q_start = torch.tensor((28, 37, 59), dtype=torch.int32, device=inputs.q.device)
    call = replace(inputs, keys=tuple(keys), cu_seqlens_k=cu, q_start=q_start)
    out, lse = call.run(impl)
    row = 0
    for b, count in enumerate(BASE.row_counts):
        first = max(bounds[b], 0)
        length = max(bounds[b + 1] - first, 0)
        own = tuple(x[first : first + length] for x in keys)
        own_k, own_q = (torch.tensor([0, n], dtype=torch.int32, device=cu.device) for n in (len(own[0]), count))
        rows = slice(row, row + count)
        alone = replace(
            call, q=call.q[rows], keys=own, cu_seqlens_k=own_k, cu_seqlens_q=own_q, q_start=q_start[b : b + 1]
        )
        alone.check(out[rows], lse[rows])
        row += count
