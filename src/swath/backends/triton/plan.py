"""From a call to a plan of kernel launches: which of them takes which sequences, and with what tiles and scratch.

A launch is made in two steps: heuristics say how (rows of tables, sizes), a function here or in a backend's own plan.py
turns that into a ``KernelCall``. ``plan_of`` puts them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from swath.backends.triton.arguments import shared_args, shared_views, with_positive_scale
from swath.backends.triton.features import Features, kernel_dtype
from swath.backends.triton.heuristics import Heuristics
from swath.backends.triton.heuristics.dequantise import (
    CopyTypes,
    most_unclaimed,
    scratch_pages,
    scratch_rows,
    table_pages,
)
from swath.backends.triton.heuristics.splits import Slices, ceil_div, even_slices, fixed_slices, in_step, is_mixed
from swath.backends.triton.heuristics.tiles import is_short, pack_heads, tile_slots
from swath.backends.triton.kernels.dequantise import dequantise_kernel
from swath.backends.triton.kernels.quantise import quantise_kernel
from swath.backends.triton.kernels.reduce import reduce_kernel
from swath.backends.triton.kernels.split import split_kernel
from swath.backends.triton.kernels.tile import tile_kernel
from swath.backends.triton.runtime import KernelCall, Plan, Scratch
from swath.backends.triton.work import Copied, Work
from swath.cache import PagedKeys, PagedKV
from swath.pages import PageTable
from swath.problem import Problem
from swath.target import Target

REDUCE_CHUNK = 16
REDUCE_COLUMNS = 256
"""The most output columns of a warp of a reduce: with them, a chunk fills its registers."""
DEQUANTISE_TOKENS = 16
QUANTISE_ROWS = 32
"""Query tokens of a head that a program of ``quantise_kernel`` has."""

H = TypeVar("H", bound=Heuristics)
Tiles = Callable[[Work, Scratch, H], Sequence[KernelCall]]
"""Makes the launches of a backend's tiles, and adds what scratch they take, as ``triton_tiles`` does."""


def plan_of(problem: Problem, target: Target, heuristics: H, tiles: Tiles[H]) -> Plan:
    """The launches of a call, in order: splits and their reduce, or tiles, or all of them in a mixed batch.

    ``tiles``: the backend's. They take 16-bit keys and copies; 8-bit keys that tiles decode are for Triton's.
    """
    plan = Plan()
    if problem.num_seqs == 0 or problem.q.numel() == 0:
        return plan
    work = Work(with_positive_scale(problem), target)
    steps = heuristics.split_steps(problem)
    if steps:
        plan.calls.extend(splits(work, steps, plan.scratch, heuristics))
    if steps and not is_mixed(problem):
        return plan
    rest = [replace(work, claimed=steps)]
    types = heuristics.copies(problem)
    if types is not None:
        copies, rest = copied(rest[0], types, plan.scratch)
        plan.calls.extend(copies)
    for part in rest:
        made = triton_tiles if part.features.quantised else tiles
        plan.calls.extend(made(part, plan.scratch, heuristics))
    return plan


def splits(work: Work, steps: int, scratch: Scratch, heuristics: Heuristics) -> list[KernelCall]:
    """Splits for the sequences of at most ``steps`` query tokens, and the reduce where they are cut."""
    F = work.features
    block_m = heuristics.split_rows(work, steps)
    owners = work.problem.num_seqs * ceil_div(steps * F.group, block_m) * F.kv_heads
    slices = slices_of(work, steps, block_m, owners, heuristics)
    launch = slices.launch
    args = shared_args(work, F) | {"steps": steps, "num_splits": slices.count}
    args |= {"least_tiles": slices.least_tiles, "slice_tiles": slices.tiles}
    args |= {"BLOCK_M": block_m, "BLOCK_N": launch.block_n, "STAGES": launch.stages}
    options: dict[str, Any] = {"num_warps": launch.warps}
    calls = [KernelCall(split_kernel, owners * slices.count, args, options, views=shared_views(work, F))]
    if slices.count > 1:
        tile_rows = min(block_m, steps * F.group)
        rows = owners * slices.count * tile_rows
        scratch.add("partial", torch.float32, rows * (F.v_head_dim + 2))
        scratch.add("counts", torch.int32, owners)
        block_d = 1 << (F.v_head_dim - 1).bit_length()
        args = args | {"BLOCK_D": block_d, "CHUNK": REDUCE_CHUNK}
        options = {"num_warps": ceil_div(block_d, REDUCE_COLUMNS)} | ({"launch_pdl": True} if F.pdl else {})
        calls.append(KernelCall(reduce_kernel, owners * tile_rows, args, options))
    return calls


def slices_of(work: Work, steps: int, block_m: int, owners: int, heuristics: Heuristics) -> Slices:
    """How splits of ``block_m`` rows cut the keys of ``owners`` (sequences x row tiles x kv heads)."""
    problem, target, F = work.problem, work.target, work.features
    launch = heuristics.split_launch(work, block_m)
    if problem.split_size is not None:
        visible = problem.window.visible_bound(steps, problem.max_kv_len)
        return fixed_slices(launch, problem.split_size, visible)
    visible = problem.window.visible_guess(steps, problem.max_kv_len)
    busy = problem.num_seqs * F.kv_heads if is_mixed(problem) else owners  # programs for later rows mostly return
    tiles = ceil_div(visible, launch.block_n)
    count = heuristics.num_splits(busy, tiles, launch, target.num_sms)
    return even_slices(in_step(launch, F, block_m, busy * count, target), count, tiles)


