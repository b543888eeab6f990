"""Calls of ``append_kv``, ``quantise_q``, ``merge_states`` and ``slots``, each beside a truth of its own."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.ops.append import append_kv
from swath.ops.merge import merge_states
from swath.ops.quantise import quantise_q
from swath.ops.slots import slots
from swath.testing.budget import UNIT
from swath.testing.fuzz.draw import Call
from swath.testing.fuzz.truth import page_lists
from swath.testing.fuzz.twists import build
from swath.testing.fuzz.verdict import BrokenError, Verdict, numbers, same_bits, taker, truncates_bf16
from swath.testing.inputs import mapped, mover

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
OUTSIDE = (-1, -(2**63), 2**63 - 1, 2**62)
"""Slots outside every cache; the first one past its end is another."""


def judge_append(call: Call, impl: str, device: torch.device | str) -> Verdict:
    """New tokens in slots anywhere: every byte of the cache after it."""
    r, case = call.random("append"), call.case
    cache = build(call).cache
    pool, tokens = cache.num_pages * cache.page_size, sum(case.row_counts)
    dtype = r.choice((torch.bfloat16, torch.float16, torch.float32))
    where = r.sample(range(pool), min(tokens, pool))
    where = [r.choice((*OUTSIDE, pool)) if r.random() < 0.1 else slot for slot in where]
    widths = {"k": case.head_dim, "v": case.v_dim}
    k, v = (_tokens(call, name, (len(where), width), dtype) for name, width in widths.items())
    args = mapped((cache, k, v, torch.tensor(where, dtype=torch.int64)), mover(device))
    backend = taker("append_kv", args, {}, impl)
    if truncates_bf16(backend, device) and _rounds_to_bf16(cache, dtype):
        return Verdict("")
    wanted = [
        after_append(x, pool, scale, where)
        for x, pool, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale))
    ]
    append_kv(*args, impl=backend)
    names = ("k", "k_scale", "v", "v_scale")
    came = (getattr(args[0], name) for name in names)
    for name, got, want in zip(names, came, (x for pair in wanted for x in pair), strict=True):
        if got is not None and want is not None and not same_bits(got.cpu(), want):
            raise BrokenError(f"append_kv: {name} has other bytes than wanted, {dtype} tokens into {case.storage}")
    return Verdict(backend)


def _rounds_to_bf16(cache: PagedKV, dtype: torch.dtype) -> bool:
    scales = [s for s in (cache.k_scale, cache.v_scale) if s is not None and s.dim() == 3]
    return cache.k.dtype == torch.bfloat16 != dtype or any(s.dtype == torch.bfloat16 for s in scales)


def _tokens(call: Call, name: str, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows [count, Hkv, width] of many magnitudes, zeros among them, for the ``size`` (count, width)."""
    case, generator, (count, width) = call.case, numbers(call, f"tokens {name}"), size
    shape = (count, case.num_kv_heads, width + (16 if case.strided else 0))
    x = torch.randn(shape, generator=generator)
    sizes = torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0, 30.0, 5e3])
    chosen = torch.randint(len(sizes), shape[:2], generator=generator)
    return (x * sizes[chosen][..., None]).to(dtype)[..., :width]


def after_append(x: Tensor, pool: Tensor, scale: Tensor | None, where: list[int]) -> tuple[Tensor, Tensor | None]:
    """A pool and its scale after tokens x [T, Hkv, D] were written to the slots ``where``; on the CPU, copies."""
    pool, scale, size = pool.clone(), None if scale is None else scale.clone(), pool.shape[2]
    kept = [i for i, slot in enumerate(where) if 0 <= slot < pool.shape[0] * size]
    slot = torch.tensor([where[i] for i in kept]).long()
    page, offset = slot // size, slot % size
    rows = x[kept]
    if pool.dtype in LARGEST:
        largest, wide = LARGEST[pool.dtype], rows.float()
        unit = torch.ones(())
        if scale is not None and scale.dim() == 3:
            scale[page, :, offset] = _own_scale(wide, largest).to(scale.dtype)
            unit = scale[page, :, offset].float()[..., None]
        elif scale is not None:
            unit = scale.float().reshape((*scale.shape, 1, 1)[:2])
        wide = (wide / unit).clamp(-largest, largest)
        rows = wide.round() if pool.dtype == torch.int8 else wide
    pool[page, :, offset] = rows.to(pool.dtype)
    return pool, scale


def _own_scale(rows: Tensor, largest: float) -> Tensor:
    """The scale of each row by its largest magnitude; 1 for zeros."""
    peak = rows.abs().amax(-1)
    return torch.where(peak > 0, peak / largest, 1.0)


