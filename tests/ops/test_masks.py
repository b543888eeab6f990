"""Masks: each query row sees the keys of the rule, whichever tile, split or page they lie in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import Prepare, check
from swath import KVQuant, Window
from swath.testing import Case, Inputs, visible


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
def test_each_step_has_a_mask_of_its_own(steps: int, size: int | None, prepare: Prepare, impl: str) -> None:
    assert_weights_are_the_mask(replace(ONE, q_lens=steps, size=size, global_tokens=2), prepare, impl)


@pytest.mark.parametrize("case", [ONE, replace(ONE, q_lens=(200,)), replace(ONE, q_lens=(200,), dense=True),
                                  replace(ONE, split_size=64), replace(ONE, q_lens=5, split_size=64),
                                  replace(ONE, table="flat", page_size=48)], ids=str)  # fmt: skip
def test_every_key_is_visited_once(case: Case, prepare: Prepare, impl: str) -> None:
    assert_weights_are_the_mask(case, prepare, impl)


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129])
def test_tiles_without_a_mask_are_seen_by_all_rows(
    size: int, causal: bool, dense: bool, prepare: Prepare, impl: str
) -> None:
    case = replace(ONE, q_lens=(131,), size=size, causal=causal, global_tokens=17, dense=dense)
    assert_weights_are_the_mask(case, prepare, impl)


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
@pytest.mark.parametrize("size", [7, 16, 33, 255])
def test_a_row_that_sees_no_key_of_a_tile_gives_no_nan(size: int, dense: bool, prepare: Prepare, impl: str) -> None:
    """A local-only window smaller than a tile, behind a prefix that no tile is aligned to."""
    check(prepare(Case((331, 300), (201, 300), size=size, dense=dense, num_kv_heads=1)), impl)


@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
def test_rows_too_early_or_too_late_for_any_key_are_zero(dense: bool, prepare: Prepare, impl: str) -> None:
    """Neither NaN nor the mean of V. The last row to see a key, 99, stands at 118."""
    inputs = prepare(Case((100, 100, 100), (5, 5, 5), size=20, q_start=(150, -9, 118), dense=dense))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    assert [bool(row.any()) for row in out] == [row == 10 for row in range(15)]
    assert [bool((row > -torch.inf).all()) for row in lse] == [row == 10 for row in range(15)]


@pytest.mark.parametrize("steps", range(1, 9))
def test_both_window_edges_of_every_step(steps: int, prepare: Prepare, impl: str) -> None:
    """Spiked: keys p - size, p - size + 1, p and p + 1 of every step."""
    check(prepare(Case((97, 64 + steps), steps, size=33, spiked=True, num_kv_heads=1)), impl)


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_the_earliest_step_decides_the_first_tile(steps: int, block: int, prepare: Prepare, impl: str) -> None:
    """The first step's oldest key is the last of a block, those of all others lie in the next."""
    size = 40
    kv_len = block + size + steps - 2
    case = Case((kv_len,), steps, size=size, spiked=True)
    assert case.first_position(0) - size + 1 == block - 1
    check(prepare(case), impl)


@pytest.mark.parametrize("gqa", ["grouped", "interleaved"])
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_each_step_and_head_gets_its_own_key(steps: int, group: int, gqa: str, prepare: Prepare, impl: str) -> None:
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
def test_the_first_length_that_hides_a_key(
    more: int, q_lens: int | tuple[int, ...], prepare: Prepare, impl: str
) -> None:
    """At kv = g + w, g + w + 1 and g + w + 2: the first length at which a key is hidden is g + w + 1."""
    g, w = 4, 60
    inputs = prepare(Case((g + w + more,), q_lens, size=w, global_tokens=g, spiked=True))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    if more == 0:
        inputs.check(*inputs.run(impl, window=Window()))  # nothing is hidden yet


@pytest.mark.parametrize("page_size", [16, 64, 1024])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_splits_equal_one_pass(steps: int, page_size: int, prepare: Prepare, impl: str) -> None:
    """One to nine splits over the batch."""
    lengths = tuple(64 * n - n % 3 for n in range(1, 10))
    case = Case(lengths, steps, page_size=page_size, split_size=64, num_kv_heads=1, quant=KVQuant(torch.int8, "token"))
    check(prepare(case), impl)
    check(prepare(replace(case, split_size=None)), impl)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [64, 65, 128, 130, None])
def test_no_key_is_lost_at_a_split_boundary(steps: int, size: int | None, prepare: Prepare, impl: str) -> None:
    """Spiked on both sides of every boundary, with window edges on, before and after boundaries."""
    lengths = (128, 191, 192, 193, 256 + steps)
    check(prepare(Case(lengths, steps, size=size, split_size=64, spiked=True, num_kv_heads=1)), impl)


@pytest.mark.parametrize("size", [1024, 1025, 5000])
def test_a_window_that_covers_the_context_has_the_ranges_of_none(size: int) -> None:
    """The same key ranges as without a window, for every tile of a prefill of 1024."""
    for first in range(0, 1024, 64):
        assert Window(size).key_ranges(first, first + 63, 1024) == Window().key_ranges(first, first + 63, 1024)
