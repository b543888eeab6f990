"""Page tables in every form, and 64-bit integers: one call, whatever its table and lengths are written as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swath import KVQuant, PagedKV, PageTable, append_kv, check, slots
from swath.testing import Case, Inputs

Prepare = Callable[[Case], Inputs]

CASES = {
    "decode": Case(size=40, global_tokens=(2, 0, 5)),
    "splits, 8-bit": Case((330, 70, 129), 3, quant=KVQuant(torch.int8), split_size=64),
    "ragged": Case((70, 90, 129), (60, 0, 33), q_start=(10, 3, 90), size=50),
    "mixed, dequantised": Case((90, 70, 130), (80, 1, 75), num_kv_heads=1, group=8, quant=KVQuant(torch.int8)),
    "dense": Case((70, 33, 129), (60, 0, 33), dense=True, size=50, global_tokens=(2, 0, 5)),
}
PAGED = [name for name, case in CASES.items() if not case.dense]


def in_64_bits(x: Tensor | None) -> Tensor | None:
    return x.long() if isinstance(x, Tensor) and x.dtype == torch.int32 else x


@pytest.mark.parametrize("name", CASES)
def test_64_bits_say_what_32_say(name: str, prepare: Prepare, impl: str) -> None:
    inputs = prepare(CASES[name])
    names = ("block_table", "seq_lens", "cu_seqlens_q", "cu_seqlens_k", "q_start", "global_tokens")
    wide = replace(inputs, **{n: in_64_bits(getattr(inputs, n)) for n in names})
    for got, want in zip(wide.run(impl), inputs.run(impl), strict=True):
        assert torch.equal(got, want)


def forms(table: Tensor, page_size: int) -> dict[str, PageTable | tuple[Tensor, Tensor]]:
    """The same table in every other form."""
    num_seqs, width = table.shape
    device, end = table.device, num_seqs + 2
    rows = torch.arange(end - 1, 1, -1, dtype=torch.int32, device=device)
    slots = table.repeat_interleave(page_size, 1) * page_size + torch.arange(page_size, device=device).repeat(width)
    larger = []
    for entries in (table, slots.int()):
        request_table = torch.full((end, entries.shape[1] + 16), -1, dtype=torch.int32, device=device)
        request_table[rows.long(), : entries.shape[1]] = entries
        larger.append(request_table[:, : entries.shape[1]])
    bounds = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    return {
        "flat": (table.flatten(), bounds * width),
        "rows": PageTable(larger[0], rows=rows),
        "rows in 64 bits": PageTable(larger[0].long(), rows=rows.long()),
        "tokens": PageTable(slots.int(), unit="token"),
        "tokens, flat": PageTable(slots.int().flatten(), bounds * width * page_size, unit="token"),
        "tokens in rows": PageTable(larger[1], rows=rows.long(), unit="token"),
    }


def in_bounds(inputs: Inputs) -> Inputs:
    """Freed entries as -1: others have no slot that 32 bits hold."""
    table = inputs.block_table
    return replace(inputs, block_table=table.where((table >= 0) & (table < inputs.cache.num_pages), -1))


@pytest.mark.parametrize("name", PAGED)
def test_every_form_of_a_table_gives_the_same_bits(name: str, prepare: Prepare, impl: str) -> None:
    """With one bound of lengths: what a table could hold differs by its form, and launches follow that without one."""
    inputs = in_bounds(prepare(replace(CASES[name], bounds="tight")))
    want = inputs.run(impl)
    inputs.check(*want)
    for form, table in forms(inputs.block_table, 16).items():
        for got, wanted in zip(replace(inputs, block_table=table).run(impl), want, strict=True):
            assert torch.equal(got, wanted), form


@pytest.mark.parametrize("q_lens", [1, (20, 3, 1)], ids=str)
def test_entries_beyond_32_bits_name_no_page(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    """Cut to 32 bits these would be page 0, and page 1."""
    inputs = prepare(Case((70, 33, 129), q_lens, index_dtype=torch.int64))
    inputs.block_table[:, :2] = torch.tensor([2**32, 1 - 2**32])
    inputs.check(*inputs.run(impl))
    tokens = inputs.block_table.repeat_interleave(16, 1) * 16
    tokens[:, :32] = torch.tensor([2**32, 1 - 2**32]).repeat_interleave(16)
    inputs.check(*replace(inputs, block_table=PageTable(tokens, unit="token")).run(impl))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_that_do_not_exist_have_no_keys(dtype: torch.dtype, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case())
    wrong = [-1, 3 if dtype == torch.int32 else 2**32, 2**31 - 1]
    table = PageTable(inputs.block_table, rows=torch.tensor(wrong, dtype=dtype, device=inputs.q.device))
    out, lse = replace(inputs, block_table=table).run(impl)
    assert not out.any()
    assert lse.isneginf().all()
    none = PageTable(inputs.block_table[:0], rows=table.rows)
    assert not replace(inputs, block_table=none).run(impl)[0].any()


def test_lengths_beyond_32_bits_are_cut_by_the_table(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((64, 64, 64), index_dtype=torch.int64))
    want = inputs.run(impl)
    table = inputs.block_table[:, :4]
    long = replace(inputs, seq_lens=inputs.seq_lens + 2**40, block_table=table, q_start=inputs.seq_lens - 1)
    for got, wanted in zip(long.run(impl), want, strict=True):
        assert torch.equal(got, wanted)


TABLE = torch.tensor([[4, 1, 9], [3, -1, 2], [5, 6, 7]], dtype=torch.int32)
LENS = torch.tensor([17, 17, 49], dtype=torch.int32)


@pytest.mark.parametrize("form", forms(TABLE, 16))
@pytest.mark.parametrize("cu", [None, torch.tensor([0, 3, 3, 4])], ids=["uniform", "ragged"])
def test_slots_of_every_form(form: str, cu: Tensor | None) -> None:
    table = forms(TABLE, 16)[form]
    want = slots(TABLE, LENS, 16, num_tokens=6, cu_seqlens_q=cu)
    assert (want >= 0).any()
    assert torch.equal(slots(table, LENS, 16, num_tokens=6, cu_seqlens_q=cu), want)
    assert torch.equal(slots(table, LENS.long(), 16, num_tokens=6, cu_seqlens_q=cu), want)


def test_slots_of_entries_and_rows_that_name_nothing() -> None:
    """No entry becomes a slot of another page, and none that is past the pool one before its end."""
    table = torch.tensor([[2**32, 1 - 2**32, 2**63 - 1]])
    lens = torch.tensor([48], dtype=torch.int32)
    placed = slots(table, lens, 16, num_tokens=48)
    assert (placed[:16] >= (2**31 - 1) * 16).all()
    assert (placed[16:32] == -1).all()
    assert (placed[32:] >= (2**31 - 1) * 16).all()
    for row in (-1, 1, 2**40):
        assert (slots(PageTable(table, rows=torch.tensor([row])), lens, 16, num_tokens=2) == -1).all()


@pytest.mark.parametrize("cu", [None, torch.tensor([0])], ids=["uniform", "ragged"])
def test_slots_of_an_empty_batch_are_of_nobody(cu: Tensor | None) -> None:
    none = torch.empty(0, 3, dtype=torch.int32)
    assert slots(none, none[:, 0], 16, num_tokens=5, cu_seqlens_q=cu).tolist() == [-1] * 5


def test_appending_by_32_bit_slots(impl: str, device: str) -> None:
    if impl == "hopper":
        pytest.skip("hopper leaves append_kv to triton")
    k = torch.randn(3, 2, 64, device=device, generator=torch.Generator(device).manual_seed(0))
    pools = []
    for dtype in (torch.int64, torch.int32):
        cache = PagedKV(*(torch.zeros(4, 2, 16, 64, device=device) for _ in "kv"))
        where = torch.tensor([17, -1, 40], dtype=dtype, device=device)
        append_kv(cache, k, -k, where, impl="reference" if impl == "cpu" else impl)
        pools.append((cache.k, cache.v))
    assert pools[0][0].any()
    for wide, narrow in zip(*pools, strict=True):
        assert torch.equal(wide, narrow)


def test_check_takes_every_form() -> None:
    cache = PagedKV.empty(torch.bfloat16, 10, 2, 16, 64)
    for table in forms(TABLE, 16).values():
        check(cache, table, LENS - 1, q_start=LENS.long() - 2)
        with pytest.raises(ValueError, match=r"^block_table: .* -1 at sequence 1, entry 1"):
            check(cache, table, LENS)
    with pytest.raises(ValueError, match=r"^block_table: wanted pages for 17 keys of sequence 0, got 0"):
        check(cache, PageTable(TABLE, rows=torch.tensor([3, 0, 1])), LENS)


@pytest.mark.parametrize("index", ["rows", "indptr"])
def test_a_table_that_is_kept_follows_its_tensors(index: str, prepare: Prepare, impl: str) -> None:
    """A serving loop keeps the table from step to step, and changes its tensors in place."""
    inputs = prepare(Case((70, 70), 1))
    entries = inputs.block_table
    if index == "rows":
        table = PageTable(entries, rows=torch.tensor([0, 1], device=entries.device))
        moved = torch.tensor([1, 0], device=entries.device)
    else:
        width = entries.shape[1]
        table = PageTable(entries.flatten(), torch.tensor([0, width, 2 * width], device=entries.device))
        moved = torch.tensor([width, 2 * width, 2 * width], device=entries.device)  # the second has no page now
    kept = replace(inputs, block_table=table)
    kept.run(impl)
    getattr(table, index).copy_(moved)
    fresh = replace(inputs, block_table=replace(table))
    for got, want in zip(kept.run(impl), fresh.run(impl), strict=True):
        assert torch.equal(got, want)
