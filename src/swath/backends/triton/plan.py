"""From a Problem to a plan of kernel launches: which schedule claims which rows, their arguments, and the tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from swath.backends.triton.features import Features, features_of, kernel_dtype, kernel_scale, token_strides
from swath.backends.triton.heuristics import (
    MAX_STEPS,
    ceil_div,
    dequantises,
    in_step,
    is_mixed,
    is_short,
    is_short_run,
    least_tiles_for,
    most_unclaimed,
    num_splits_for,
    pack_heads,
    scratch_pages,
    scratch_rows,
    split_launch,
    split_rows,
    table_pages,
    tile_launch,
    tile_slots,
)
from swath.backends.triton.kernels.dequantise import dequantise_kernel
from swath.backends.triton.kernels.reduce import reduce_kernel
from swath.backends.triton.kernels.split import split_kernel
from swath.backends.triton.kernels.tile import tile_kernel
from swath.backends.triton.runtime import KernelCall, Operands, Plan
from swath.backends.triton.tuning import UNTUNED, Tuning
from swath.cache import DenseKeys, PagedKeys, PagedKV
from swath.pages import PageTable
from swath.problem import LOG2_E, Problem
from swath.target import Target

REDUCE_CHUNK = 16
LARGEST_SIZE = 1 << 30

Part = tuple[Problem, dict[str, str]]
"""A call as a launch of tiles sees it, and the operands of the kernel that go by other names."""
AddTiles = Callable[[Plan, Problem, Features, Target, dict[str, Any], dict[str, str], Tuning], None]
"""Adds the launch of a backend's own tiles over 16-bit keys to a plan: what ``add_tiles`` is here."""


def plan_of(problem: Problem, target: Target, prefill: AddTiles | None = None, tuning: Tuning = UNTUNED) -> Plan:
    """The launches of a call, in order: splits and their reduce, or prefill, or all of them in a mixed batch.

    ``prefill``: the tiles of another backend, which then takes everything as tiles but the decodes of a mixed batch.
    ``tuning``: rows to try in place of the tables' own.
    """
    plan = Plan()
    if problem.num_seqs == 0 or problem.q.numel() == 0:
        return plan
    problem = with_positive_scale(problem)
    ragged, paged = problem.cu_seqlens_q is not None, isinstance(problem.keys, PagedKeys)
    steps = min(problem.max_q_len, MAX_STEPS) if ragged else problem.steps
    splits = paged and steps <= MAX_STEPS and (prefill is None or is_mixed(problem))
    if splits:
        add_splits(plan, problem, target, steps, tuning)
    if not splits or is_mixed(problem):
        add_prefill(plan, problem, target, prefill, MAX_STEPS if splits else 0, tuning)
    return plan


def with_positive_scale(problem: Problem) -> Problem:
    """Kernels take a positive score scale; another sign goes into q, which it changes exactly."""
    if problem.scale > 0:
        return problem
    q = (problem.q.float() * (-1.0 if problem.scale < 0 else 0.0)).to(problem.q.dtype)
    return replace(problem, q=q, scale=-problem.scale or 1.0)


def operands_of(problem: Problem) -> Operands:
    """The tensors of a call by the names of kernel parameters: what a plan takes anew in every run."""
    problem = with_positive_scale(problem)
    keys, leading = problem.keys, problem.window.global_tokens
    operands: dict[str, Tensor | None] = {
        "q": problem.q,
        "out": problem.out,
        "lse": problem.lse,
        "sink": _contiguous(problem.sink),
        "q_scale": _contiguous(problem.q_scale),
        "cu_q": _contiguous(problem.cu_seqlens_q),
        "q_start": _contiguous(problem.q_start),
        "leading": leading.contiguous() if isinstance(leading, Tensor) else None,
    }
    if isinstance(keys, DenseKeys):
        return operands | {"k": keys.k, "v": keys.v, "lens": keys.cu_seqlens.contiguous()}
    cache, table = keys.cache, keys.table
    return operands | {
        "k": cache.k,
        "v": cache.v,
        "k_scale": kernel_scale(cache.k_scale),
        "v_scale": kernel_scale(cache.v_scale),
        "table": _entries(table),
        "table_index": _contiguous(table.rows if table.indptr is None else table.indptr),
        "lens": keys.seq_lens.contiguous(),
    }


