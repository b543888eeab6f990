"""append_kv: every byte of the cache after it, for every layout, dtype and granularity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import impls, skip_unless_able, truncates_bf16
from swath import KVQuant, PagedKV, append_kv, explain

pytestmark = pytest.mark.parametrize("impl", impls("append"), indirect=True)

PAGES, SIZE, HEADS, DIM = 5, 16, 3, 64
POOL = PAGES * SIZE
SLOTS = [37, -1, 0, POOL - 1, POOL, 16, 2**62, -(2**63), 15]
"""Inside and outside the cache, in no order."""

QUANTS = [
    *(KVQuant(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)),
    *(KVQuant(torch.int8, g) for g in ("tensor", "head", "channel", "token")),
    *(KVQuant(torch.float8_e4m3fn, g) for g in ("head", "token")),
    KVQuant(torch.float8_e5m2, "channel", "token"),
    KVQuant(torch.float8_e5m2, "none", "tensor"),
]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def empty_cache(quant: KVQuant, layout: str, device: str, scale_dtype: torch.dtype = torch.float32) -> PagedKV:
    """A cache full of the value 3 whose static scales differ by head and channel."""
    generator = torch.Generator().manual_seed(3)
    scales: dict[str, Any] = {}
    for name, granularity in (("k_scale", quant.k), ("v_scale", quant.v_granularity)):
        shape = {"none": None, "tensor": (), "head": (HEADS,), "channel": (HEADS, DIM)}.get(
            granularity, (PAGES, SIZE, HEADS)
        )
        if shape is None:
            scales[name] = None
            continue
        scale = (torch.rand(shape, generator=generator) + 0.5) * 3 / LARGEST[quant.dtype]
        if granularity == "token" and layout == "hnd":
            scale = scale.transpose(1, 2).contiguous()
        scales[name] = scale.to(scale_dtype).to(device)
    outer = {
        "hnd": (PAGES, HEADS, SIZE, DIM),
        "nhd": (PAGES, SIZE, HEADS, DIM),
        "packed": (PAGES, SIZE, HEADS, 2 * DIM),
    }
    k, v = (torch.full(outer[layout], 3.0, device=device).to(quant.dtype) for _ in range(2))
    if layout == "packed":
        return PagedKV.from_packed(k, **scales)
    return PagedKV.from_nhd(k, v, **scales) if layout == "nhd" else PagedKV(k, v, **scales)


def tokens(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """New k and v with a zero row, a row beyond every static range and rows of other sizes."""
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(len(SLOTS), HEADS, DIM, generator=generator) for _ in range(2))
    k[2, 1], v[3, 0], k[5, 2] = 0, 0, 30 * k[5, 2]
    return k.to(dtype).to(device), v.to(dtype).to(device)


def expected(x: Tensor, pool: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The pool and scale after the append, token by token in numpy's fp32."""
    pool, scale = pool.cpu().clone(), None if scale is None else scale.cpu().clone()
    for t, slot in enumerate(SLOTS):
        if not 0 <= slot < POOL:
            continue
        page, offset = divmod(slot, SIZE)
        for h in range(HEADS):
            row = x[t, h].float().cpu().numpy()
            if pool.dtype not in LARGEST:
                pool[page, h, offset] = x[t, h].cpu().to(pool.dtype)
                continue
            largest = np.float32(LARGEST[pool.dtype])
            if scale is not None and scale.dim() == 3:
                peak = np.abs(row).max()
                scale[page, h, offset] = float(peak / largest) if peak > 0 else 1.0
            unit = np.float32(1) if scale is None else own_scale(scale, page, h, offset).float().numpy()
            value = np.clip(row / unit, -largest, largest)
            pool[page, h, offset] = torch.from_numpy(np.rint(value) if pool.dtype == torch.int8 else value).to(
                pool.dtype
            )
    return pool, scale


def own_scale(scale: Tensor, page: int, h: int, offset: int) -> Tensor:
    return {0: lambda: scale, 1: lambda: scale[h], 2: lambda: scale[h], 3: lambda: scale[page, h, offset]}[
        scale.dim()
    ]()


def assert_same_bytes(got: Tensor | None, want: Tensor | None) -> None:
    if want is None:
        assert got is None
    else:
        as_bytes = [x.cpu().contiguous().view(-1).view(torch.uint8) for x in (got, want)]
        assert torch.equal(*as_bytes)


def append(cache: PagedKV, k: Tensor, v: Tensor, where: Tensor, impl: str) -> None:
    skip_unless_able(impl, explain("append_kv", cache, k, v, where, impl=impl).reasons[impl])
    append_kv(cache, k, v, where, impl=impl)


