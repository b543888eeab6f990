"""Hopper's work tiles: each m-block and head of a sequence once, in sections of heads; where their queries stand."""

from __future__ import annotations

from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
from swath.backends.device.window import NEAR, size_near, start_near  # noqa: E402 -- needs Triton
from swath.backends.gluon import scheduler  # noqa: E402
from swath.backends.hopper.heuristics import MOST_TOKENS  # noqa: E402

pytestmark = pytest.mark.parametrize("impl", ["triton"], indirect=True)


@triton.jit
def order_kernel(out, m_blocks, kv_len, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0)
    m_block, head = scheduler.in_section(i, m_blocks, kv_len, HEADS, KV_HEADS, COLUMNS)
    tl.store(out + 2 * i, m_block)
    tl.store(out + 2 * i + 1, head)


def order(device: str, m_blocks: int, kv_len: int, heads: int, kv_heads: int, beyond: int = 0) -> list[tuple[int, int]]:
    """The m-block and head of each tile of a sequence, and of ``beyond`` more m-blocks past its own."""
    out = torch.full(((m_blocks + beyond) * heads, 2), -1, dtype=torch.int32, device=device)
    order_kernel[(len(out),)](out, m_blocks, kv_len, heads, kv_heads, 2 * 128)
    return [(m_block, head) for m_block, head in out.tolist()]


SHAPES = [(1, 5, 8, 2), (5, 700, 8, 8), (3, 5000, 16, 8), (4, 9000, 12, 6), (2, 40_000, 6, 3), (3, 0, 4, 1)]


@pytest.mark.parametrize(("m_blocks", "kv_len", "heads", "kv_heads"), SHAPES)
def test_each_m_block_and_head_has_one_tile(m_blocks: int, kv_len: int, heads: int, kv_heads: int, device: str) -> None:
    found = order(device, m_blocks, kv_len, heads, kv_heads)
    assert sorted(found) == [(m_block, head) for m_block in range(m_blocks) for head in range(heads)]


@pytest.mark.parametrize(("m_blocks", "kv_len", "heads", "kv_heads"), SHAPES)
def test_tiles_past_the_last_sequence_are_none_of_its_own(
    m_blocks: int, kv_len: int, heads: int, kv_heads: int, device: str
) -> None:
    """Rows past the last sequence have m-blocks too: such a tile must not be one of that sequence, nor lack a head."""
    for m_block, head in order(device, m_blocks, kv_len, heads, kv_heads, beyond=3)[m_blocks * heads :]:
        assert m_block >= m_blocks
        assert 0 <= head < heads


def test_a_section_ends_before_the_next_begins(device: str) -> None:
    """16 MiB are 32,768 keys and values of 128 columns: of 5,000 keys six heads, and then the last two."""
    heads = [head for _, head in order(device, 3, 5000, 16, 8)]
    assert {*heads[:36]} == {*range(12)}
    assert {*heads[36:]} == {*range(12, 16)}


@triton.jit
def near_kernel(out, starts, q_lens, kv_lens, sizes, N: tl.constexpr):
    i = tl.arange(0, N)
    size = tl.load(sizes + i)
    start = start_near(tl.load(starts + i), tl.load(q_lens + i), tl.load(kv_lens + i), size)
    tl.store(out + i, start)
    tl.store(out + N + i, size_near(size))


def test_queries_moved_near_the_keys_see_the_same(device: str) -> None:
    """The first and last row of a sequence and keys on both sides of what each of them sees; no sum leaves int32."""
    top, most = 2**31 - 1, MOST_TOKENS
    assert most == NEAR.value
    lengths = [(1, 0), (7, 50), (300, 1), (1, most - 1), (1000, most - 1000), (most, 0)]
    sizes = [1, 2, 9, most - 1, most, most + 1, most + 60, 1_900_000_000, top - 1, top]
    starts = [0, 1, -1, 45, -7, most, -most, most + 3, -most - 3, 1_500_000_000, -1_500_000_000, top - 9, top, -top - 1]
    cases = [
        (start + shift, q_len, kv_len, size)
        for start, (q_len, kv_len), size in product(starts, lengths, sizes)
        for shift in (0, kv_len, -q_len, size - kv_len)
        if -top - 1 <= start + shift <= top
    ]
    count = 1 << (len(cases) - 1).bit_length()
    numbers = torch.tensor(cases + cases[:1] * (count - len(cases)), dtype=torch.int32, device=device)
    out = torch.empty(2, count, dtype=torch.int32, device=device)
    near_kernel[(1,)](out, *numbers.T.contiguous(), count)
    moved, near = out.long()
    start, q_len, kv_len, size = numbers.T.long()
    for row in (0, q_len - 1):
        before, now = start + row, moved + row
        assert (now.abs() + near + 1 <= top).all()
        for causal in (True, False):
            low, end = seen(before, size, kv_len, causal)
            low_now, end_now = seen(now, near, kv_len, causal)
            assert torch.equal(low, low_now), causal
            assert torch.equal(end, end_now), causal


def seen(p: torch.Tensor, size: torch.Tensor, kv_len: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The run of keys that queries at positions ``p`` see; 0 and 0 where they see none."""
    low = (p - size + 1).clamp(min=0)
    end = torch.minimum(p + (1 if causal else size), kv_len)
    some = low < end
    return low * some, end * some
