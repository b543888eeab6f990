"""Launch rules of Hopper's tiles, and which calls they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_rows import OPTIONS
from compile_variants import problem_of

from conftest import plan_for
from swath import Window
from swath.backends.hopper.attention import why_not_tiles
from swath.backends.hopper.heuristics import HOPPER, MOST_TOKENS, decodes_in_tiles, draws_tiles, hopper_launch
from swath.backends.triton.heuristics.dequantise import CopyTypes
from swath.backends.triton.work import Work
from swath.cache import DenseKeys, PagedKeys, PagedKV
from swath.pages import PageTable
from swath.problem import Problem
from swath.target import Target

ROW = {name: values[0] for name, values in OPTIONS.items()}


def problem(**row: str) -> Problem:
    return problem_of(ROW | row)


@pytest.mark.parametrize(
    ("row", "window", "consumers"),
    [
        ({"queries": "dense"}, Window(129), 2),  # 16 queries see 144 keys
        ({"queries": "dense"}, Window(130), 1),
        ({"queries": "dense"}, Window(137), 1),  # 8 queries see 144
        ({"queries": "dense"}, Window(138), 0),
        ({"queries": "dense", "scoring": "interleaved"}, Window(128), 0),  # 64 queries see 191
        ({"queries": "dense", "head_dim": "128"}, Window(128), 0),
        ({"queries": "dense"}, Window(65, causal=False), 2),
        ({"queries": "dense"}, Window(69, causal=False), 1),
        ({"queries": "dense"}, Window(70, causal=False), 0),
        ({"queries": "dense"}, Window(64, global_tokens=4), 0),
        ({"queries": "dense"}, Window(), 0),
        ({"queries": "dense"}, Window(0), 2),
        ({"queries": "ragged", "paging": "16"}, Window(114), 2),
        ({"queries": "ragged", "paging": "16"}, Window(122), 1),
        ({"queries": "ragged", "paging": "16"}, Window(123), 0),
    ],
)
def test_hopper_takes_one_pass_where_two_tiles_hold_all_keys(
    row: dict[str, str], window: Window, consumers: int
) -> None:
    one = replace(problem(**{"head_dim": "64"} | row), window=window)
    work = Work(one, Target("sm_90", 132))
    launch = hopper_launch(work)
    assert (launch.consumers if launch.narrow_n else 0) == consumers
    assert launch.box_rows <= (launch.narrow_n if launch.narrow_n and work.features.page_size else launch.block_n)
    unbounded = hopper_launch(replace(work, problem=replace(one, max_kv_len=1 << 20)))
    assert (unbounded.consumers if unbounded.narrow_n else 0) == consumers, "no bound of lengths decides"


def decode(num_seqs: int, steps: int, group: int, window: Window) -> Problem:
    """``steps`` tokens each over 16,384 keys in pages of 16 x 8 heads of 128."""
    kv_heads, head_dim, page_size, pages = 8, 128, 16, 1024
    pool = torch.empty(pages, kv_heads, page_size, head_dim, dtype=torch.bfloat16, device="meta")
    table = torch.empty(num_seqs, pages, dtype=torch.int32, device="meta")
    keys = PagedKeys(PagedKV(pool, pool), PageTable(table), torch.empty(num_seqs, dtype=torch.int32, device="meta"))
    q = torch.empty(num_seqs, steps, group * kv_heads, head_dim, dtype=torch.bfloat16, device="meta")
    return replace(problem(queries="steps"), q=q, keys=keys, window=window, max_kv_len=16384, max_q_len=steps)


@pytest.mark.parametrize(
    ("window", "num_seqs", "steps", "group", "in_tiles"),
    [
        (Window(1024), 128, 1, 4, True),
        (Window(1024, global_tokens=64), 128, 1, 4, True),
        (Window(1024), 33, 1, 4, True),
        (Window(1024), 32, 1, 4, False),  # not enough for all places
        (Window(1024), 36, 1, 4, False),  # a second round that is nearly empty
        (Window(128), 128, 1, 4, False),
        (Window(4096), 128, 1, 4, False),
        (Window(), 128, 1, 4, False),
        (Window(1024), 128, 1, 16, True),
        (Window(1024), 128, 1, 1, False),  # not measured
        (Window(1024), 128, 1, 3, False),  # its heads do not share a row tile
        (Window(1024), 128, 1, 32, False),
        (Window(), 128, 4, 8, True),
        (Window(4096), 128, 4, 8, True),
        (Window(128), 128, 4, 8, False),
        (Window(), 128, 4, 4, False),  # 16 rows, which splits take as fast
        (Window(), 32, 4, 8, False),
        (Window(1024), 128, 4, 4, True),
    ],
)
def test_decode_in_tiles_fills_its_places(
    window: Window, num_seqs: int, steps: int, group: int, in_tiles: bool
) -> None:
    num_sms = 132
    one = decode(num_seqs, steps, group, window)
    assert decodes_in_tiles(one, num_sms) == in_tiles
    assert not decodes_in_tiles(replace(one, split_size=256), num_sms), "bits would depend on the batch"
    assert not decodes_in_tiles(replace(one, gqa="interleaved"), num_sms)


def test_decode_draws_its_tiles_where_they_differ_much() -> None:
    assert not draws_tiles(decode(128, 4, 8, Window(1024)))
    assert draws_tiles(decode(128, 4, 8, Window()))
    assert draws_tiles(problem(queries="ragged"))


def chunks(lengths: Sequence[int], window: Window, **more: Any) -> Problem:
    """A ragged call: 32 query heads over 4 kv heads, heads of 128. ``lengths``: query tokens of each sequence."""
    total = sum(lengths)
    q = torch.empty(total, 32, 128, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(total, 4, 128, dtype=torch.bfloat16, device="meta")
    cu = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    bounds = {"max_q_len": max(lengths), "max_kv_len": 16384}
    one = problem(queries="dense")
    return replace(one, q=q, cu_seqlens_q=cu, keys=DenseKeys(kv, kv, cu), window=window, **bounds, **more)


@pytest.mark.parametrize(
    ("lengths", "window", "pack", "consumers"),
    [
        ((2048,) * 4, Window(), 1, 2),  # whole tiles: no row of a last one is lost
        ((2048,) * 4, Window(1024), 1, 2),
        ((2048, 2000, 2048, 2048), Window(1024), 8, 2),
        ((1000,) * 8, Window(), 8, 2),
        ((9000,), Window(1024), 1, 2),
        ((2048,), Window(1024), 1, 1),  # few rows
        ((2048,), Window(4096), 1, 2),
        ((2048,) * 4, Window(512), 8, 1),
    ],
)
def test_hopper_packs_short_sequences_and_halves_few_rows(
    lengths: tuple[int, ...], window: Window, pack: int, consumers: int
) -> None:
    one = chunks(lengths, window)
    launch = hopper_launch(Work(one, Target("sm_90", 132)))
    assert (launch.pack, launch.consumers) == (pack, consumers)


@pytest.mark.parametrize(
    ("bounded", "max_visible", "sections"),
    [(False, None, True), (True, None, True), (True, 9000, True), (True, 1024, False)],
)
def test_heads_are_taken_in_sections_where_rows_may_see_many_keys(
    bounded: bool, max_visible: int | None, sections: bool
) -> None:
    bounds = torch.zeros(2048, 2, dtype=torch.int32) if bounded else None
    one = chunks((2048,), Window(bounds=bounds, max_visible=max_visible))
    assert hopper_launch(Work(one, Target("sm_90", 132))).sections == sections
    assert not hopper_launch(Work(chunks((2048,), Window(1024)), Target("sm_90", 132))).sections


def test_hopper_launches_do_not_depend_on_the_batch_with_split_size() -> None:
    launches = set()
    for lengths in ((2048,), (1000,) * 8, (9000,) * 4):
        one = chunks(lengths, Window(1024), split_size=256)
        launches.add(hopper_launch(Work(one, Target("sm_90", 132))))
    assert len(launches) == 1


def test_hopper_takes_no_more_keys_than_its_positions_are_right_for() -> None:
    one = chunks((2048,), Window(1024))
    for tokens, taken in ((MOST_TOKENS - 2048, True), (MOST_TOKENS - 2047, False)):
        kv = torch.empty(tokens, 4, 128, dtype=torch.bfloat16, device="meta")
        reason = why_not_tiles(replace(one, keys=DenseKeys(kv, kv, one.cu_seqlens_q)), 132)
        assert (reason is None) if taken else ("room for more" in str(reason))


def wide_chunk(window: Window, bounded: bool = False, split_size: int | None = None, v_head_dim: int = 512) -> Problem:
    """2,048 query tokens with heads of 512."""
    window = replace(window, bounds=torch.zeros(2048, 2, dtype=torch.int32)) if bounded else window
    one = chunks((2048,), window, split_size=split_size)
    q, k = (torch.empty(2048, heads, 512, dtype=torch.bfloat16, device="meta") for heads in (32, 4))
    dense = DenseKeys(k, k[..., :v_head_dim], one.cu_seqlens_q)
    return replace(one, q=q, out=q[..., :v_head_dim], keys=dense)


@pytest.mark.parametrize("split_size", [None, 256])
@pytest.mark.parametrize("keys", [2048, 9000])
@pytest.mark.parametrize(
    ("window", "bounded", "packed"),
    [
        (Window(), False, False),
        (Window(4096), False, True),
        (Window(4097), False, False),
        (Window(2048, causal=False), False, True),
        (Window(3000, causal=False), False, False),
        (Window(60), False, True),
        (Window(), True, False),
        (Window(4097, global_tokens=4), False, True),  # leading keys may have room in the window's last tile
    ],
)
def test_hopper_packs_heads_of_512_where_a_window_shows_no_more_keys_than_pay(
    window: Window, bounded: bool, packed: bool, keys: int, split_size: int | None
) -> None:
    one = replace(wide_chunk(window, bounded, split_size), max_kv_len=keys)
    assert why_not_tiles(one, 132) is None
    assert hopper_launch(Work(one, Target("sm_90", 132))).pack == (8 if packed else 1)


def test_hopper_halves_values_of_512() -> None:
    assert why_not_tiles(wide_chunk(Window(), v_head_dim=256), 132) is None
    assert "v_head_dim 128; it has 256, 512" in str(why_not_tiles(wide_chunk(Window(), v_head_dim=128), 132))


def test_hopper_does_not_write_halves_of_values_over_queries_that_it_reads_again() -> None:
    for v_head_dim, reason in ((512, "an out that is q"), (256, None)):
        one = wide_chunk(Window(), v_head_dim=v_head_dim)
        q = torch.empty(one.q.shape, dtype=one.q.dtype)
        apart, in_place = (replace(one, q=q, out=x[..., :v_head_dim]) for x in (torch.empty_like(q), q))
        assert why_not_tiles(apart, 132) is None
        found = why_not_tiles(in_place, 132)
        assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("storage", "lacks"),
    [
        ("int8 token", None),
        ("int8 channel", None),
        ("e4m3 head", None),
        ("e5m2 tensor", None),
        ("int8 compute", None),  # over copies in 16 bits, which are more precise
        ("int8 fast", None),  # the same
        ("queries head", "head_dim 512 of fp8 queries"),
    ],
)
def test_hopper_takes_heads_of_512_over_copies_in_16_bits(storage: str, lacks: str | None) -> None:
    one = problem(queries="long ragged", storage=storage, head_dim="512", paging="64")
    reason = why_not_tiles(one, 132)
    assert reason is None if lacks is None else lacks in str(reason)
    if lacks is None:
        assert HOPPER.copies(one) == CopyTypes()


def test_promised_bounds_pack_heads_of_512_but_decide_no_bit_with_split_size() -> None:
    for split_size, pack in ((None, 8), (256, 1)):
        one = wide_chunk(Window(), True, split_size)
        near = replace(one, window=replace(one.window, max_visible=1024))
        assert hopper_launch(Work(near, Target("sm_90", 132))).pack == pack


def test_fast_tiles_over_small_pages_are_those_of_int8_products() -> None:
    row = {"queries": "long ragged", "paging": "16", "head_dim": "128"}
    fast, int8 = (
        next(call for call in plan_for("hopper", one, Target("sm_90", 132)).calls if "LAUNCH" in call.args)
        for one in (problem(storage=storage, **row) for storage in ("int8 fast", "int8 compute"))
    )
    named = {"F": replace(fast.args["F"], compute_int8=True)}  # which tiles over copies do not read
    assert (fast.grid, fast.args | named, fast.sources) == (int8.grid, int8.args, int8.sources)


@pytest.mark.parametrize(
    ("storage", "head_dim", "window", "shape"),
    [
        ("int8 fast", "128", "none", (128, 3, 2)),
        ("queries fast", "128", "none", (128, 3, 2)),
        ("queries head", "128", "none", (128, 3, 2)),
        ("queries fast", "128", "size", (128, 4, 2)),  # two consumers under a window too
        ("queries head", "128", "size", (64, 3, 1)),
        ("queries fast", "256", "none", (64, 3, 2)),
        ("int8 fast", "256", "none", (64, 3, 2)),
        ("queries head", "256", "none", (64, 3, 2)),
        ("queries fast", "64", "none", (128, 4, 2)),
    ],
)
def test_tiles_of_8_bits_have_keys_and_stages_as_measured(
    storage: str, head_dim: str, window: str, shape: tuple[int, int, int]
) -> None:
    row = {"queries": "long ragged", "paging": "64", "storage": storage, "head_dim": head_dim}
    plan = plan_for("hopper", problem(window=window, scoring="plain", **row), Target("sm_90", 132))
    launch = next(call.args["LAUNCH"] for call in plan.calls if "LAUNCH" in call.args)
    assert (launch.block_n, launch.stages, launch.consumers) == shape