def shared_args(problem: Problem, F: Features) -> dict[str, Any]:
    """The fixed arguments that attention kernels share, and more names than any of them takes."""
    window, keys = problem.window, problem.keys
    args: dict[str, Any] = {
        "scale_log2": problem.scale * LOG2_E,
        "cap_log2": problem.softcap * LOG2_E,
        "size": min(window.size or 0, LARGEST_SIZE),
        "F": F,
    }
    if F.leading != "tensor":
        args["leading"] = window.global_tokens if F.leading else 0
    for name, x in (("q", problem.q), ("out", problem.out)):
        seq, token, head = _row_strides(problem, x)
        args |= {f"{name}_seq": seq, f"{name}_token": token, f"{name}_head": head}
    return args | (_paged_args(keys, F) if isinstance(keys, PagedKeys) else _dense_args(keys))


def shared_views(problem: Problem, F: Features) -> dict[str, torch.dtype]:
    """What kernels see 8-bit tensors as."""
    views = {"q": kernel_dtype(problem.q.dtype)}
    if isinstance(problem.keys, PagedKeys):
        stored = problem.keys.cache.k.dtype
        views |= dict.fromkeys(("k", "v"), torch.int16 if F.pairs else kernel_dtype(stored))
    return views


def _row_strides(problem: Problem, x: Tensor) -> tuple[int, ...]:
    """Strides of q or out by sequence, by token of it, and by head."""
    if x.dim() == 4:
        return x.stride()[:3]
    row, head = x.stride()[:2]
    return (row, 0, head) if problem.cu_seqlens_q is None else (0, row, head)


