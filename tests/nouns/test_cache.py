"""Paged caches and page tables: views, copies, slots, and check()."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swath import KVQuant, PagedKV, Window, check, slots
from swath.pages import pages_holding, pages_within
from swath.testing import Case, make

PAGES, SIZE, HEADS, DIM = 3, 16, 2, 32
INT8_TOKEN = KVQuant(torch.int8, "token")


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def int32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("size", [1, 8, 16])
def test_which_pages_hold_which_keys(size: int) -> None:
    every = range(4 * size)
    for start in every:
        for stop in every[start + 1 :]:
            pages = [range(page * size, (page + 1) * size) for page in range(4)]
            holding = [i for i, page in enumerate(pages) if any(start <= key < stop for key in page)]
            within = [i for i, page in enumerate(pages) if all(start <= key < stop for key in page)]
            assert list(range(4))[pages_holding(start, stop, size)] == holding
            assert list(range(4))[pages_within(start, stop, size)] == within


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_memory_of_its_own(copied: Callable[[PagedKV], PagedKV]) -> None:
    cache = PagedKV.empty(KVQuant(torch.int8, "token"), PAGES, HEADS, SIZE, DIM)
    assert cache.holds(cache.k)
    other = copied(cache)
    assert other.quant == cache.quant
    assert [other.holds(x) for x in (cache.k, cache.v, other.k, other.v)] == [False, False, True, True]


def test_from_nhd_is_a_view() -> None:
    k, v = numbered(PAGES, SIZE, HEADS, DIM), -numbered(PAGES, SIZE, HEADS, DIM)
    cache = PagedKV.from_nhd(k, v)
    assert (cache.num_pages, cache.num_kv_heads, cache.page_size, cache.head_dim) == (PAGES, HEADS, SIZE, DIM)
    assert torch.equal(cache.k[1, 0, 7], k[1, 7, 0])
    assert cache.k.data_ptr() == k.data_ptr()
    assert cache.v.data_ptr() == v.data_ptr()


def test_from_packed_is_a_view_of_both() -> None:
    kv = numbered(PAGES, SIZE, HEADS, 2 * DIM)
    cache = PagedKV.from_packed(kv)
    assert torch.equal(cache.k[2, 1, 5], kv[2, 5, 1, :DIM])
    assert torch.equal(cache.v[2, 1, 5], kv[2, 5, 1, DIM:])
    assert cache.k.data_ptr() == kv.data_ptr()
    assert cache.v.untyped_storage().data_ptr() == kv.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_rows_of_v_may_be_shorter(layout: str) -> None:
    kv = numbered(PAGES, SIZE, HEADS, DIM + 8)
    cache = PagedKV.from_packed(kv if layout == "nhd" else kv.transpose(1, 2), layout=layout, v_head_dim=8)
    assert (cache.head_dim, cache.v_head_dim) == (DIM, 8)
    assert torch.equal(cache.k[2, 1, 5], kv[2, 5, 1, :DIM])
    assert torch.equal(cache.v[2, 1, 5], kv[2, 5, 1, DIM:])
    by_token = PagedKV.from_nhd(kv[..., :DIM], kv[..., DIM:])
    assert torch.equal(by_token.v, cache.v)
    assert f"head_dim={DIM}, v_head_dim=8, " in repr(cache)
    empty = PagedKV.empty(INT8_TOKEN, PAGES, HEADS, SIZE, DIM, v_head_dim=8)
    assert (empty.k.shape[3], empty.v.shape) == (DIM, (PAGES, HEADS, SIZE, 8))
    assert empty.nbytes == PAGES * SIZE * INT8_TOKEN.bytes_per_token(HEADS, DIM, 8)


def test_from_aiter_takes_shorter_rows_of_v() -> None:
    k, v = numbered(PAGES, HEADS, DIM // 4, SIZE, 4), numbered(PAGES, HEADS, 8, SIZE)
    cache = PagedKV.from_aiter(k, v)
    assert (cache.head_dim, cache.v_head_dim) == (DIM, 8)
    assert torch.equal(cache.v[2, 1, 5], v[2, 1, :, 5])


@pytest.mark.parametrize("by_token", [False, True])
def test_from_packed_by_head_is_a_view_of_any_strides(by_token: bool) -> None:
    """vLLM gives its tensor the same shape in every layout, and says the layout by strides."""
    shape = (PAGES, SIZE, HEADS, 2 * DIM) if by_token else (PAGES, HEADS, SIZE, 2 * DIM)
    memory = numbered(*shape)
    kv = memory.transpose(1, 2) if by_token else memory
    scale = numbered(PAGES, HEADS, SIZE)
    cache = PagedKV.from_packed(kv.to(torch.int8), layout="hnd", k_scale=scale, v_scale=scale)
    assert (cache.num_kv_heads, cache.page_size, cache.quant) == (HEADS, SIZE, INT8_TOKEN)
    assert cache.k_scale is scale
    cache = PagedKV.from_packed(kv, layout="hnd")
    assert torch.equal(cache.k[2, 1, 5], kv[2, 1, 5, :DIM])
    assert torch.equal(cache.v[2, 1, 5], kv[2, 1, 5, DIM:])
    assert cache.k.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize("build", ["nhd", "packed"])
def test_token_scales_come_page_by_token(build: str) -> None:
    scale = numbered(PAGES, SIZE, HEADS)
    stored = torch.zeros(PAGES, SIZE, HEADS, DIM, dtype=torch.int8)
    scales = {"k_scale": scale, "v_scale": scale}
    cache = PagedKV.from_nhd(stored, stored, **scales) if build == "nhd" else PagedKV.from_packed(stored, **scales)
    assert cache.k_scale[2, 1, 5] == scale[2, 5, 1]
    assert cache.quant == INT8_TOKEN


@pytest.mark.parametrize("x", [4, 8])
@pytest.mark.parametrize("blocked_v", [False, True])
def test_from_aiter_repacks(x: int, blocked_v: bool) -> None:
    k, v = numbered(PAGES, HEADS, SIZE, DIM), -numbered(PAGES, HEADS, SIZE, DIM)
    aiter_k = torch.empty(PAGES, HEADS, DIM // x, SIZE, x)
    aiter_v = torch.empty(PAGES, HEADS, SIZE // x, DIM, x) if blocked_v else torch.empty(PAGES, HEADS, DIM, SIZE)
    for slot in range(SIZE):
        for d in range(DIM):
            aiter_k[:, :, d // x, slot, d % x] = k[:, :, slot, d]
            if blocked_v:
                aiter_v[:, :, slot // x, d, slot % x] = v[:, :, slot, d]
            else:
                aiter_v[:, :, d, slot] = v[:, :, slot, d]
    cache = PagedKV.from_aiter(aiter_k, aiter_v)
    assert torch.equal(cache.k, k)
    assert torch.equal(cache.v, v)
    assert cache.k.data_ptr() != aiter_k.data_ptr()


@pytest.mark.parametrize(
    "quant", [KVQuant(torch.bfloat16), INT8_TOKEN, KVQuant(torch.float8_e5m2, "token", "none")], ids=str
)
def test_empty_makes_what_it_is_asked_for(quant: KVQuant) -> None:
    cache = PagedKV.empty(quant, PAGES, HEADS, SIZE, DIM)
    assert cache.quant == quant
    assert cache.k.shape == cache.v.shape == (PAGES, HEADS, SIZE, DIM)
    assert cache.k_scale is None or cache.k_scale.eq(1).all()
    assert cache.nbytes == PAGES * SIZE * quant.bytes_per_token(HEADS, DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_empty_takes_a_dtype(dtype: torch.dtype) -> None:
    assert PagedKV.empty(dtype, PAGES, HEADS, SIZE, DIM).quant == KVQuant(dtype)


def test_empty_needs_its_static_scales() -> None:
    with pytest.raises(ValueError, match=r"^k_scale: wanted a scale of granularity 'head'"):
        PagedKV.empty(KVQuant(torch.int8, "head"), PAGES, HEADS, SIZE, DIM)
    with pytest.raises(ValueError, match=r"^k_scale: wanted a scale of granularity 'token', got one of shape \(\)"):
        PagedKV.empty(torch.int8, PAGES, HEADS, SIZE, DIM, k_scale=0.02, v_scale=0.02)
    scale = torch.ones(HEADS)
    cache = PagedKV.empty(KVQuant(torch.int8, "head"), PAGES, HEADS, SIZE, DIM, k_scale=scale, v_scale=scale)
    assert cache.k_scale is scale


def test_a_number_is_a_scale_for_the_whole_tensor() -> None:
    pool = torch.zeros(PAGES, HEADS, SIZE, DIM, dtype=torch.int8)
    per_tensor = KVQuant(torch.int8, "tensor")
    for cache in (
        PagedKV(pool, pool.clone(), k_scale=0.5, v_scale=2),
        PagedKV.from_nhd(pool.transpose(1, 2), pool.clone().transpose(1, 2), k_scale=0.5, v_scale=2),
        PagedKV.empty(per_tensor, PAGES, HEADS, SIZE, DIM, k_scale=0.5, v_scale=2),
    ):
        assert cache.quant == per_tensor
        assert (cache.k_scale.dtype, cache.k_scale.device) == (torch.float32, cache.k.device)
        assert (cache.k_scale.item(), cache.v_scale.item()) == (0.5, 2.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-300, 10**400):
        with pytest.raises(ValueError, match=r"^v_scale: wanted a .*float"):
            PagedKV(pool, pool.clone(), k_scale=0.5, v_scale=wrong)


def test_a_cache_prints_its_form_and_not_its_contents() -> None:
    cache = PagedKV.empty(KVQuant(torch.int8, "token", "head"), PAGES, HEADS, SIZE, DIM, v_scale=torch.ones(HEADS))
    assert repr(cache) == (
        "PagedKV(num_pages=3, num_kv_heads=2, page_size=16, head_dim=32, dtype=torch.int8, k='token', v='head', "
        f"nbytes={2 * 3072 + 3 * 2 * 16 * 4 + 2 * 4}, device='cpu')"
    )


def test_the_worked_example_of_slots() -> None:
    placed = slots(int32([7, 2]), int32(19), 16, num_tokens=2)
    assert placed.tolist() == [33, 34]
    assert placed.dtype == torch.int64


TABLE = int32([4, 1, 9], [3, -1, 2**31 - 1], [5, 6, 7])
FLAT = (int32(4, 1, 9, 3, -1, 2**31 - 1, 5, 6, 7), int32(0, 3, 6, 9))


@pytest.mark.parametrize("table", [TABLE, FLAT], ids=["rectangular", "flat"])
def test_slots_of_every_sequence(table: Tensor | tuple[Tensor, Tensor]) -> None:
    """Two new tokens each: across a page edge; the second in a freed page; beyond the table."""
    placed = slots(table, int32(17, 17, 49), 16, num_tokens=6)
    assert placed.tolist() == [4 * 16 + 15, 1 * 16 + 0, 3 * 16 + 15, -1, 7 * 16 + 15, -1]


@pytest.mark.parametrize("table", [TABLE, FLAT], ids=["rectangular", "flat"])
def test_slots_of_ragged_tokens(table: Tensor | tuple[Tensor, Tensor]) -> None:
    """Three tokens, none, one; then two that nobody owns."""
    placed = slots(table, int32(18, 40, 1), 16, num_tokens=6, cu_seqlens_q=int32(0, 3, 3, 4))
    assert placed.tolist() == [4 * 16 + 15, 16, 17, 5 * 16, -1, -1]


def test_slots_of_an_entry_past_any_pool_lie_past_it() -> None:
    assert slots(TABLE, int32(0, 33, 0), 16, num_tokens=3).tolist()[1] >= 2**31 - 1


def test_slots_before_the_first_key_and_of_negative_lengths() -> None:
    assert slots(TABLE, int32(1, 0, -5), 16, num_tokens=6).tolist() == [-1, 4 * 16, -1, -1, -1, -1]


def test_slots_of_nothing() -> None:
    assert slots(TABLE, int32(1, 2, 3), 16, num_tokens=0).tolist() == []
    empty = torch.empty(0, 3, dtype=torch.int32)
    assert slots(empty, empty[:, 0], 16, num_tokens=0).tolist() == []
    assert slots(TABLE[:, :0], int32(1, 2, 3), 16, num_tokens=3).tolist() == [-1, -1, -1]


def test_check_accepts_what_the_operators_accept() -> None:
    """Hostile entries outside the window are no error."""
    for case in (
        Case(size=20),
        Case(size=20, table="flat", q_lens=3),
        Case(q_lens=(3, 0, 70), size=9, global_tokens=2),
    ):
        inputs = make(case)
        steps = case.q_lens if isinstance(case.q_lens, int) else 1
        cu, w = inputs.cu_seqlens_q, Window(case.size, case.global_tokens)
        check(inputs.cache, inputs.block_table, inputs.seq_lens, cu_seqlens_q=cu, num_steps=steps, window=w)


def test_check_names_a_visible_entry_outside_the_pool() -> None:
    inputs = make(Case((70, 129), size=40))
    inputs.block_table[1, 6] = 999
    with pytest.raises(ValueError, match=r"^block_table: .* 999 at sequence 1, entry 6"):
        check(inputs.cache, inputs.block_table, inputs.seq_lens, window=Window(40))
    check(inputs.cache, inputs.block_table, inputs.seq_lens, window=Window(16))


def test_check_names_bounds_of_fewer_rows() -> None:
    cache = PagedKV.empty(torch.float32, PAGES, HEADS, SIZE, DIM)
    table, lens, cu = int32([0, 1], [2, -1]), int32(20, 5), int32(0, 3, 5)
    ranges = torch.zeros(5, 2, dtype=torch.int32)
    check(cache, table, lens, cu_seqlens_q=cu, window=Window(bounds=ranges))
    check(cache, table, lens, num_steps=2, window=Window(bounds=ranges[:4].view(2, 2, 2)))
    check(cache, table, lens, window=Window(bounds=ranges[:2]))
    for rows, steps, owners in ((ranges[:4], 1, cu), (ranges[:1], 1, None), (ranges[:2], 2, None)):
        with pytest.raises(ValueError, match=r"^window.bounds: wanted shape"):
            check(cache, table, lens, num_steps=steps, cu_seqlens_q=owners, window=Window(bounds=rows))


def test_check_names_lengths_that_cannot_be() -> None:
    inputs = make(Case((70, 129)))
    cache, table = inputs.cache, inputs.block_table
    with pytest.raises(ValueError, match=r"^seq_lens: .* -1 for sequence 1"):
        check(cache, table, int32(70, -1))
    with pytest.raises(ValueError, match=r"^block_table: wanted pages for 5000 keys of sequence 0"):
        check(cache, table, int32(5000, 3))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: .* -2 rows for sequence 1"):
        check(cache, table, int32(70, 129), cu_seqlens_q=int32(0, 3, 1))


DENSE = {
    "one after another": lambda x: x,
    "heads outside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "with room behind": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 48))[:, : x.shape[1]],
    "shared": lambda x: x[:1].expand_as(x),
    "one sequence": lambda x: x[:1],
}


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(("keys", "page_size"), [(256, 128), (192, 64), (96, 32), (48, 16), (40, 8), (50, 1), (1, 1)])
def test_from_dense_is_a_view_of_any_length(keys: int, page_size: int, layout: str) -> None:
    k = DENSE[layout](numbered(3, keys, HEADS, DIM))
    v = k.clone() if layout == "one after another" else k
    cache, table = PagedKV.from_dense(k, v)
    assert cache.page_size == (page_size if layout != "with room behind" else min(page_size, 16))
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == (k.data_ptr(), v.data_ptr())
    assert table.shape == (len(k), keys // cache.page_size)
    for b in range(len(k)):
        assert torch.equal(cache.k[table[b].long()].transpose(1, 2).flatten(0, 1), k[b])
    ones, single = PagedKV.from_dense(k, v, page_size=1)
    assert torch.equal(ones.k[single[-1].long(), :, 0], k[-1])


def test_from_dense_takes_values_that_lie_otherwise() -> None:
    k, packed = numbered(3, 48, HEADS, DIM), numbered(3, 48, HEADS, DIM + 16)
    cache, table = PagedKV.from_dense(k, packed[..., 16:DIM])
    assert torch.equal(cache.v[table[2].long()].transpose(1, 2).flatten(0, 1), packed[2, ..., 16:DIM])


IRREGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "heads outside": DENSE["heads outside"],
    "an odd distance": lambda x: torch.nn.functional.pad(x.flatten(1), (0, 8))[:, :-8].view(x.shape),
    "one sequence for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", IRREGULAR)
@pytest.mark.parametrize("keys", [48, 8])
def test_from_dense_takes_a_page_a_sequence_where_k_and_v_lie_otherwise(keys: int, layout: str) -> None:
    x = numbered(3, keys, HEADS, DIM)
    for k, v in ((x, IRREGULAR[layout](x)), (IRREGULAR[layout](x), x)):
        cache, table = PagedKV.from_dense(k, v)
        assert (cache.page_size, table.tolist()) == (keys, [[0], [1], [2]])
        assert (cache.k.data_ptr(), cache.v.data_ptr()) == (k.data_ptr(), v.data_ptr())
        assert torch.equal(cache.k.transpose(1, 2), k)
        assert torch.equal(cache.v.transpose(1, 2), v)
        PagedKV.from_dense(k, v, page_size=keys)


def test_from_dense_refuses_what_is_no_view() -> None:
    k = numbered(3, 48, HEADS, DIM)
    wrong = {
        "k: wanted shape": lambda: PagedKV.from_dense(k[0], k[0]),
        "v: wanted shape": lambda: PagedKV.from_dense(k, k[:2]),
        "v: wanted sequences that lie 48 keys apart": lambda: PagedKV.from_dense(
            k, DENSE["heads outside"](k), page_size=16
        ),
        "v: wanted sequences that lie 47 keys apart": lambda: PagedKV.from_dense(
            k[:, :47].contiguous(), DENSE["heads outside"](k[:, :47])
        ),
        "k: wanted a last stride of 1": lambda: PagedKV.from_dense(*[k.transpose(2, 3)] * 2),
        "k: wanted sequences that lie a whole number of keys apart": lambda: PagedKV.from_dense(
            *[IRREGULAR["an odd distance"](k[:, :47])] * 2
        ),
        "page_size: wanted a divisor of 48 keys": lambda: PagedKV.from_dense(k, k, page_size=32),
        "page_size: wanted an int >= 1 or None, got 0": lambda: PagedKV.from_dense(k, k, page_size=0),
        "page_size: wanted an int >= 1 or None, got float": lambda: PagedKV.from_dense(k, k, page_size=8.0),  # type: ignore[arg-type]
    }
    for message, call in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()
