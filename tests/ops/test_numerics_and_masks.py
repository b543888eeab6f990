"""What the library was asked for, line by line: numerics (1 to 11) and masks (12 to 20).

Each test is named after its line; test_requirements_serving.py holds lines 21 to 41.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swath import KVQuant, PagedKV, Window, attention, paged_attention
from swath.testing import Case, Inputs, visible

Prepare = Callable[[Case], Inputs]

INT8_HEAD, INT8_CHANNEL, INT8_TOKEN = (KVQuant(torch.int8, g) for g in ("head", "channel", "token"))
INT8_QUANTS = [KVQuant(torch.int8, "tensor"), INT8_HEAD, INT8_CHANNEL, INT8_TOKEN]


def check(inputs: Inputs, impl: str) -> None:
    inputs.check(*inputs.run(impl))


def rescaled(inputs: Inputs, k_factor: Tensor | float, v_factor: Tensor | float) -> Inputs:
    """The same stored numbers with other scales."""
    c = inputs.cache
    return replace(inputs, keys=PagedKV(c.k, c.v, k_scale=c.k_scale * k_factor, v_scale=c.v_scale * v_factor))


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
@pytest.mark.parametrize("size", [7, 16, 33, 255])
def test_r01_rows_masked_in_a_whole_tile_give_no_nan(size: int, dense: bool, prepare: Prepare, impl: str) -> None:
    """A local-only window smaller than a tile, behind a prefix that no tile is aligned to."""
    check(prepare(Case((331, 300), (201, 300), size=size, dense=dense, num_kv_heads=1)), impl)


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
def test_r02_rows_masked_everywhere_are_zero(dense: bool, prepare: Prepare, impl: str) -> None:
    """Neither NaN nor the mean of V. The last row to see a key, 99, stands at 118."""
    inputs = prepare(Case((100, 100, 100), (5, 5, 5), size=20, q_start=(150, -9, 118), dense=dense))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    assert [bool(row.any()) for row in out] == [row == 10 for row in range(15)]
    assert [bool((row > -torch.inf).all()) for row in lse] == [row == 10 for row in range(15)]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 50.0, -50.0])
def test_r03_division_is_by_a_safe_denominator(scale: float, prepare: Prepare, impl: str) -> None:
    """Scores of thousands of either sign, all equal, or none at all."""
    inputs = prepare(Case((70, 0, 33), (20, 2, 40), scale=scale, dtype=torch.float32))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    assert out.isfinite().all()


def test_r03_a_sink_of_minus_infinity_is_no_sink(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((70, 0, 33), size=20))
    sink = torch.full((4,), -torch.inf, device=inputs.q.device)
    check(replace(inputs, sink=sink), impl)


def test_r04_every_path_has_one_base(prepare: Prepare, impl: str) -> None:
    """Decode, n-step, ragged, split and dense give the same row and natural-log LSE at a scale that is not D^-0.5."""
    keys = Case((90,), scale=0.3, sink="fp32")
    for case in (keys, replace(keys, q_lens=5), replace(keys, q_lens=(90,)), replace(keys, split_size=64),
                 replace(keys, q_lens=(90,), dense=True)):  # fmt: skip
        check(prepare(case), impl)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("quant", [None, INT8_CHANNEL, INT8_TOKEN], ids=str)
def test_r05_the_score_scale_is_applied_once(factor: float, quant: KVQuant | None, prepare: Prepare, impl: str) -> None:
    for q_lens in (1, 3, (40, 1)):
        check(prepare(Case((70, 33), q_lens if q_lens != 3 else 3, scale=factor / 8, quant=quant)), impl)


@pytest.mark.parametrize("quant", INT8_QUANTS, ids=str)
@pytest.mark.parametrize("q_lens", [1, 3, (48, 17, 1)], ids=str)
def test_r06_cache_scales_are_applied_once_in_partial_pages(
    q_lens: int | tuple[int, ...], quant: KVQuant, prepare: Prepare, impl: str
) -> None:
    """kv_len % page in {0, 1, page - 1}; scales far from 1."""
    inputs = prepare(Case((48, 17, 31), q_lens, quant=quant, dtype=torch.float32))
    check(rescaled(inputs, 0.02, 500.0), impl)


@pytest.mark.parametrize("gqa", ["grouped", "interleaved"])
@pytest.mark.parametrize("quant", [INT8_HEAD, INT8_CHANNEL, INT8_TOKEN], ids=str)
@pytest.mark.parametrize("q_lens", [1, (30, 1, 20)], ids=str)
def test_r07_scales_are_indexed_by_kv_head(
    q_lens: int | tuple[int, ...], quant: KVQuant, gqa: str, prepare: Prepare, impl: str
) -> None:
    """Heads ten times apart."""
    inputs = prepare(Case(q_lens=q_lens, quant=quant, gqa=gqa, num_kv_heads=3))
    tenfold = torch.tensor([0.01, 0.1, 1.0], device=inputs.q.device)
    shaped = {1: tenfold, 2: tenfold[:, None], 3: tenfold[:, None]}[inputs.cache.k_scale.dim()]
    check(rescaled(inputs, shaped.flip(0), shaped), impl)


def test_r08_scales_come_in_their_documented_shapes_only() -> None:
    stored = torch.zeros(4, 2, 16, 64, dtype=torch.int8)
    documented = {(), (2,), (2, 64), (4, 2, 16)}
    for shape in [*documented, (1,), (64,), (4,), (64, 2), (1, 2), (2, 1), (4, 16, 2), (4, 2, 16, 1), (4, 2, 16, 64)]:
        if shape in documented:
            PagedKV(stored, stored, k_scale=torch.ones(shape), v_scale=torch.ones(()))
        else:
            with pytest.raises(ValueError, match=r"^k_scale: wanted one of the shapes"):
                PagedKV(stored, stored, k_scale=torch.ones(shape), v_scale=torch.ones(()))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", [*INT8_QUANTS, KVQuant(torch.float8_e4m3fn, "token", "channel")], ids=str)
def test_r09_scales_are_bf16_or_fp32(quant: KVQuant, scale_dtype: torch.dtype, prepare: Prepare, impl: str) -> None:
    for q_lens in (1, (60, 1, 2)):
        check(prepare(Case(q_lens=q_lens, quant=quant, scale_dtype=scale_dtype)), impl)


@pytest.mark.parametrize("q_lens", [1, 3, (40, 1, 2)], ids=str)
def test_r10_int8_compute_of_zero_rows_and_ties(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=q_lens, quant=INT8_HEAD, compute="int8"))
    check(inputs, impl)
    inputs.cache.k.fill_(64)  # every key ties with every other
    check(inputs, impl)
    inputs.q[0] = 0
    inputs.cache.k.fill_(0)
    check(inputs, impl)


def test_r11_compute_selects(prepare: Prepare, impl: str) -> None:
    """int8 products round as int8 products do; the reference always computes in float."""
    inputs = prepare(Case(q_lens=(60, 3, 1), quant=INT8_CHANNEL, compute="int8"))
    coarse, lse = inputs.run(impl)
    inputs.check(coarse, lse)
    fine, _ = inputs.run(impl, compute="float")
    replace(inputs, case=replace(inputs.case, compute="float")).check(fine, None)
    assert torch.equal(coarse, fine) == (impl == "reference")


def weighed_keys(case: Case, inputs: Inputs, impl: str) -> Tensor:
    """The weight [rows, Hq, keys] of each key, from values that are one-hot by position and queries of zero."""
    inputs.q.zero_()
    if case.dense:
        one_hot = torch.eye(case.head_dim, device=inputs.q.device)[: case.kv_lens[0], None]
        inputs.keys[0][: case.kv_lens[0]], inputs.keys[1][: case.kv_lens[0]] = 0, one_hot
    else:
        cache, row = inputs.cache, inputs.block_table[0].long()
        for position in range(case.kv_lens[0]):
            page, slot = row[position // case.page_size], position % case.page_size
            if 0 <= page < cache.num_pages:
                cache.k[page, :, slot], cache.v[page, :, slot] = 0, 0
                cache.v[page, :, slot, position] = 1
    out, _ = inputs.run(impl)
    return out.reshape(-1, case.num_q_heads, case.head_dim)[..., : case.kv_lens[0]]


def mask_of(case: Case, device: torch.device) -> Tensor:
    positions = torch.arange(case.row_counts[0], device=device) + case.first_position(0)
    keys = torch.arange(case.kv_lens[0], device=device)
    return visible(positions, keys, case.size, case.leading(0), case.causal)


def assert_weights_are_the_mask(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(case)
    mask = mask_of(case, inputs.q.device)
    wanted = mask / mask.sum(1, keepdim=True).clamp(min=1)
    got = weighed_keys(case, inputs, impl)
    torch.testing.assert_close(got, wanted[:, None].expand_as(got).float(), rtol=1e-5, atol=0)


ONE = Case((200,), num_kv_heads=1, head_dim=256, dtype=torch.float32)
"""One sequence whose 200 positions each have an element of V."""


@pytest.mark.parametrize("steps", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 5, 64, None])
def test_r12_the_mask_of_n_steps_has_a_row_for_each(steps: int, size: int | None, prepare: Prepare, impl: str) -> None:
    assert_weights_are_the_mask(replace(ONE, q_lens=steps, size=size, global_tokens=2), prepare, impl)


@pytest.mark.parametrize("steps", range(1, 9))
def test_r13_both_edges_of_every_steps_window(steps: int, prepare: Prepare, impl: str) -> None:
    """Spiked: keys p - size, p - size + 1, p and p + 1 of every step."""
    check(prepare(Case((97, 64 + steps), steps, size=33, spiked=True, num_kv_heads=1)), impl)


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_r14_the_earliest_step_decides_the_first_tile(steps: int, block: int, prepare: Prepare, impl: str) -> None:
    """The first step's oldest key is the last of a block, those of all others lie in the next."""
    size = 40
    kv_len = block + size + steps - 2
    case = Case((kv_len,), steps, size=size, spiked=True)
    assert case.first_position(0) - size + 1 == block - 1
    check(prepare(case), impl)


