"""Large heads, and values that are narrower than keys, lie otherwise in memory, or are a view of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import Prepare, check
from swath import KVQuant, PagedKV, attention, merge_states, paged_attention
from swath import check as check_table
from swath.testing import Case

SHAPES = {
    "512": Case(head_dim=512),
    "512/256": Case(head_dim=512, v_head_dim=256),
    "192/128": Case(head_dim=192, v_head_dim=128),
    "256/64": Case(head_dim=256, v_head_dim=64),
    "264/8 apart": Case(head_dim=264, v_head_dim=8, layout="apart"),
    "64 apart": Case(layout="apart"),
}
CALLS = {
    "steps": Case((97, 130, 4), 4, size=33, global_tokens=2, split_size=64, sink="fp32"),
    "decode, int8": Case((97, 130, 1), size=33, quant=KVQuant(torch.int8, "token", "channel"), holes=True),
    "prefill": Case((130, 67, 16), (130, 20, 3), size=17, global_tokens=(1, 20, 0)),
    "dense": Case((130, 67, 16), (130, 20, 3), dense=True, size=40, softcap=5.0),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_edges(shape: str, call: str, prepare: Prepare, impl: str) -> None:
    """Spiked keys on both sides of each edge; no slot is read that no row sees, nothing beside ``out`` is written."""
    of = SHAPES[shape]
    case = replace(CALLS[call], head_dim=of.head_dim, v_head_dim=of.v_head_dim, layout=of.layout, spiked=True)
    inputs = prepare(replace(case, num_kv_heads=1))
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


@pytest.mark.parametrize("group", [3, 64])
def test_64_query_heads_of_512(group: int, prepare: Prepare, impl: str) -> None:
    check(prepare(Case((90, 300), num_kv_heads=1, group=group, head_dim=512, size=128, sink="q")), impl)


@pytest.mark.parametrize("q_lens", [1, (20, 1, 5)], ids=str)
def test_values_may_be_the_first_elements_of_keys(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=q_lens, head_dim=192, v_head_dim=128))
    cache = PagedKV(inputs.cache.k, inputs.cache.k[..., :128])
    inputs = replace(inputs, keys=cache)
    inputs.check(*inputs.run(impl))


def test_states_of_narrow_values_merge(prepare: Prepare, impl: str) -> None:
    """Two halves of the pages, as two calls, make the whole."""
    inputs = prepare(Case((128,), head_dim=192, v_head_dim=128, dtype=torch.float32, spiked=True))
    lens = torch.tensor([64], dtype=torch.int32, device=inputs.q.device)
    tables = inputs.block_table[:, :4], inputs.block_table[:, 4:]
    parts = [
        paged_attention(inputs.q, inputs.cache, table, lens, return_lse=True, q_start=lens + 64, impl=impl)
        for table in tables
    ]
    inputs.check(*merge_states(*parts[0], *parts[1]))


def test_the_result_has_rows_of_v(impl: str) -> None:
    if impl not in ("reference", "cpu"):
        pytest.skip("the door is one for all backends")
    q, cu = torch.zeros(3, 4, 192), torch.tensor([0, 3], dtype=torch.int32)
    assert attention(q, q[:, :2], q[:, :2, :128], cu, cu, impl=impl).shape == (3, 4, 128)
    cache = PagedKV.empty(torch.float32, 1, 2, 16, 192, v_head_dim=64)
    check_table(cache, cu[:1, None], cu[1:])
    for shape in ((1, 4), (1, 1, 4)):
        out, lse = paged_attention(q.new_zeros(*shape, 192), cache, cu[:1, None], cu[1:], return_lse=True, impl=impl)
        assert (out.shape, lse.shape) == ((*shape, 64), shape)
