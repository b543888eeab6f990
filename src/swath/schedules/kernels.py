"""From a Problem to kernel launches: which schedule claims which rows, and their flat arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from swath.cache import DenseKeys, PagedKeys, PagedKV, PageTable
from swath.launch import (
    Features,
    ceil_div,
    dequantises,
    features_of,
    in_step,
    is_short,
    kernel_bytes,
    kernel_scale,
    num_splits_for,
    pack_heads,
    split_launch,
    tile_launch,
    token_strides,
)
from swath.problem import LOG2_E, Problem
from swath.schedules.dequantise import dequantise_kernel
from swath.schedules.launcher import KernelCall
from swath.schedules.reduce import reduce_kernel
from swath.schedules.splits import split_kernel
from swath.schedules.tiles import tile_kernel
from swath.target import Target

MAX_STEPS = 16
"""Query tokens that a sequence may have to be decoded by splits; longer ones are cut into tiles."""
REDUCE_CHUNK = 16
LARGEST_SIZE = 1 << 30


def calls_of(problem: Problem, target: Target) -> list[KernelCall]:
    """The launches of a call, in order: splits and their reduce, or tiles, or all three in a mixed batch."""
    if problem.num_seqs == 0 or problem.q.numel() == 0:
        return []
    problem = with_positive_scale(problem)
    F = features_of(problem, target)
    ragged, paged = problem.cu_seqlens_q is not None, isinstance(problem.keys, PagedKeys)
    steps = min(problem.max_q_len, MAX_STEPS) if ragged else problem.q.shape[1]
    splits = paged and steps <= MAX_STEPS
    tiles = not splits or (ragged and problem.max_q_len > MAX_STEPS)
    shared = _shared_args(problem, F)
    calls = _split_calls(problem, F, target, shared, steps) if splits else []
    if tiles:
        claimed = MAX_STEPS if splits else 0
        if dequantises(problem):
            call, problem = _dequantise_call(problem, replace(F, pairs=False), claimed)
            calls.append(call)
            F = features_of(problem, target)
            shared = _shared_args(problem, F)
        calls.append(_tile_call(problem, F, target, shared, claimed))
    return calls


def with_positive_scale(problem: Problem) -> Problem:
    """Kernels take a positive score scale; another sign goes into q, which it changes exactly."""
    if problem.scale > 0:
        return problem
    q = (problem.q.float() * (-1.0 if problem.scale < 0 else 0.0)).to(problem.q.dtype)
    return replace(problem, q=q, scale=-problem.scale or 1.0)


def _shared_args(problem: Problem, F: Features) -> dict[str, Any]:
    q, out, window = problem.q, problem.out, problem.window
    args: dict[str, Any] = {
        "q": kernel_bytes(q),
        "out": out,
        "lse": problem.lse,
        "sink": _contiguous(problem.sink),
        "q_scale": _contiguous(problem.q_scale),
        "cu_q": _contiguous(problem.cu_seqlens_q),
        "q_start": _contiguous(problem.q_start),
        "leading": _contiguous(window.global_tokens if F.leading else 0),
        "scale_log2": problem.scale * LOG2_E,
        "cap_log2": problem.softcap * LOG2_E,
        "size": min(window.size or 0, LARGEST_SIZE),
        "F": F,
    }
    for name, x in (("q", q), ("out", out)):
        strides = x.stride() if x.dim() == 4 else (0, *x.stride())
        args |= {f"{name}_seq": strides[0], f"{name}_token": strides[1], f"{name}_head": strides[2]}
    keys = problem.keys
    return args | (_paged_args(keys, F) if isinstance(keys, PagedKeys) else _dense_args(keys))


def _paged_args(keys: PagedKeys, F: Features) -> dict[str, Any]:
    cache, table = keys.cache, keys.table
    entries = table.entries if table.entries.stride(-1) == 1 else table.entries.contiguous()
    args: dict[str, Any] = {
        "k": _as_kernels_see(cache.k, F),
        "v": _as_kernels_see(cache.v, F),
        "table": entries,
        "indptr": _contiguous(table.indptr),
        "lens": keys.seq_lens.contiguous(),
        "max_pages": table.max_pages,
        "num_pages": cache.num_pages,
        "table_stride": entries.stride(0),
    }
    for name, scale in (("ks", cache.k_scale), ("vs", cache.v_scale)):
        page, head, token = token_strides(scale)
        args |= {f"{name}_page": page, f"{name}_head": head, f"{name}_token": token}
    return args | {"k_scale": kernel_scale(cache.k_scale), "v_scale": kernel_scale(cache.v_scale)}


def _dense_args(keys: DenseKeys) -> dict[str, Any]:
    absent = dict.fromkeys(("k_scale", "v_scale", "table", "indptr"))
    scale_strides = ("ks_page", "ks_head", "ks_token", "vs_page", "vs_head", "vs_token")
    zero = dict.fromkeys((*scale_strides, "max_pages", "num_pages", "table_stride"), 0)
    return {"k": keys.k, "v": keys.v, "lens": keys.cu_seqlens.contiguous(), **absent, **zero}


def _kv_strides(keys: PagedKeys | DenseKeys, k: Tensor, v: Tensor) -> dict[str, int]:
    if isinstance(keys, DenseKeys):  # [Tk, Hkv, D] as one page that nobody looks up
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    return {f"{n}_{s}": x.stride(i) for n, x in (("k", k), ("v", v)) for i, s in enumerate(("page", "head", "token"))}


def _as_kernels_see(pool: Tensor, F: Features) -> Tensor:
    return pool.view(torch.int16) if F.pairs else kernel_bytes(pool)


def _split_calls(problem: Problem, F: Features, target: Target, shared: dict[str, Any], steps: int) -> list[KernelCall]:
    # With split_size the shape of a program must not depend on the batch either: a row's bits would.
    smallest = F.fp32 or problem.split_size is not None
    block_m = next((m for m in (16, 32) if smallest or steps * F.group <= m), 64)
    row_tiles = ceil_div(max(steps, 1) * F.group, block_m)
    tile_rows = min(block_m, steps * F.group)
    owners = problem.num_seqs * row_tiles * F.kv_heads
    launch = split_launch(F, target, block_m)
    visible = problem.window.visible_bound(steps, problem.max_kv_len)
    block_n, slice_tiles = launch.block_n, 0
    if problem.split_size is None:
        num_splits = num_splits_for(owners, ceil_div(visible, block_n), launch.resident * target.num_sms)
        launch = in_step(launch, F, block_m, owners * num_splits, target)
    else:
        block_n = min(block_n, problem.split_size & -problem.split_size)
        slice_tiles = problem.split_size // block_n
        num_splits = ceil_div(visible, problem.split_size) + 3
    device = problem.q.device
    partial = state = counts = None
    if num_splits > 1:
        partial = torch.empty(owners * num_splits * tile_rows * F.head_dim, dtype=torch.float32, device=device)
        state = torch.empty(owners * num_splits * tile_rows * 2, dtype=torch.float32, device=device)
        counts = torch.empty(owners, dtype=torch.int32, device=device)
    pdl = num_splits > 1 and target.has_pdl
    split = {"partial": partial, "partial_state": state, "counts": counts, "num_splits": num_splits}
    common = {"steps": steps, "BLOCK_M": block_m, "PDL": pdl}
    strides = dict(zip(("kv_page", "kv_head_stride", "kv_token"), shared["k"].stride()[:3], strict=True))
    first = shared | split | common | strides
    first |= {"slice_tiles": slice_tiles, "BLOCK_N": block_n, "STAGES": launch.stages}
    calls = [KernelCall(split_kernel, owners * num_splits, first, {"num_warps": launch.warps})]
    if num_splits > 1:
        names = ("out", "lse", "sink", "cu_q", "out_seq", "out_token", "out_head", "F")
        block_d = 1 << (F.head_dim - 1).bit_length()
        second = {n: shared[n] for n in names} | split | common
        second |= {"BLOCK_D": block_d, "CHUNK": REDUCE_CHUNK}
        options = {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
        calls.append(KernelCall(reduce_kernel, owners * tile_rows, second, options))
    return calls


def _tile_call(problem: Problem, F: Features, target: Target, shared: dict[str, Any], claimed: int) -> KernelCall:
    short = is_short(problem.window)
    block_m, launch = tile_launch(F, target, short)
    pack = pack_heads(F, short, block_m)
    positions = block_m // pack
    if problem.cu_seqlens_q is None:
        steps = problem.q.shape[1]
        slots = problem.num_seqs * ceil_div(steps, positions)
    else:
        steps, slots = 0, problem.q.shape[0] // positions + problem.num_seqs
    own = {
        "steps": steps,
        "claimed": claimed,
        "num_seqs": problem.num_seqs,
        "BLOCK_M": block_m,
        "PACK": pack,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
    }
    args = shared | _kv_strides(problem.keys, shared["k"], shared["v"]) | own
    return KernelCall(tile_kernel, slots * (F.kv_heads * F.group // pack), args, {"num_warps": launch.warps})


def _dequantise_call(problem: Problem, F: Features, claimed: int) -> tuple[KernelCall, Problem]:
    """The launch that copies visible pages into 16-bit scratch, and the problem over the scratch."""
    keys = cast(PagedKeys, problem.keys)
    cache, args = keys.cache, _shared_args(problem, F)
    pages = ceil_div(min(problem.max_kv_len, keys.capacity), cache.page_size)
    shape = (problem.num_seqs * pages, cache.num_kv_heads, cache.page_size, cache.head_dim)
    k, v = (torch.empty(shape, dtype=problem.q.dtype, device=problem.q.device) for _ in range(2))
    table = torch.empty(problem.num_seqs, pages, dtype=torch.int32, device=problem.q.device)
    rows_only = {"q", "out", "lse", "sink", "q_scale", "scale_log2", "cap_log2"}
    rows_only |= {f"{x}_{s}" for x in ("q", "out") for s in ("seq", "token", "head")}
    own = {name: value for name, value in args.items() if name not in rows_only}
    own |= dict(zip(("kv_page", "kv_head_stride", "kv_token"), args["k"].stride()[:3], strict=True))
    own |= {"new_k": k, "new_v": v, "new_table": table, "pages": pages, "claimed": claimed, "BLOCK_T": 16}
    own["steps"] = 0 if problem.cu_seqlens_q is not None else problem.q.shape[1]
    call = KernelCall(dequantise_kernel, problem.num_seqs * pages * cache.num_kv_heads, own, {"num_warps": 4})
    scratch = PagedKeys(PagedKV(k, v), PageTable(table), keys.seq_lens)
    return call, replace(problem, keys=scratch)


def _contiguous(x: Any) -> Any:
    """Vectors of lengths and logits as kernels index them; None and numbers stay."""
    return x.contiguous() if isinstance(x, Tensor) else x