def triton_tiles(work: Work, _scratch: Scratch, heuristics: Heuristics) -> tuple[KernelCall]:
    """Triton's tiles for the sequences that no other launch claims."""
    F, problem = work.features, work.problem
    launch = heuristics.tile_launch(work)
    block_m = launch.block_m
    pack = pack_heads(F.group, is_short(problem), block_m)
    steps, slots = tile_slots(problem, block_m // pack)
    args = shared_args(work, F) | {"steps": steps, "BLOCK_M": block_m, "PACK": pack}
    args |= {"BLOCK_N": launch.block_n, "STAGES": launch.stages}
    grid, options = slots * (F.kv_heads * F.group // pack), {"num_warps": launch.warps}
    return (KernelCall(tile_kernel, grid, args, options, work.sources, shared_views(work, F)),)


def copied(work: Work, types: CopyTypes, scratch: Scratch) -> tuple[list[KernelCall], list[Work]]:
    """The launch that copies visible pages into scratch, and what tiles then see: the scratch as a 16-bit cache, or
    (``CopyTypes.k_stays``) K in its own cache and V in the scratch, each by a table of its own.

    The copy has the stored values where their scales can be applied to scores or results later. For products of
    queries and keys in int8 one more launch prepares the queries. Where more sequences may need the scratch than have
    room there, a second work is for the others, over the cache itself.
    """
    problem = work.problem
    keys = cast(PagedKeys, problem.keys)
    cache = keys.cache
    pages, rows, width = scratch_pages(problem, keys), scratch_rows(problem, keys, types), table_pages(problem, keys)
    shape = (rows * pages, cache.num_kv_heads, cache.page_size)
    dtype, dots, v_e4m3 = problem.out.dtype, types.dots, types.v_e4m3
    rows_of_v = (*shape[:2], cache.v_head_dim, cache.page_size) if v_e4m3 else (*shape, cache.v_head_dim)
    if not types.k_stays:
        scratch.add("new_k", cache.k.dtype if dots else dtype, *shape, cache.head_dim)
    scratch.add("new_v", torch.float8_e4m3fn if v_e4m3 else dtype, *rows_of_v)
    scratch.add("new_table", torch.int32, problem.num_seqs, width)
    int8 = work.features.compute_int8 or dots == "int8"
    F = replace(work.features, pairs=False, dots=dots, v_e4m3=v_e4m3, compute_int8=int8)
    folds = F.copied_k_fold, F.copied_v_fold
    names = {"v": "new_v"}
    names |= {"v_table": "new_table"} if types.k_stays else {"k": "new_k", "table": "new_table", "table_index": ""}
    names |= {f"{name}_scale": "" for name, fold in zip("kv", folds, strict=True) if fold == "none"}
    calls = [copying(work, F, pages, rows, width)]
    if dots == "int8":
        calls.append(quantising(work, F, scratch))
        names |= {"q": "new_q", "q_scale": "new_q_scale"}
    seen = replace(problem, keys=keys_of_tiles(keys, rows * pages, width, types, dtype))
    parts = [replace(work, problem=seen, sources=names, copied=Copied(*folds, dots, v_e4m3))]
    if rows < most_unclaimed(problem):
        scratch.add("copied", torch.int32, 3)
        scratch.add("others", torch.int32, 3)
        parts = [replace(parts[0], sources=names | {"claimed": "copied"}), replace(work, sources={"claimed": "others"})]
    return calls, parts


def keys_of_tiles(keys: PagedKeys, pages: int, width: int, types: CopyTypes, dtype: torch.dtype) -> PagedKeys:
    """The keys that tiles over a copy are planned for: a 16-bit cache on "meta".

    It has as many pages as the scratch, ``pages``, or as the cache where K stays there.
    """
    cache, table = keys.cache, keys.table
    if types.k_stays:
        pages = cache.num_pages
    else:
        table = PageTable(torch.empty(keys.seq_lens.shape[0], width, dtype=torch.int32, device="meta"))
    k, v = (
        torch.empty(pages, cache.num_kv_heads, cache.page_size, dim, dtype=dtype, device="meta")
        for dim in (cache.head_dim, cache.v_head_dim)
    )
    return PagedKeys(PagedKV(k, v), table, keys.seq_lens)


def copying(work: Work, F: Features, pages: int, rows: int, width: int) -> KernelCall:
    """The launch that fills ``rows`` rows of ``pages`` pages, and a table of ``width`` entries for each sequence."""
    problem = work.problem
    steps = problem.q.shape[0] if problem.cu_seqlens_q is not None else problem.steps
    args = shared_args(work, F) | {"pages": pages, "width": width, "steps": steps, "BLOCK_T": DEQUANTISE_TOKENS}
    grid = rows * pages * F.kv_heads
    stored = cast(PagedKeys, problem.keys).cache.k.dtype
    views = shared_views(work, F) | ({"new_k": kernel_dtype(stored)} if F.dots else {})
    views |= {"new_v": torch.uint8} if F.v_e4m3 else {}
    return KernelCall(dequantise_kernel, grid, args, {"num_warps": 4}, views=views)


def quantising(work: Work, F: Features, scratch: Scratch) -> KernelCall:
    """The launch that makes all query rows ones of int8."""
    problem = work.problem
    shape = problem.q.shape[:-1]
    scratch.add("new_q", torch.int8, *problem.q.shape)
    scratch.add("new_q_scale", torch.float32, *shape)
    steps, rows = (problem.steps if problem.q.dim() == 4 else shape[0]), shape[:-1].numel()
    args = shared_args(work, F) | {"steps": steps, "num_rows": rows, "ROWS": QUANTISE_ROWS}
    return KernelCall(quantise_kernel, ceil_div(rows, QUANTISE_ROWS) * shape[-1], args, {"num_warps": 4})
