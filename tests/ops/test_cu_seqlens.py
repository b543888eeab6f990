"""cu_seqlens_q that starts late or ends early: rows that no sequence owns are neither read nor written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import swath
from swath import KVQuant
from swath.testing import Case, Inputs

Prepare = Callable[..., Inputs]

CASES = {
    "chunks": Case((170, 60, 90), (70, 33, 5), size=30, dtype=torch.float16),
    "no window": Case((170, 60, 90), (70, 33, 40), dtype=torch.float16),
    "packed heads": Case((90, 60), (70, 33), group=8, num_kv_heads=1, size=20, global_tokens=3),
    "8 bits": Case((60, 70), (45, 40), quant=KVQuant(torch.int8, "token"), group=4, num_kv_heads=1),
    "decode": Case((170, 33, 129), (1, 0, 3), size=30),
    "dense": Case((70, 100, 69), (5, 33, 40), size=40, dense=True),
    "dense, both sides": Case((70, 100), (70, 100), size=9, causal=False, dense=True),
}


@pytest.mark.parametrize("late", [1, 31, 40, 200])
@pytest.mark.parametrize("name", CASES)
def test_rows_before_the_first_sequence_are_left_alone(name: str, late: int, prepare: Prepare, impl: str) -> None:
    """Work is cut at multiples of a tile from row 0 on, so that tiles before the first sequence exist."""
    inputs = prepare(CASES[name])
    nothing = torch.full_like(inputs.q[:1].expand(late, -1, -1), torch.nan)
    cu = inputs.cu_seqlens_q + late
    args = (torch.cat([nothing, inputs.q]), *inputs.args[1:])
    options = inputs.options
    if inputs.case.dense:
        args = (*args[:3], cu, args[4])
    else:
        options |= {"cu_seqlens_q": cu}
    out = torch.full_like(args[0], -7.25)
    public = swath.attention if inputs.case.dense else swath.paged_attention
    _, lse = public(*args, **options | {"max_q_len": None}, out=out, return_lse=True, impl=impl)
    assert (out[:late] == -7.25).all()
    inputs.check(out[late:], lse[late:])
