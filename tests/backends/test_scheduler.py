"""The order of Hopper's work tiles: each m-block and head of a sequence once, in sections of heads."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
from swath.backends.gluon import scheduler  # noqa: E402 -- needs Triton

pytestmark = pytest.mark.parametrize("impl", ["triton"], indirect=True)


@triton.jit
def order_kernel(out, m_blocks, kv_len, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    i = tl.program_id(0)
    m_block, head = scheduler.in_section(i, m_blocks, kv_len, HEADS, KV_HEADS, HEAD_DIM)
    tl.store(out + 2 * i, m_block)
    tl.store(out + 2 * i + 1, head)


def order(device: str, m_blocks: int, kv_len: int, heads: int, kv_heads: int, beyond: int = 0) -> list[tuple[int, int]]:
    """The m-block and head of each tile of a sequence, and of ``beyond`` more m-blocks past its own."""
    out = torch.full(((m_blocks + beyond) * heads, 2), -1, dtype=torch.int32, device=device)
    order_kernel[(len(out),)](out, m_blocks, kv_len, heads, kv_heads, 128)
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
