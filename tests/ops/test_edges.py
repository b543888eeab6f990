"""Where kernels break: window, page and split edges, empty rows, hostile tables, poison, very large caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import Prepare, check
from swath import PagedKV, paged_attention
from swath.quant import KVQuant
from swath.testing import Case

INT8_TOKEN = KVQuant(torch.int8, "token")
E4M3_TOKEN = KVQuant(torch.float8_e4m3fn, "token")
STORED = [None, INT8_TOKEN, KVQuant(torch.int8, "channel", "head"), E4M3_TOKEN]
AROUND_BLOCKS = (*range(14, 19), *range(62, 67), *range(126, 131))
"""Lengths around the sizes of pages, key blocks and splits."""


@pytest.mark.parametrize("quant", [None, INT8_TOKEN], ids=["bf16", "int8"])
@pytest.mark.parametrize(
    ("steps", "group"), [*((s, 3) for s in range(1, 9)), *((s, g) for s in (1, 4, 7) for g in (1, 5, 7, 8, 64))]
)
def test_every_step_has_its_own_edges(
    steps: int, group: int, quant: KVQuant | None, prepare: Prepare, impl: str
) -> None:
    lengths = (97, 130, steps)
    case = Case(lengths, q_lens=steps, size=33, global_tokens=2, group=group, split_size=64, spiked=True, quant=quant)
    check(prepare(replace(case, num_kv_heads=1) if group == 64 else case), impl)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("q_lens", [1, 2, (20,)], ids=str)
def test_64_query_heads_on_one_kv_head(
    q_lens: int | tuple[int, ...], head_dim: int, prepare: Prepare, impl: str
) -> None:
    check(prepare(Case((90,), q_lens, num_kv_heads=1, group=64, head_dim=head_dim)), impl)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65])
def test_window_edges_on_page_and_split_edges(size: int, prepare: Prepare, impl: str) -> None:
    check(prepare(Case(AROUND_BLOCKS, size=size, split_size=64, spiked=True, num_kv_heads=1)), impl)


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 100, None])
@pytest.mark.parametrize("leading", [0, 1, 16, 20])
def test_prefill_edges(leading: int, size: int | None, dense: bool, prepare: Prepare, impl: str) -> None:
    lengths, rows = (130, 67, 16), (130, 20, 3)
    check(prepare(Case(lengths, rows, size=size, global_tokens=leading, dense=dense, spiked=True)), impl)


@pytest.mark.parametrize("page_size", [1, 8, 16, 48, 64, 544, 1024])
@pytest.mark.parametrize("quant", STORED, ids=str)
def test_every_page_size_with_partial_pages(page_size: int, quant: KVQuant | None, prepare: Prepare, impl: str) -> None:
    p = page_size
    lengths = (p, p + 1, max(p - 1, 0), 2 * p, 5)
    check(prepare(Case(lengths, size=p + 3, page_size=p, quant=quant, spiked=True, num_kv_heads=1)), impl)


@pytest.mark.parametrize("sink", ["none", "fp32"])
@pytest.mark.parametrize("quant", [None, INT8_TOKEN], ids=["bf16", "int8"])
@pytest.mark.parametrize("q_lens", [1, 5, (9, 4, 0, 3)], ids=str)
def test_rows_without_keys_are_zero(
    q_lens: int | tuple[int, ...], quant: KVQuant | None, sink: str, prepare: Prepare, impl: str
) -> None:
    """Lengths 0 and below, more queries than keys; a NaN left in ``out`` must not survive."""
    inputs = prepare(Case((0, -7, 3, 2), q_lens, quant=quant, sink=sink, size=2))
    out, lse = inputs.run(impl, out=torch.full(inputs.q.shape, torch.nan, dtype=torch.bfloat16, device=inputs.q.device))
    truth = inputs.truth()
    inputs.check(out, lse, truth)
    empty = truth.keys[:, 0] == 0
    assert empty.any()
    assert not out.reshape(-1, *out.shape[-2:])[empty].any()
    wanted = inputs.sink if sink == "fp32" else torch.tensor(-torch.inf, device=lse.device)
    torch.testing.assert_close(lse.reshape(-1, lse.shape[-1])[empty], wanted.expand(int(empty.sum()), lse.shape[-1]))


def test_rows_of_a_dense_sequence_without_keys_are_zero(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((20, 0, 64), (3, 1, 40), dense=True))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    assert not out[3].any()
    assert (lse[3] == -torch.inf).all()


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
def test_window_of_no_keys(dense: bool, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=(5, 2, 40), size=0, dense=dense))
    out, lse = inputs.run(impl)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("q_lens", [1, 3, (40, 3, 1)], ids=str)
def test_batch_of_nothing(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    """No sequences, and sequences without rows."""
    none = prepare(Case((), q_lens if isinstance(q_lens, int) else ()))
    out, lse = none.run(impl)
    assert out.shape == none.q.shape
    assert lse.numel() == 0
    if isinstance(q_lens, tuple):
        out, _ = prepare(Case(q_lens=(0, 0, 0))).run(impl)
        assert out.shape[0] == 0


@pytest.mark.parametrize("quant", [None, INT8_TOKEN, KVQuant(torch.int8, "channel")], ids=str)
@pytest.mark.parametrize("steps", [1, 8])
def test_scores_that_rise_from_key_to_key(steps: int, quant: KVQuant | None, prepare: Prepare, impl: str) -> None:
    """By 40 over all keys: a maximum that is kept for some time is too small again and again, but never by much."""
    length = 700
    inputs = prepare(Case((length,), q_lens=steps, num_kv_heads=1, quant=quant))
    position = torch.arange(length)
    page = inputs.block_table[0].cpu()[position // inputs.cache.page_size].long()
    rising = (100 * (position + 1) / length).round()[:, None, None].expand(-1, 1, inputs.q.shape[-1])
    slots = page.to(inputs.q.device), slice(None), (position % inputs.cache.page_size).to(inputs.q.device)
    inputs.cache.k[slots] = rising.to(inputs.cache.k)
    if inputs.cache.k_scale is not None:
        inputs.cache.k_scale.fill_(1)
    inputs.q.fill_(0.4 / inputs.q.shape[-1] ** 0.5)
    check(inputs, impl)


@pytest.mark.parametrize("table", ["rectangular", "flat"])
@pytest.mark.parametrize("quant", STORED, ids=str)
@pytest.mark.parametrize("q_lens", [(3, 40, 0), (40, 3, 0)], ids=str)
def test_hostile_entries_inside_the_window(
    q_lens: tuple[int, ...], quant: KVQuant | None, table: str, prepare: Prepare, impl: str
) -> None:
    """The keys of an entry outside the pool are not visible; all others are."""
    check(prepare(Case((300, 64, 40), q_lens, size=200, quant=quant, table=table, holes=True, spiked=True)), impl)


@pytest.mark.parametrize("entry", [-1, 2**31 - 1, -(2**31), "num_pages"])
def test_table_of_hostile_entries_only(entry: int | str, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=2))
    inputs.block_table.fill_(inputs.cache.num_pages if entry == "num_pages" else entry)
    out, lse = inputs.run(impl)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("q_lens", [1, (1, 30, 70)], ids=str)
def test_keys_beyond_the_table_are_not_visible(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=q_lens, size=80))
    cut = replace(inputs, block_table=inputs.block_table[:, :3])
    check(cut, impl)


@pytest.mark.parametrize("quant", STORED, ids=str)
@pytest.mark.parametrize("q_lens", [1, 4, (3, 50, 17)], ids=str)
def test_nan_in_one_sequence_stays_there(
    q_lens: int | tuple[int, ...], quant: KVQuant | None, prepare: Prepare, impl: str
) -> None:
    """Values, scales and queries of sequence 1 turn to NaN: not a bit of the others changes."""
    inputs = prepare(Case((70, 90, 33), q_lens, size=40, quant=quant))
    clean, clean_lse = inputs.run(impl)
    cache, ids = inputs.cache, inputs.block_table[1].long()
    ids = ids[(ids >= 0) & (ids < cache.num_pages)]
    for values, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        values[ids] = -128 if values.dtype == torch.int8 else torch.nan
        if scale is not None and scale.dim() == 3:
            scale[ids] = torch.nan
    rows = slice(1, 2) if isinstance(q_lens, int) else slice(3, 53)
    inputs.q[rows] = torch.nan
    out, lse = inputs.run(impl)
    others = torch.ones(out.shape[0], dtype=torch.bool)
    others[rows] = False
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse[others], clean_lse[others])


@pytest.mark.parametrize("size", [None, 20])
def test_nan_in_one_dense_sequence_stays_there(size: int | None, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((70, 90, 33), (3, 50, 17), size=size, dense=True))
    clean, clean_lse = inputs.run(impl)
    for x in (*inputs.keys, inputs.q):
        bounds = inputs.cu_seqlens_q if x is inputs.q else inputs.cu_seqlens_k
        x[bounds[1] : bounds[2]] = torch.nan
    out, lse = inputs.run(impl)
    others = torch.ones(out.shape[0], dtype=torch.bool)
    others[3:53] = False
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse[others], clean_lse[others])


@pytest.mark.parametrize("q_lens", [3, (1, 0, 70)], ids=str)
def test_views_of_any_stride(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    """q kept head by head, out inside a wider tensor: only the last stride is 1."""
    inputs = prepare(Case(q_lens=q_lens, tail=0))
    turned = replace(inputs, q=inputs.q.transpose(-3, -2).contiguous().transpose(-3, -2))
    canary = turned.canary()
    out, lse = turned.run(impl, out=canary.out)
    turned.check(out, lse)
    assert out.data_ptr() == canary.out.data_ptr()
    assert canary.broken() == 0


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_cache_of_more_than_2_31_elements(granularity: str, prepare: Prepare, impl: str) -> None:
    """Pages on both sides of element 2^31: a 32-bit offset would read elsewhere. Only a few pages are ever touched."""
    small = prepare(Case((50,), head_dim=256, num_kv_heads=1, page_size=16, quant=KVQuant(torch.int8, granularity)))
    cache, device = small.cache, small.q.device
    num_pages = 2**31 // (16 * 512) + 4
    packed = torch.empty(num_pages, 16, 1, 512, dtype=torch.int8, device=device)
    at = torch.tensor([num_pages - 1, 0, 2**31 // (16 * 512) - 1, num_pages - 2], device=device)
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    if granularity == "token":
        scales = {name: torch.empty(num_pages, 16, 1, device=device) for name in scales}
    big = PagedKV.from_packed(packed, **scales)
    ids = small.block_table[0, :4].long()
    for wide, narrow in ((big.k, cache.k), (big.v, cache.v)):
        wide[at] = narrow[ids]
    if granularity == "token":
        big.k_scale[at], big.v_scale[at] = cache.k_scale[ids], cache.v_scale[ids]
    result = paged_attention(small.q, big, at[None].int(), small.seq_lens, return_lse=True, impl=impl)
    small.check(*result)