def _paged_args(keys: PagedKeys, F: Features) -> dict[str, Any]:
    cache, table = keys.cache, keys.table
    args: dict[str, Any] = {
        "table_width": table.entries.shape[-1],
        "num_pages": cache.num_pages,
        "table_stride": _entries(table).stride(0),
    }
    for name, scale in (("ks", cache.k_scale), ("vs", cache.v_scale)):
        args |= _strides(f"{name}_page {name}_head {name}_token", token_strides(scale))
    units = 2 if F.pairs else 1
    return args | _kv_strides(*(tuple(s // units for s in x.stride()[:3]) for x in (cache.k, cache.v)))


def _dense_args(keys: DenseKeys) -> dict[str, Any]:
    absent = "ks_page ks_head ks_token vs_page vs_head vs_token table_width num_pages table_stride"
    # [Tk, Hkv, D] as one page that nobody looks up.
    k, v = ((0, *x.stride()[1::-1]) for x in (keys.k, keys.v))
    return dict.fromkeys(absent.split(), 0) | _kv_strides(k, v)


def _kv_strides(k: tuple[int, ...], v: tuple[int, ...]) -> dict[str, int]:
    """K's and V's strides for the kernels that take both, and the one set that paged ones have."""
    both = _strides("k_page k_head k_token", k) | _strides("v_page v_head v_token", v)
    return both | _strides("kv_page kv_head_stride kv_token", k)


def _strides(names: str, strides: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(names.split(), strides, strict=True))


def add_splits(plan: Plan, problem: Problem, target: Target, steps: int, tuning: Tuning) -> None:
    """Splits for the sequences of at most ``steps`` query tokens, and the reduce where they are cut."""
    F = features_of(problem, target)
    block_m = tuning.split_rows or split_rows(F, problem, steps)
    row_tiles = ceil_div(max(steps, 1) * F.group, block_m)
    tile_rows = min(block_m, steps * F.group)
    owners = problem.num_seqs * row_tiles * F.kv_heads
    busy = problem.num_seqs * F.kv_heads if is_mixed(problem) else owners
    launch = tuning.split or split_launch(F, target, block_m, is_short_run(problem))
    visible = problem.window.visible_bound(steps, problem.max_kv_len)
    block_n, slice_tiles, least_tiles = launch.block_n, 0, 1
    if problem.split_size is None:
        tiles = ceil_div(visible, block_n)
        num_splits = tuning.num_splits or num_splits_for(busy, tiles, launch, target.num_sms)
        least_tiles = least_tiles_for(tiles, num_splits)
        launch = in_step(launch, F, block_m, busy * num_splits, target)
    else:
        block_n = min(block_n, problem.split_size & -problem.split_size)
        slice_tiles = problem.split_size // block_n
        num_splits = ceil_div(visible, problem.split_size) + 3
    args = shared_args(problem, F) | {"steps": steps, "num_splits": num_splits}
    args |= {"least_tiles": least_tiles, "slice_tiles": slice_tiles}
    args |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": launch.stages}
    views = shared_views(problem, F)
    plan.calls.append(KernelCall(split_kernel, owners * num_splits, args, launch.options, views=views))
    if num_splits > 1:
        rows = owners * num_splits * tile_rows
        plan.scratch.add("partial", torch.float32, rows * F.head_dim)
        plan.scratch.add("partial_state", torch.float32, rows * 2)
        plan.scratch.add("counts", torch.int32, owners)
        args = args | {"BLOCK_D": 1 << (F.head_dim - 1).bit_length(), "CHUNK": REDUCE_CHUNK}
        options = {"num_warps": 1} | ({"launch_pdl": True} if F.pdl else {})
        plan.calls.append(KernelCall(reduce_kernel, owners * tile_rows, args, options))


def add_prefill(
    plan: Plan, problem: Problem, target: Target, prefill: AddTiles | None, claimed: int, tuning: Tuning
) -> None:
    """Tiles for the sequences of more than ``claimed`` query tokens, over 8-bit keys dequantised where that pays."""
    parts: list[Part] = [(problem, {})]
    if dequantises(problem):
        parts = add_dequantise(plan, problem, target, claimed)
    for part, sources in parts:
        F = features_of(part, target)
        args = shared_args(part, F) | {"num_seqs": problem.num_seqs}
        if "claimed" not in sources:
            args["claimed"] = claimed
        if prefill is not None and F.stored == "wide":
            prefill(plan, part, F, target, args, sources, tuning)
        else:
            add_tiles(plan, part, F, target, args, sources, tuning)
            tuning = UNTUNED  # a row is for one launch


def add_tiles(
    plan: Plan,
    problem: Problem,
    F: Features,
    target: Target,
    args: dict[str, Any],
    sources: dict[str, str],
    tuning: Tuning,
) -> None:
    """Triton's tiles for the sequences of a part; ``sources``: where their keys are."""
    short = is_short(problem.window)
    block_m, launch = tuning.tile or tile_launch(F, target, short)
    pack = pack_heads(F.group, short, block_m)
    steps, slots = tile_slots(problem, block_m // pack)
    args |= {"steps": steps, "BLOCK_M": block_m, "PACK": pack, "BLOCK_N": launch.block_n, "STAGES": launch.stages}
    grid = slots * (F.kv_heads * F.group // pack)
    plan.calls.append(KernelCall(tile_kernel, grid, args, launch.options, sources, shared_views(problem, F)))


def add_dequantise(plan: Plan, problem: Problem, target: Target, claimed: int) -> list[Part]:
    """The launch that copies visible pages into 16-bit scratch, and what tiles then see: the scratch as a cache.

    Where more sequences may need it than have room there, a second part is for the others, over the cache itself.
    """
    keys = cast(PagedKeys, problem.keys)
    F, cache = replace(features_of(problem, target), pairs=False), keys.cache
    pages, rows, width = scratch_pages(problem, keys), scratch_rows(problem, keys), table_pages(problem, keys)
    shape = (rows * pages, cache.num_kv_heads, cache.page_size, cache.head_dim)
    plan.scratch.add("new_k", problem.q.dtype, *shape)
    plan.scratch.add("new_v", problem.q.dtype, *shape)
    plan.scratch.add("new_table", torch.int32, problem.num_seqs, width)
    steps = 0 if problem.cu_seqlens_q is not None else problem.steps
    own = {
        "pages": pages,
        "width": width,
        "claimed": claimed,
        "num_seqs": problem.num_seqs,
        "steps": steps,
        "BLOCK_T": 16,
    }
    grid, args = rows * pages * cache.num_kv_heads, shared_args(problem, F) | own
    plan.calls.append(KernelCall(dequantise_kernel, grid, args, {"num_warps": 4}, views=shared_views(problem, F)))
    made = plan.scratch.tensors("meta")
    scratch = PagedKeys(PagedKV(made["new_k"], made["new_v"]), PageTable(made["new_table"]), keys.seq_lens)
    names = {"k": "new_k", "v": "new_v", "table": "new_table"} | dict.fromkeys(
        ("k_scale", "v_scale", "table_index"), ""
    )
    copied = replace(problem, keys=scratch)
    if rows == most_unclaimed(problem):
        return [(copied, names)]
    plan.scratch.add("copied", torch.int32, 3)
    plan.scratch.add("others", torch.int32, 3)
    return [(copied, names | {"claimed": "copied"}), (problem, {"claimed": "others"})]


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Vectors of lengths and logits as kernels index them."""
    return x if x is None else x.contiguous()


def _entries(table: PageTable) -> Tensor:
    return table.entries if table.entries.stride(-1) == 1 else table.entries.contiguous()