def judge_quantise(call: Call, impl: str, device: torch.device | str) -> Verdict:
    """Queries in fp8: every byte of them and of their scales."""
    r, stored = call.random("quantise"), torch.float8_e4m3fn
    dtype = r.choice((torch.bfloat16, torch.float16, torch.float32))
    q = _tokens(call, "q", (sum(call.case.row_counts), call.case.head_dim), dtype)
    scale = None if r.random() < 0.6 else torch.tensor(r.choice((0.0, 0.02, 3.0, -0.5)))
    wide = q.float()
    unit = _own_scale(wide, LARGEST[stored]) if scale is None else scale
    over = unit.where(unit != 0, 1.0)
    rows = (wide / (over[..., None] if scale is None else over)).clamp(-LARGEST[stored], LARGEST[stored])
    args = mapped((q, scale), mover(device))
    backend = taker("quantise_q", args, {}, impl)
    for name, got, want in zip(
        ("out", "q_scale"), quantise_q(*args, impl=backend), (rows.to(stored), unit), strict=True
    ):
        if not same_bits(got.cpu(), want):
            raise BrokenError(f"quantise_q: {name} has other bytes than wanted, {dtype} queries, scale {scale}")
    return Verdict(backend)


def judge_merge(call: Call, impl: str, device: torch.device | str) -> Verdict:
    """Two states of the same queries, some without keys: their outs are junk then."""
    r, case = call.random("merge"), call.case
    spread, empty = r.choice((0.0, 3.0, 1000.0)), r.choice((0.0, 0.3))
    states = [_state(call, name, spread, empty) for name in "ab"]
    (out_a, lse_a), (out_b, lse_b) = states
    args = mapped((out_a, lse_a, out_b, lse_b), mover(device))
    backend = taker("merge_states", args, {}, impl)
    out, lse = (x.cpu() for x in merge_states(*args, impl=backend))
    parts = [(o.double().where(s[..., None] > -torch.inf, 0.0), s.double()) for o, s in states]
    want_lse = torch.logaddexp(parts[0][1], parts[1][1])
    safe = want_lse.where(want_lse > -torch.inf, 0.0)
    want = torch.stack([o * torch.exp(s - safe)[..., None] for o, s in parts]).sum(0)
    e = UNIT[torch.float32]
    u = UNIT[case.out_dtype] * (2 if truncates_bf16(backend, device) else 1)
    exponent = 1 + torch.stack([s.abs().where(s > -torch.inf, 0.0) for _, s in parts]).amax(0)
    size = torch.stack([o.abs() for o, _ in parts]).sum(0)
    allowed = u * want.abs() + 8 * e * exponent[..., None] * size + 1e-7
    _within("out", out, want, allowed)
    _within("lse", lse, want_lse, 4 * e * exponent)
    return Verdict(backend)


def _state(call: Call, name: str, spread: float, empty: float) -> tuple[Tensor, Tensor]:
    case, generator = call.case, numbers(call, f"state {name}")
    shape = (*case.q_shape[:-1], case.head_dim + (16 if case.strided else 0))
    out = torch.randn(shape, generator=generator)[..., : case.head_dim]
    lse = spread * torch.randn(shape[:-1], generator=generator)
    gone = torch.rand(shape[:-1], generator=generator) < empty
    out = out.masked_fill(gone[..., None], torch.nan).to(case.out_dtype)
    lse = lse.masked_fill(gone, -torch.inf)
    return out, lse.mT.contiguous().mT if case.strided else lse


def _within(name: str, came: Tensor, want: Tensor, allowed: Tensor) -> None:
    error = torch.where(came.double() == want, 0.0, (came.double() - want).abs())
    share = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=torch.inf)
    if share.numel() and not float(share.max()) <= 1:
        at = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
        wanted, got = float(want[at]), float(came[at])
        raise BrokenError(f"merge_states: {name} at {at} is {float(share[at]):.3g} of the allowed error off: "
                     f"wanted {wanted:.7g}, got {got:.7g}")  # fmt: skip


def judge_slots(call: Call, _impl: str, device: torch.device | str) -> Verdict:
    """Where new tokens go, under hostile tables."""
    inputs, case = build(call), call.case
    table, seq_lens, cu_seqlens_q = inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q
    if seq_lens is None or table is None:
        raise ValueError("slots is drawn with pages")
    tokens = sum(case.row_counts) + case.tail
    sent_table, sent_lens, sent_cu = mapped((table, seq_lens, cu_seqlens_q), mover(device))
    found = slots(sent_table, sent_lens, case.page_size, num_tokens=tokens, cu_seqlens_q=sent_cu)
    wanted: list[int] = []
    bounds = [b * tokens // max(case.num_seqs, 1) for b in range(case.num_seqs + 1)]
    if cu_seqlens_q is not None:
        bounds = cu_seqlens_q.tolist()
    rows = [pages.tolist() for pages in page_lists(table, case.page_size)]
    for b, (start, end) in enumerate(pairwise(bounds)):
        kv_len = max(int(seq_lens[b]), 0)
        wanted += [slot_of(rows[b], kv_len - (end - start) + i, case.page_size) for i in range(end - start)]
    wanted += [-1] * (tokens - len(wanted))
    wrong = [i for i, (a, b) in enumerate(zip(found.tolist(), wanted, strict=True)) if a != b]
    if wrong:
        i = wrong[0]
        raise BrokenError(f"slots: token {i} goes to {int(found[i])}, wanted {wanted[i]}; {len(wrong)} are wrong")
    return Verdict("torch")


def slot_of(row: list[int], position: int, page_size: int) -> int:
    """The slot of a position, -1 where it has none."""
    page = position // page_size
    if position < 0 or page >= len(row) or row[page] < 0:
        return -1
    return row[page] * page_size + position % page_size