@pytest.mark.parametrize("gqa", ["grouped", "interleaved"])
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_r15_rows_are_tied_by_step_and_head(steps: int, group: int, gqa: str, prepare: Prepare, impl: str) -> None:
    """Every (step, head) asks for a key of its own and gets that key's value, and no other row's."""
    case = Case((60,), steps, group=group, gqa=gqa, causal=False, dtype=torch.float32, layout="hnd", num_kv_heads=2)
    inputs = prepare(case)
    cache, pages = inputs.cache, inputs.block_table[0, :4].long()
    unit = torch.eye(64, device=inputs.q.device)
    for kv_head in range(2):
        cache.k[pages, kv_head] = unit.roll(kv_head, 0).view(4, 16, 64)  # head 1 keeps its keys one row later
        cache.v[pages, kv_head] = (unit if kv_head == 0 else -unit).view(4, 16, 64)
    asked = torch.arange(steps * group * 2, device=inputs.q.device).view(steps, group * 2) % 30
    inputs.q[...] = 1000 * unit[asked].view(inputs.q.shape)
    out, _ = inputs.run(impl)
    for step in range(steps):
        for head in range(group * 2):
            kv_head = head // group if gqa == "grouped" else head % 2
            wanted = unit[asked[step, head] + kv_head] * (1 - 2 * kv_head)
            torch.testing.assert_close(out.view(steps, group * 2, 64)[step, head], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("more", [0, 1, 2])
@pytest.mark.parametrize("q_lens", [1, 3, (40,)], ids=str)
def test_r16_the_covering_case_is_the_general_case(
    more: int, q_lens: int | tuple[int, ...], prepare: Prepare, impl: str
) -> None:
    """At kv = g + w, g + w + 1 and g + w + 2: the first length at which a key is hidden is g + w + 1."""
    g, w = 4, 60
    inputs = prepare(Case((g + w + more,), q_lens, size=w, global_tokens=g, spiked=True))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    if more == 0:
        inputs.check(*inputs.run(impl, window=Window()))  # nothing is hidden yet


@pytest.mark.parametrize("case", [ONE, replace(ONE, q_lens=(200,)), replace(ONE, q_lens=(200,), dense=True),
                                  replace(ONE, split_size=64), replace(ONE, q_lens=5, split_size=64),
                                  replace(ONE, table="flat", page_size=48)], ids=str)  # fmt: skip
def test_r17_every_key_is_visited_once(case: Case, prepare: Prepare, impl: str) -> None:
    assert_weights_are_the_mask(case, prepare, impl)


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129])
def test_r18_unmasked_interior_only_where_all_rows_see_all_keys(
    size: int, causal: bool, dense: bool, prepare: Prepare, impl: str
) -> None:
    case = replace(ONE, q_lens=(131,), size=size, causal=causal, global_tokens=17, dense=dense)
    assert_weights_are_the_mask(case, prepare, impl)


