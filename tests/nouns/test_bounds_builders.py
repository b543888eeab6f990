"""Builders of bounds: each against its mask written out, in every shape of queries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swath import Window, bounds, slots

LENS, CU = (9, 4, 12), (0, 5, 5, 12)
SPANS = torch.tensor([[[2, 5], [6, 8]], [[0, 0], [1, 3]], [[4, 9], [0, 0]]])
PREFIXES = torch.tensor([4, 0, 12])
W = 3

Rule = Callable[[int, int, int], bool]
"""Whether a row of sequence b at position p sees key k."""


def same_span(b: int, p: int, k: int) -> bool:
    return any(begin <= p < end and begin <= k < end for begin, end in SPANS[b].tolist())


RULES: dict[str, tuple[Callable[..., Tensor], Rule]] = {
    "window": (lambda p, **_: bounds.window(p, W), lambda b, p, k: k <= p and p - k < W),
    "chunked": (lambda p, **_: bounds.chunked(p, 4), lambda b, p, k: k <= p and k // 4 == p // 4),
    "prefix": (
        lambda p, **cu: bounds.prefix(p, PREFIXES.to(p.dtype), **cu),
        lambda b, p, k: k <= p or k < PREFIXES[b],
    ),
    "gemma 3, full layer": (
        lambda p, **cu: bounds.blocks(p, SPANS, **cu),
        lambda b, p, k: k <= p or same_span(b, p, k),
    ),
    "gemma 3, windowed layer": (
        lambda p, **cu: bounds.blocks(p, SPANS, size=W, **cu),
        lambda b, p, k: (k <= p and p - k < W) or same_span(b, p, k),
    ),
    "gemma 4, windowed layer": (
        lambda p, **cu: bounds.blocks(p, SPANS, size=W, whole=False, **cu),
        lambda b, p, k: (k <= p or same_span(b, p, k)) and k > p - W,
    ),
}


def rows_of(shape: str, dtype: torch.dtype) -> tuple[Tensor, list[tuple[int, int]], dict[str, Tensor]]:
    """Positions of rows, the sequence and position of each as host numbers, and the builder's other arguments."""
    lens, cu = torch.tensor(LENS, dtype=dtype), torch.tensor(CU, dtype=torch.int32)
    if shape == "decode":
        return bounds.positions_of(lens), [(b, n - 1) for b, n in enumerate(LENS)], {}
    if shape == "steps":
        return bounds.positions_of(lens, 3), [(b, n - 3 + i) for b, n in enumerate(LENS) for i in range(3)], {}
    rows = [(b, LENS[b] - CU[b + 1] + i) for b in range(3) for i in range(CU[b], CU[b + 1])]
    return bounds.positions_of(lens, 12, cu_seqlens_q=cu), rows, {"cu_seqlens_q": cu}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", ["decode", "steps", "ragged"])
