"""Launch rules: pure functions of the case and the target."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_rows import OPTIONS
from compile_variants import TARGETS, problem_of

from swath import Window
from swath.backends.hopper.heuristics import copies
from swath.backends.triton.features import features_of
from swath.backends.triton.heuristics import TRITON, amd, nvidia
from swath.backends.triton.heuristics.dequantise import (
    SCRATCH_BYTES,
    CopyTypes,
    most_unclaimed,
    scratch_pages,
    scratch_rows,
)
from swath.backends.triton.heuristics.launch import UNMEASURED, SplitLaunch, fitting
from swath.backends.triton.heuristics.splits import SHORT_RUN, even_slices, keys_in_sight, num_splits
from swath.backends.triton.heuristics.tiles import pack_heads
from swath.backends.triton.work import Work
from swath.cache import PagedKeys, PagedKV
from swath.pages import PageTable
from swath.problem import Problem
from swath.target import SHARED_BYTES, Target

ROW = {name: values[0] for name, values in OPTIONS.items()}


def problem(**row: str) -> Problem:
    return problem_of(ROW | row)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("storage", OPTIONS["storage"])
@pytest.mark.parametrize("head_dim", OPTIONS["head_dim"])
def test_a_launch_fits_the_target(arch: str, storage: str, head_dim: str) -> None:
    for window in ("none", "size"):
        work = Work(problem(storage=storage, head_dim=head_dim, window=window), Target(arch, 132))
        tile = TRITON.tile_launch(work)
        for block_m, launch in [(tile.block_m, tile)] + [(m, TRITON.split_launch(work, m)) for m in (16, 32, 64)]:
            assert launch.block_n >= 16
            assert launch.stages >= 1
            assert fitting(launch, work.features, block_m, work.target) == launch, "what fits stays"


@pytest.mark.parametrize("head_dim", OPTIONS["head_dim"])
def test_a_row_says_where_it_was_measured(head_dim: str) -> None:
    F = features_of(problem(head_dim=head_dim), Target("sm_90", 132))
    for block_m, keys in itertools.product((16, 32, 64), (128, 1024, 8192)):
        later = block_m == 16 and head_dim == "128" and keys == 128
        assert nvidia.split_row(F, block_m, keys).source == (nvidia.H200_LATER if later else nvidia.H200)
        assert amd.split_row(F, block_m, keys).source == amd.tile_row(F, short_window=keys == 128).source == UNMEASURED
    assert (nvidia.tile_row(F, short_window=False).source == nvidia.H200) == (int(head_dim) <= 128)


@pytest.mark.parametrize(
    ("row", "keys", "launch"),
    [
        ({}, 128, (32, 2, 3, 4)),
        ({}, nvidia.FEW_KEYS, (32, 2, 3, 4)),
        ({}, nvidia.FEW_KEYS + 1, (64, 4, 3, 2)),
        ({"queries": "decode of 9"}, 128, (32, 2, 3, 4)),
        ({"queries": "decode of 9"}, 512, (32, 4, 4, 2)),
        ({"queries": "decode of 12"}, 513, (32, 4, 4, 2)),
        ({"queries": "decode of 12"}, nvidia.SOME_KEYS + 1, (64, 4, 3, 2)),
        ({}, 512, (64, 4, 3, 2)),  # groups of 8: not measured
        ({"head_dim": "64"}, 128, (32, 1, 4, 8)),  # gpt-oss keeps its row
        ({"head_dim": "80"}, 128, (32, 2, 4, 4)),
        ({"head_dim": "256"}, 128, (64, 4, 2, 2)),
        ({"storage": "int8 compute"}, 128, (64, 4, 3, 2)),
        ({"storage": "int8 token"}, 128, (32, 1, 2, 8)),
        ({"head_dim": "256", "storage": "int8 token"}, 128, (128, 4, 2, 2)),
        ({"head_dim": "256", "storage": "int8 token", "paging": "64"}, SHORT_RUN, (32, 2, 3, 4)),
        ({"head_dim": "256", "storage": "int8 token", "paging": "64"}, SHORT_RUN + 1, (128, 4, 2, 2)),
        ({"head_dim": "256/128", "storage": "int8 token", "paging": "64"}, 128, (128, 4, 2, 2)),
        ({"head_dim": "192/128", "storage": "int8 token"}, 8192, (128, 4, 2, 2)),
        ({"head_dim": "256", "storage": "e4m3 head"}, 8192, (32, 2, 3, 4)),
        ({"head_dim": "192/128"}, 8192, (64, 4, 3, 2)),
        ({"head_dim": "192/128"}, 128, (32, 4, 3, 2)),
        ({"head_dim": "192"}, 8192, (32, 4, 3, 2)),
        ({"head_dim": "192/128", "storage": "int8 compute"}, 8192, (32, 4, 3, 2)),
        ({"head_dim": "512"}, nvidia.SHORT_RUN, (16, 4, 3, 2)),
        ({"head_dim": "512"}, nvidia.SHORT_RUN + 1, (32, 4, 3, 1)),
        ({"head_dim": "512", "storage": "int8 compute"}, 128, (32, 4, 2, 2)),
    ],
)
def test_a_row_of_decode_goes_by_the_keys_that_a_query_sees(
    row: dict[str, str], keys: int, launch: tuple[int, int, int, int]
) -> None:
    F = features_of(problem(**row), Target("sm_90", 132))
    found = nvidia.split_row(F, 16, keys)
    assert (found.block_n, found.warps, found.stages, found.resident) == launch


@pytest.mark.parametrize(
    ("head_dim", "block_m"), [("128", 32), ("128", 64), ("192/128", 32), ("192/128", 64), ("512", 32)]
)
def test_rows_of_more_steps_are_those_of_before(head_dim: str, block_m: int) -> None:
    F = features_of(problem(head_dim=head_dim), Target("sm_90", 132))
    launches = {replace(nvidia.split_row(F, block_m, keys), source="") for keys in (128, 512, 1024, 8192)}
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("head_dim", "storage", "keys", "rows", "launch"),
    [
        ("256", "int8 channel", 8192, 32, (64, 4, 3, 2)),
        ("256", "int8 channel", SHORT_RUN, 16, (32, 2, 3, 4)),
        ("256", "int8 token", 8192, 16, (128, 4, 2, 2)),
        ("192/128", "int8 token", 8192, 32, (128, 4, 2, 2)),
        ("192/128", "e4m3 head", 8192, 32, (128, 4, 2, 2)),
        ("80", "int8 token", SHORT_RUN, 32, (64, 4, 3, 4)),
        ("512", "int8 channel", 8192, 16, (32, 4, 3, 2)),
        ("256", "int8 compute", 8192, 32, (64, 4, 2, 2)),
    ],
)
def test_programs_of_more_rows_for_wide_heads_over_8_bits(
    head_dim: str, storage: str, keys: int, rows: int, launch: tuple[int, int, int, int]
) -> None:
    """Four steps of groups of 8."""
    call = problem(queries="steps", head_dim=head_dim, storage=storage)
    work = Work(replace(call, max_kv_len=keys), Target("sm_90", 132))
    assert TRITON.split_rows(work, 4) == rows
    found = TRITON.split_launch(work, rows)
    assert (found.block_n, found.warps, found.stages, found.resident) == launch


@pytest.mark.parametrize("owners", [32, 128, 256, 512, 1024, 2048])
def test_short_runs_that_fill_a_round_are_not_cut(owners: int) -> None:
    """A reduce takes longer than what a cut wins: two slices took 92.8 us where one took 78.0."""
    for keys, group in ((128, 5), (nvidia.FEW_KEYS, 5), (512, 9), (nvidia.SOME_KEYS, 12)):
        launch = nvidia.split_row(features_of(problem(queries=f"decode of {group}"), Target("sm_90", 132)), 16, keys)
        if keys <= nvidia.FEW_KEYS or owners >= 256:
            assert num_splits(owners, -(-keys // launch.block_n), launch, 132) == 1


def test_a_window_with_few_leading_keys_has_the_row_of_the_window() -> None:
    target = Target("sm_90", 132)
    alone, more = (Work(replace(problem(), window=Window(128, global_tokens=n)), target) for n in (0, 64))
    assert TRITON.split_launch(alone, 16) == TRITON.split_launch(more, 16) == nvidia.split_row(alone.features, 16, 128)


def test_rows_come_from_the_table_of_the_vendor() -> None:
    call = problem()
    sources = {arch: TRITON.split_launch(Work(call, Target(arch)), 16).source for arch in (*TARGETS, "interpreter")}
    assert {arch for arch, source in sources.items() if source == UNMEASURED} == {"gfx942", "gfx950"}
    assert sources["interpreter"] == "interpreter"


def test_an_unknown_target_gets_the_least_shared_memory() -> None:
    assert Target("sm_77").shared_bytes == min(SHARED_BYTES.values())


@pytest.mark.parametrize(
    ("owners", "tiles", "resident", "slices"),
    [
        (8, 2048, 2, 33),  # one full round
        (64, 64, 2, 4),
        (256, 256, 2, 1),
        (256, 512, 2, 2),  # no slice is longer than 256 tiles where two run on a multiprocessor
        (256, 256, 4, 2),
        (512, 128, 2, 1),  # two full rounds
        (512, 256, 4, 2),  # no slice is longer than 128 tiles where four do
        (1024, 16, 2, 1),
        (100, 1024, 2, 5),  # two rounds, for one would leave a quarter of the places empty
        (1, 1, 2, 1),
        (10**6, 256, 2, 1),
        (10**6, 4096, 2, 16),
        (1, 12, 2, 3),  # no slice under four tiles
    ],
)
def test_slices_fill_their_rounds(owners: int, tiles: int, resident: int, slices: int) -> None:
    launch = SplitLaunch(64, 4, 3, "here", resident=resident)
    assert num_splits(owners, tiles, launch, 132) == slices


def test_the_bound_of_a_slice_counts_keys() -> None:
    """Tiles half as wide are no reason to cut twice."""
    narrow, wide = (SplitLaunch(keys, 2, 4, "here", resident=4) for keys in (32, 64))
    assert num_splits(512, 256, narrow, 132) == num_splits(512, 128, wide, 132) == 1


@pytest.mark.parametrize(("tiles", "count", "least"), [(1024, 8, 16), (64, 33, 2), (12, 3, 4), (0, 1, 1)])
def test_short_sequences_beside_long_ones_stay_whole(tiles: int, count: int, least: int) -> None:
    assert even_slices(SplitLaunch(64, 4, 3), count, tiles).least_tiles == least


@pytest.mark.parametrize(
    ("group", "short", "packed"), [(8, True, 8), (8, False, 1), (3, True, 1), (64, True, 1), (1, True, 1)]
)
def test_heads_are_packed_for_short_windows(group: int, short: bool, packed: int) -> None:
    assert pack_heads(group, short, 64) == packed


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"queries": "ragged", "storage": "int8 token"}, True),
        ({"queries": "decode", "storage": "int8 token"}, False),
        ({"queries": "ragged", "storage": "bf16"}, False),
        ({"queries": "ragged", "storage": "int8 compute"}, False),
        ({"queries": "dense", "storage": "bf16"}, False),
        ({"queries": "ragged", "storage": "int8 token", "paging": "split 256"}, False),  # bits depend on no batch
    ],
)
def test_long_prefills_over_8_bit_caches_dequantise_once(row: dict[str, str], expected: bool) -> None:
    assert (TRITON.copies(problem(**row)) is not None) is expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"storage": "int8 channel"}, CopyTypes()),
        ({"storage": "int8 compute"}, CopyTypes("int8", k_stays=True)),
        ({"storage": "int8 compute", "head_dim": "256"}, CopyTypes("int8", k_stays=True)),
        ({"storage": "int8 compute", "head_dim": "64"}, CopyTypes()),  # slower than in 16 bits
        ({"storage": "int8 compute", "window": "size"}, CopyTypes()),
        ({"storage": "queries head"}, CopyTypes("e4m3", k_stays=True)),
        ({"storage": "queries none", "head_dim": "64", "window": "size"}, CopyTypes("e4m3", k_stays=True)),
        ({"storage": "queries channel"}, None),  # those scales would go into q, and round it
        ({"storage": "queries token"}, None),
        ({"storage": "queries head", "paging": "split 256"}, None),
        ({"storage": "queries head", "queries": "steps"}, None),
        ({"storage": "bf16"}, None),
    ],
)
def test_hopper_keeps_keys_in_8_bits_where_that_pays(row: dict[str, str], expected: CopyTypes | None) -> None:
    assert copies(problem(**{"queries": "ragged"} | row)) == expected


def long_batch(seqs: int, tokens: int, pages: int) -> Problem:
    """A ragged call over int8 keys in tables of ``pages`` pages of 16 x 2 heads of 128."""
    call = problem(queries="ragged", storage="int8 token")
    assert isinstance(call.keys, PagedKeys)
    table = PageTable(torch.zeros(seqs, pages, dtype=torch.int32))
    keys = replace(call.keys, table=table, seq_lens=torch.zeros(seqs, dtype=torch.int32))
    q = torch.empty(tokens, 16, 128, dtype=torch.bfloat16)
    return replace(call, q=q, keys=keys, max_kv_len=keys.capacity)


MOST_PAGES = SCRATCH_BYTES // (2 * 16 * 2 * 128 * 2)
"""That the bound has room for, as K and V in bf16."""


@pytest.mark.parametrize(
    ("seqs", "tokens", "pages", "rows"),
    [
        (2, 512, 64, 2),
        (64, 17 * 64, 64, 64),
        (64, 17 * 5 + 16, 64, 5),  # five sequences of 17 tokens; one of 16 is for splits
        (64, 16, 64, 0),
        (64, 4096, MOST_PAGES // 3, 2),  # the table takes room as well
        (64, 4096, MOST_PAGES // 3 - 64, 3),
        (1, 4096, MOST_PAGES, 0),
        (1, 4096, MOST_PAGES - 16, 1),
        (64, 4096, 0, 0),
    ],
)
def test_scratch_has_rows_for_who_may_need_one_as_far_as_they_fit(
    seqs: int, tokens: int, pages: int, rows: int
) -> None:
    call = long_batch(seqs, tokens, pages)
    assert isinstance(call.keys, PagedKeys)
    assert scratch_rows(call, call.keys) == rows
    assert (TRITON.copies(call) is not None) == (rows > 0)


def test_max_kv_len_bounds_the_scratch() -> None:
    call = long_batch(64, 4096, MOST_PAGES)
    assert TRITON.copies(call) is None
    assert TRITON.copies(replace(call, max_kv_len=1024)) is not None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [1, 8, 16, 48])
def test_scratch_holds_the_pages_that_neighbouring_queries_see(page_size: int, causal: bool) -> None:
    draw = random.Random(page_size)
    call = long_batch(1, 4096, 2048 // page_size)
    assert isinstance(call.keys, PagedKeys)
    shape = (1, 2, page_size, 128)
    keys = replace(call.keys, cache=PagedKV(torch.empty(shape), torch.empty(shape)))
    room, most = [], []
    for _ in range(300):
        window = Window(draw.randint(0, 60), global_tokens=draw.randint(0, 60), causal=causal)
        queries, first = draw.randint(1, 60), draw.randint(-70, 2000)
        room.append(scratch_pages(replace(call, keys=keys, window=window, max_q_len=queries, max_kv_len=2000), keys))
        lead, left, right = window.key_ranges(first, first + queries - 1, 2000)
        seen = {page for span in (range(lead), range(left, right)) for page in (k // page_size for k in span)}
        most.append(len(seen))
    assert all(pages >= seen for pages, seen in zip(room, most, strict=True))
    assert any(pages == seen for pages, seen in zip(room, most, strict=True)) or page_size == 1


def test_a_window_leaves_room_for_more_sequences() -> None:
    call = replace(long_batch(64, 4096, MOST_PAGES // 3), max_q_len=100)
    assert isinstance(call.keys, PagedKeys)
    windowed = replace(call, window=Window(1000, global_tokens=4))
    assert scratch_pages(windowed, call.keys) == (999 + 100 + 4 + 15) // 16 + 2
    assert scratch_rows(call, call.keys) == 2
    assert scratch_rows(windowed, call.keys) == 64


def test_where_all_have_as_many_tokens_each_may_need_a_row() -> None:
    call = replace(long_batch(40, 1, 64), q=torch.empty(40, 20, 16, 128), cu_seqlens_q=None)
    assert most_unclaimed(call) == 40


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"window": "none"}, "window", False),
        ({"window": "size+tensor"}, "lead", "tensor"),
        ({"storage": "int8 token"}, "pairs", True),
        ({"storage": "int8 compute"}, "pairs", False),
        ({"storage": "fp32"}, "fp32", True),
        ({"paging": "544"}, "page_size", 544),
        ({"queries": "dense"}, "page_size", 0),
    ],
)
def test_features_name_what_a_kernel_is_compiled_for(change: dict[str, str], field: str, value: Any) -> None:
    assert getattr(features_of(problem(**change), Target("sm_90", 132)), field) == value


def test_pairs_need_even_rows_and_a_target_that_converts() -> None:
    e4m3 = problem(storage="e4m3 head")
    assert not features_of(e4m3, Target("sm_80")).pairs, "fp8 conversion came with sm_89"
    assert features_of(e4m3, Target("sm_89")).pairs
    assert not features_of(e4m3, Target("gfx942")).pairs


def test_the_window_size_is_no_feature() -> None:
    target = Target("sm_90", 132)
    one = features_of(problem(window="size"), target)
    assert one == features_of(replace(problem(window="size"), window=Window(7)), target)


@pytest.mark.parametrize("split_size", [None, 256])
@pytest.mark.parametrize("most", [None, 0, 4000, 2**31 - 1])
def test_bounds_size_launches_but_decide_no_bit_with_split_size(split_size: int | None, most: int | None) -> None:
    """How many leading keys a tensor counts is bounded by a promise: slices whose bits must not change ignore it."""
    counts = torch.zeros(2, dtype=torch.int32)
    one = replace(problem(), window=Window(1024, global_tokens=counts, max_global_tokens=most), split_size=split_size)
    if split_size is None:
        assert keys_in_sight(one, 1) == min(1024 + (8192 if most is None else most), 8192)
    else:
        assert keys_in_sight(one, 1) == 1024
        assert keys_in_sight(replace(one, window=Window(1024, global_tokens=9)), 1) == 1033, "a number is no promise"