@pytest.mark.parametrize("page_size", [16, 64, 1024])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_r19_splits_equal_one_pass(steps: int, page_size: int, prepare: Prepare, impl: str) -> None:
    """One to nine splits over the batch."""
    lengths = tuple(64 * n - n % 3 for n in range(1, 10))
    case = Case(lengths, steps, page_size=page_size, split_size=64, num_kv_heads=1, quant=INT8_TOKEN)
    check(prepare(case), impl)
    check(prepare(replace(case, split_size=None)), impl)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [64, 65, 128, 130, None])
def test_r20_no_key_is_lost_at_a_split_boundary(steps: int, size: int | None, prepare: Prepare, impl: str) -> None:
    """Spiked on both sides of every boundary, with window edges on, before and after boundaries."""
    lengths = (128, 191, 192, 193, 256 + steps)
    check(prepare(Case(lengths, steps, size=size, split_size=64, spiked=True, num_kv_heads=1)), impl)


def test_r04_dense_and_paged_take_the_same_scale(prepare: Prepare, impl: str) -> None:
    """The default of both is D^-0.5."""
    dense, paged = (prepare(Case((40,), (40,), dense=d, dtype=torch.float32)) for d in (True, False))
    for inputs, public in ((dense, attention), (paged, paged_attention)):
        options = {name: value for name, value in inputs.options.items() if name != "scale"}
        inputs.check(public(*inputs.args, **options, impl=impl), None)
