"""What the Hopper backend answers for attention, dense or paged: prefill tiles by Gluon, the rest as Triton does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swath.backends.hopper.heuristics import (
    BOX_ALIGNMENT,
    HOPPER,
    MOST_TOKENS,
    MOST_V_COLUMNS,
    HopperHeuristics,
    copies,
    decodes_in_tiles,
    in_boxes,
)
from swath.backends.triton.attention import Runner
from swath.backends.triton.features import STORED
from swath.backends.triton.heuristics.splits import MAX_STEPS
from swath.cache import PagedKeys
from swath.problem import Problem
from swath.target import target_of, why_no_triton

if TYPE_CHECKING:
    from swath.backends.triton.plan import Tiles

NAME = "hopper"
ARCH = "sm_90"
HEAD_DIMS = (64, 128, 192, 256, 512)
V_HEAD_DIMS = (64, 128, 256)
DOTS_HEAD_DIMS = (64, 128, 256)


def why_not(problem: Problem) -> str | None:
    """Needs an sm_90 GPU and a call that the kernel was made for."""
    device = problem.q.device
    if device.type != "cuda":
        return f"made for {ARCH}, tensors are on the {device.type}"
    reason = why_no_triton(device)
    if reason is not None:
        return reason
    target = target_of(device)
    if target.arch != ARCH:
        return f"made for {ARCH}, this is {target.arch}"
    remembered: str | None = problem.remembered(f"why_not {NAME}", lambda: why_not_tiles(problem, target.num_sms))
    return remembered


def why_not_tiles(problem: Problem, num_sms: int) -> str | None:
    """What the kernel lacks for a call, on any machine: it multiplies 16-bit tiles that it fetches in boxes."""
    keys = problem.keys
    if problem.max_q_len <= MAX_STEPS and not decodes_in_tiles(problem, num_sms):
        reason = f"at most {MAX_STEPS} query tokens a sequence: decode is the triton backend's"
        return f"{reason}, unless many sequences see about 1,024 keys or have many rows (16-bit caches, heads of 128)"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim {problem.head_dim}; it has {', '.join(map(str, HEAD_DIMS))}"
    v_head_dims = (256, 512) if problem.head_dim == 512 else V_HEAD_DIMS
    if problem.v_head_dim not in v_head_dims:
        return f"v_head_dim {problem.v_head_dim}; it has {', '.join(map(str, v_head_dims))}"
    if problem.v_head_dim > MOST_V_COLUMNS and problem.in_place:
        return "an out that is q: each half of such values has a launch, and the second reads q after the first wrote"
    types = copies(problem)
    if problem.q.dtype == torch.float8_e4m3fn and types is None:
        return "fp8 queries; they multiply with e4m3 keys in long prefills, without K scales a channel or token"
    if problem.q.dtype == torch.float32:
        return f"{problem.q.dtype} queries; it multiplies values of 16 and 8 bits"
    if types and types.dots and problem.head_dim not in DOTS_HEAD_DIMS:
        return f"head_dim {problem.head_dim} of fp8 queries; they have {', '.join(map(str, DOTS_HEAD_DIMS))}"
    if problem.keys.capacity + problem.q.shape[:-2].numel() > MOST_TOKENS:
        return f"room for more than {MOST_TOKENS:,} keys and query tokens in a sequence"
    fetched = [problem.q]
    if not isinstance(keys, PagedKeys):
        fetched += [keys.k, keys.v]
    elif keys.cache.page_size % 8:
        return f"page_size {keys.cache.page_size}; its boxes have 8 rows or more"
    elif keys.cache.k.dtype not in STORED:
        fetched += [keys.cache.k, keys.cache.v]
    elif types is None:
        return "8-bit keys that are decoded in the tiles, not copied first"
    if not all(map(in_boxes, fetched)):
        return f"q, k or v is empty, or has a stride or an address that is no multiple of {BOX_ALIGNMENT} bytes"
    return None


def _tiles() -> Tiles[HopperHeuristics]:
    from swath.backends.hopper.plan import hopper_tiles  # here, so that asking why_not needs no Triton

    return hopper_tiles


runner = Runner(NAME, HOPPER, _tiles)
plan, warm, run, ready = runner.plan, runner.warm, runner.run, runner.ready