@pytest.mark.parametrize("name", RULES)
def test_the_mask_written_out(name: str, shape: str, dtype: torch.dtype) -> None:
    build, rule = RULES[name]
    positions, rows, cu = rows_of(shape, dtype)
    assert positions.flatten().tolist() == [p for _, p in rows]
    made = build(positions, **cu)
    assert made.dtype == dtype
    assert made.shape == (*positions.shape, 2)
    seen = Window(bounds=made.reshape(-1, 2)).mask(positions.flatten(), torch.arange(14))
    assert seen.tolist() == [[rule(b, p, k) for k in range(14)] for b, p in rows]


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_hold_every_key_once(world_size: int, interleave: int) -> None:
    """Each rank sees those of its own keys that lie in the range of the whole context."""
    whole = torch.tensor([[lo, hi] for lo in range(-1, 14) for hi in range(-1, 14)])
    for rank in range(world_size):
        held = [k for k in range(30) if k // interleave % world_size == rank]
        low, end = bounds.shard(whole, rank, world_size, interleave=interleave).T.tolist()
        for (lo, hi), first, last in zip(whole.tolist(), low, end, strict=True):
            assert held[first:last] == [k for k in held if lo <= k < hi]
        counts = bounds.own_tokens(torch.arange(20), rank, world_size, interleave=interleave)
        assert counts.tolist() == [sum(k < n for k in held) for n in range(20)]


def test_rows_at_the_end_of_int32() -> None:
    last = 2**31 - 1
    lens, start = torch.tensor([20], dtype=torch.int32), torch.tensor([last - 1], dtype=torch.int32)
    p = bounds.positions_of(lens, 3, q_start=start)
    assert p.tolist() == [[last - 1, last, last]]
    assert bounds.prefix(p, torch.zeros_like(lens)).tolist() == [[[0, last]] * 3]
    assert bounds.window(p, 4).tolist() == [[[last - 4, last], [last - 3, last], [last - 3, last]]]


def test_rows_that_do_not_exist_count_nowhere() -> None:
    """cu_seqlens_q names five rows of which there are three: as ``paged_attention`` and ``slots`` have it."""
    lens, cu = torch.tensor([20]), torch.tensor([0, 5])
    assert bounds.positions_of(lens, 3, cu_seqlens_q=cu).tolist() == [17, 18, 19]
    assert slots(torch.tensor([[0, 1]]), lens, 16, num_tokens=3, cu_seqlens_q=cu).tolist() == [17, 18, 19]


def test_the_worked_examples() -> None:
    """What the docstrings say in numbers."""
    p = torch.tensor
    assert bounds.window(p([0, 1, 5]), 3).tolist() == [[0, 1], [0, 2], [3, 6]]
    assert bounds.chunked(p([2, 3, 4, 6]), 4).tolist() == [[0, 3], [0, 4], [4, 5], [4, 7]]
    assert bounds.prefix(p([[1, 3, 5]]), p([4])).tolist() == [[[0, 4], [0, 4], [0, 6]]]
    spans = p([[[2, 5]]])
    assert bounds.blocks(p([[1, 2, 4, 6]]), spans).tolist() == [[[0, 2], [0, 5], [0, 5], [0, 7]]]
    assert bounds.blocks(p([[1, 2, 4, 6]]), spans, size=2).tolist() == [[[0, 2], [1, 5], [2, 5], [5, 7]]]
    assert bounds.blocks(p([[4]]), spans, size=2, whole=False).tolist() == [[[3, 5]]]
    assert [bounds.shard(p([3, 8]), rank, 2).tolist() for rank in (0, 1)] == [[2, 4], [1, 4]]
    assert bounds.positions_of(p([5, 9]), 2).tolist() == [[3, 4], [7, 8]]
    assert bounds.positions_of(p([5, 9]), 3, cu_seqlens_q=p([0, 1, 3])).tolist() == [4, 7, 8]
    assert bounds.positions_of(p([5, 9]), 2, q_start=p([-1, 3])).tolist() == [[-1, 0], [3, 4]]
    assert bounds.sequence_of(p([0, 1, 2, 3]), p([0, 1, 3])).tolist() == [0, 1, 1, 1]
    assert [bounds.own_tokens(p(7), rank, 2, interleave=n).item() for n in (1, 2) for rank in (0, 1)] == [4, 3, 4, 3]


WRONG: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("positions", lambda p: bounds.window(p.float(), 4)),
    ("positions", lambda p: bounds.prefix(p[:, None], p[:1], cu_seqlens_q=p[:2])),
    ("size", lambda p: bounds.window(p, 0)),
    ("size", lambda p: bounds.window(p, 2**31)),  # beyond int32 it would wrap around
    ("size", lambda p: bounds.chunked(p, 2**31)),
    ("prefix_lens", lambda p: bounds.prefix(p, p[:1])),
    ("spans", lambda p: bounds.blocks(p, torch.zeros(3, 2, dtype=torch.int32))),
    ("spans", lambda p: bounds.blocks(p, torch.zeros(3, 1, 2, dtype=torch.int32, device="meta"))),
    ("cu_seqlens_q", lambda p: bounds.prefix(p, p, cu_seqlens_q=p)),
    ("cu_seqlens_q", lambda p: bounds.prefix(p, p[:0], cu_seqlens_q=p[:1])),
    ("cu_seqlens_q", lambda p: bounds.positions_of(p, 3, cu_seqlens_q=p[:2])),  # one difference would go for all
    ("cu_seqlens_q", lambda p: bounds.positions_of(p[:2], 3, cu_seqlens_q=p.float())),
    ("cu_seqlens_q", lambda p: bounds.positions_of(p[:0], 3, cu_seqlens_q=p[:1])),
    ("q_start", lambda p: bounds.positions_of(p, 2, q_start=p[:1])),
    ("q_start", lambda p: bounds.positions_of(p, 2, q_start=p.float())),
    ("rank", lambda p: bounds.own_tokens(p, 2, 2)),
    ("count", lambda p: bounds.own_tokens(p.float(), 1, 2)),
    ("interleave", lambda p: bounds.own_tokens(p, 1, 2**16, interleave=2**16)),
    ("num_tokens", lambda p: bounds.positions_of(p, cu_seqlens_q=p)),
]


@pytest.mark.parametrize(("argument", "call"), WRONG)
def test_wrong_arguments_are_named(argument: str, call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: wanted"):
        call(torch.tensor([4, 5, 6], dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["decode", "steps", "ragged"])
def test_no_builder_synchronises(shape: str) -> None:
    """Bounds of every rule, sharded, on the device."""
    positions, _, cu = rows_of(shape, torch.int32)
    positions, cu = positions.cuda(), {name: x.cuda() for name, x in cu.items()}
    spans, prefixes = SPANS.cuda(), PREFIXES.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [bounds.window(positions, W), bounds.chunked(positions, 4), bounds.prefix(positions, prefixes, **cu)]
        made += [bounds.blocks(positions, spans, size=W, whole=whole, **cu) for whole in (True, False)]
        made = [bounds.shard(x, 1, 2) for x in made]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {x.device.type for x in made} == {"cuda"}
