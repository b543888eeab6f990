"""What a row tile with bounds sees together, as one warp of Hopper's finds it out for all: against the rule itself."""

from __future__ import annotations

import pytest
import torch

from swath import Window

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
from swath.backends.device.window import bounds_of, seen_bits, sight_of, view_near  # noqa: E402 -- needs Triton
from swath.backends.triton.features import Features  # noqa: E402

pytestmark = pytest.mark.parametrize("impl", ["triton"], indirect=True)

ROWS, KEYS, BITS = 16, 64, 8


@triton.jit
def sight_kernel(out, bounds, last, kv_len, lead, F: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    p, view = tl.arange(0, ROWS), view_near(0, kv_len * 0, bounds, F)
    sight = sight_of(p, last, kv_len, lead, view, F)
    for i in tl.static_range(len(sight)):
        tl.store(out + i, sight[i])
    low, end = bounds_of(p, last, kv_len, view)
    for first in range(0, KEYS, 8):
        tl.store(out + 6 + first // 8, seen_bits(first, 8, low, end, lead))


def found(bounds: torch.Tensor, last: int, kv_len: int, lead: int) -> tuple[list[int], list[bool]]:
    """The numbers of the sight, and which keys some row sees."""
    F = Features(64, 64, 1, 1, window=True, bounds=True, lead="count")
    out = torch.zeros(6 + KEYS // BITS, dtype=torch.int32, device=bounds.device)
    sight_kernel[(1,)](out, bounds, last, kv_len, lead, F, ROWS, KEYS)
    (*sight,) = out[:6].tolist()
    return sight, [bool(bits >> i & 1) for bits in out[6:].tolist() for i in range(BITS)]


def drawn(kind: str, seed: int) -> torch.Tensor:
    """Bounds [ROWS, 2]: of windows, chunks, spans of any place and length, or with ranges that show nothing."""
    g = torch.Generator().manual_seed(seed)
    p = torch.arange(ROWS) + int(torch.randint(0, 40, (1,), generator=g))
    size = int(torch.randint(1, 12, (1,), generator=g))
    if kind == "window":
        return torch.stack([(p - size + 1).clamp(min=0), p + 1], -1)
    if kind == "chunked":
        return torch.stack([p // size * size, p + 1], -1)
    bounds = torch.randint(-5, KEYS + 5, (ROWS, 2), generator=g)
    return bounds if kind == "hostile" else bounds.sort(-1).values


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["window", "chunked", "random", "hostile"])
def test_sight_of_a_row_tile(kind: str, dtype: torch.dtype, device: str) -> None:
    for seed in range(25):
        bounds = drawn(kind, seed).to(dtype)
        last, kv_len, lead = seed % ROWS, (KEYS, 50, 7, 0)[seed % 4], (0, 3, 100)[seed % 3]
        (lead_end, left, right, full_from, full_to, apart), bits = found(bounds.to(device), last, kv_len, lead)
        window, k = Window(bounds=bounds[: last + 1], global_tokens=lead), torch.arange(KEYS)
        mask = window.mask(k[: last + 1], k) & (k < kv_len)
        seen = mask.any(0)
        assert bits == seen.tolist()
        ranges = window.key_ranges(0, 0, kv_len)
        assert (lead_end, left, right) == ranges
        assert mask[:, full_from:full_to].all()
        in_band = (k < lead_end) | ((k >= left) & (k < right))
        assert not (seen & ~in_band).any()
        assert apart or bool(seen[in_band].all())
        assert not (kind in ("window", "chunked") and apart and kv_len == KEYS)