@pytest.mark.parametrize("layout", ["hnd", "nhd", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_every_byte(quant: KVQuant, dtype: torch.dtype, layout: str, impl: str, device: str) -> None:
    if quant.dtype == torch.bfloat16 != dtype and truncates_bf16(impl, device):
        pytest.skip("Triton's interpreter does not round to bf16")
    cache = empty_cache(quant, layout, device)
    k, v = tokens(dtype, device)
    wanted = [expected(k, cache.k, cache.k_scale), expected(v, cache.v, cache.v_scale)]
    append(cache, k, v, torch.tensor(SLOTS, device=device), impl)
    for (pool, scale), (want_pool, want_scale) in zip(
        [(cache.k, cache.k_scale), (cache.v, cache.v_scale)], wanted, strict=True
    ):
        assert_same_bytes(scale, want_scale)
        assert_same_bytes(pool, want_pool)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_bf16_scales_quantise_by_what_is_stored(granularity: str, impl: str, device: str) -> None:
    if granularity == "token" and truncates_bf16(impl, device):
        pytest.skip("Triton's interpreter does not round to bf16")
    cache = empty_cache(KVQuant(torch.int8, granularity), "hnd", device, torch.bfloat16)
    k, v = tokens(torch.bfloat16, device)
    wanted, wanted_scale = expected(k, cache.k, cache.k_scale)
    append(cache, k, v, torch.tensor(SLOTS, device=device), impl)
    assert_same_bytes(cache.k_scale, wanted_scale)
    assert_same_bytes(cache.k, wanted)


@pytest.mark.parametrize("v_dim", [40, 64])
@pytest.mark.parametrize("quant", [QUANTS[0], *QUANTS[6:10:2], QUANTS[10]], ids=str)
def test_values_narrower_than_keys_or_elsewhere(quant: KVQuant, v_dim: int, impl: str, device: str) -> None:
    whole = empty_cache(quant, "hnd", device)
    pool = torch.zeros(SIZE, PAGES, HEADS, v_dim, device=device).to(quant.dtype).permute(1, 2, 0, 3)
    v_scale = whole.v_scale[:, :v_dim].contiguous() if quant.v == "channel" else whole.v_scale
    cache = PagedKV(whole.k, pool, whole.k_scale, v_scale)
    k, v = tokens(torch.bfloat16, device)
    v = v[..., :v_dim]
    wanted = [expected(k, cache.k, cache.k_scale), expected(v, cache.v, cache.v_scale)]
    append(cache, k, v, torch.tensor(SLOTS, device=device), impl)
    for got, want in zip((cache.k, cache.k_scale, cache.v, cache.v_scale), (x for y in wanted for x in y), strict=True):
        assert_same_bytes(got, want)


def test_ties_round_to_even(impl: str, device: str) -> None:
    scale = torch.tensor(0.25, device=device)
    k = torch.full((1, HEADS, DIM), 0.0, device=device)
    k[0, 0, :6] = torch.tensor([0.125, 0.375, 0.625, -0.125, -0.375, 31.875], device=device)
    pool = torch.zeros(1, HEADS, SIZE, DIM, dtype=torch.int8, device=device)
    cache = PagedKV(pool, pool.clone(), k_scale=scale, v_scale=scale)
    append(cache, k, k, torch.tensor([3], device=device), impl)
    assert cache.k[0, 0, 3, :6].tolist() == [0, 2, 2, 0, -2, 127]


def test_strided_tokens(impl: str, device: str) -> None:
    quant = KVQuant(torch.int8, "token")
    plain, strided = (empty_cache(quant, "nhd", device) for _ in range(2))
    k, v = tokens(torch.bfloat16, device)
    where = torch.tensor(SLOTS, device=device)
    append(plain, k, v, where, impl)
    fused = torch.cat([k, v], dim=-1)
    append(strided, fused[..., :DIM], fused[..., DIM:], where.repeat_interleave(2)[::2], impl)
    for name in ("k", "v", "k_scale", "v_scale"):
        assert_same_bytes(getattr(strided, name), getattr(plain, name))


def test_no_tokens(impl: str, device: str) -> None:
    cache = empty_cache(KVQuant(torch.int8, "token"), "hnd", device)
    before = cache.k.clone()
    none = torch.empty(0, HEADS, DIM, dtype=torch.bfloat16, device=device)
    append(cache, none, none, torch.empty(0, dtype=torch.int64, device=device), impl)
    assert torch.equal(cache.k, before)
