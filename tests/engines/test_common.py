"""What engines' adapters share: their caches as views, and a step that all layers see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from swath import KVQuant, PagedKV, append_kv
from swath.engines import common
from swath.engines.common import Layer, Step
from swath.ops.operator import Stages
from swath.testing import Case, Inputs, make

PAGES, HEADS, SIZE, DIM = 5, 2, 16, 24
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def tokens(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, number, HEADS, DIM, generator=generator)
    return k, v


def stores_the_same(cache: PagedKV, dtype: torch.dtype, **static: Tensor) -> None:
    """New tokens read back from this cache as from one of swath's own."""
    k, v = tokens(20)
    slots = torch.randperm(PAGES * SIZE, generator=torch.Generator().manual_seed(1))[:20]
    quant = KVQuant(dtype, *(("tensor",) if static else ("token",) if cache.k_scale is not None else ()))
    own = PagedKV.empty(quant, PAGES, HEADS, SIZE, DIM, **static)
    assert cache.quant == own.quant
    for x in own.tensors[:2]:
        x.zero_()
    for one in (own, cache):
        append_kv(one, k, v, slots, impl="reference")
    page, offset = slots // SIZE, slots % SIZE
    for mine, theirs in zip(cache.tensors, own.tensors, strict=True):
        if mine is None or theirs is None or mine.dim() < 3:
            assert mine is theirs or torch.equal(mine, theirs)  # type: ignore[arg-type]
            continue
        assert torch.equal(*(x[page, :, offset].contiguous().view(torch.uint8) for x in (mine, theirs)))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], ids=["hnd", "nhd", "heads outermost"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, E4M3, E5M2])
def test_rows_of_k_and_v(order: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (PAGES, HEADS, SIZE, 2 * DIM)
    engine = torch.uint8 if dtype in (E4M3, E5M2) else dtype
    kv = torch.zeros([shape[i] for i in order], dtype=engine).permute(*order)  # each order is its own inverse
    scale = {} if dtype == torch.float32 else {"k_scale": torch.tensor(0.02), "v_scale": torch.tensor(0.03)}
    cache = common.rows_cache(kv, dtype, **scale)
    assert cache.k.data_ptr() == kv.data_ptr()
    stores_the_same(cache, dtype, **scale)


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_token_scales_in_the_pages(dtype: torch.dtype) -> None:
    engine = torch.int8 if dtype == torch.int8 else torch.uint8
    kv = torch.zeros(PAGES, SIZE, HEADS, 2 * (DIM + 4), dtype=engine).transpose(1, 2)
    cache = common.planar_cache(kv, DIM, dtype)
    held = cache.k.untyped_storage().data_ptr()
    assert all(x.untyped_storage().data_ptr() == held for x in (cache.v, cache.k_scale, cache.v_scale))
    stores_the_same(cache, dtype)


def test_planar_pieces_overlap_nowhere_and_stay_in_their_page() -> None:
    """Every byte of a page is in one piece, also where pages lie apart and in an unaligned pool."""
    content = 2 * (DIM + 4)
    gap, start = 64, 8
    pool = torch.zeros(start + PAGES * (SIZE * HEADS * content + gap), dtype=torch.uint8)
    kv = pool[start:].as_strided(
        (PAGES, HEADS, SIZE, content), (SIZE * HEADS * content + gap, content, HEADS * content, 1), start
    )
    cache = common.planar_cache(kv, DIM, E4M3)
    for i, piece in enumerate(cache.tensors):
        assert piece is not None
        piece.view(torch.uint8).add_(1 << i)
    assert torch.equal(pool.unique(), torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8))
    assert (pool == 0).sum() == start + PAGES * gap
    with pytest.raises(ValueError, match="in one piece"):
        common.planar_cache(torch.zeros(HEADS, PAGES, SIZE, content, dtype=torch.int8).transpose(0, 1), DIM, torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, E4M3])
def test_pools_of_tokens(dtype: torch.dtype) -> None:
    engine = torch.uint8 if dtype == E4M3 else dtype
    k, v = (torch.zeros(PAGES * SIZE, HEADS, DIM, dtype=engine) for _ in range(2))
    scales = {}
    if dtype != torch.float32:
        scales = {name: torch.zeros(PAGES * SIZE, HEADS) for name in ("k_scale", "v_scale")}
    cache = common.nhd_cache(k, v, SIZE, dtype, **scales)
    assert cache.k.data_ptr() == k.data_ptr()
    stores_the_same(cache, dtype)
    with pytest.raises(ValueError, match="whole pages of 16"):
        common.nhd_cache(k[1:], v[1:], SIZE, dtype)


def step_of(inputs: Inputs, **changes: object) -> Step:
    """The step of a case."""
    case = inputs.case
    assert inputs.block_table is not None
    assert inputs.seq_lens is not None
    step = Step(
        inputs.block_table, inputs.seq_lens, torch.empty(0, dtype=torch.int64), sum(case.row_counts),
        max(case.row_counts), max(case.kv_lens), inputs.cu_seqlens_q, inputs.q_start, inputs.global_tokens,
        case.causal,
    )  # fmt: skip
    return replace(step, **changes)


CASES = {
    "decode": Case(size=40),
    "steps": Case(q_lens=3, size=40),
    "mixed": Case(q_lens=(1, 33, 20), tail=5, size=40, sink="q"),
    "full": Case(q_lens=(1, 33, 20), softcap=3.0, global_tokens=0),
    "leading": Case(q_lens=(1, 33, 20), size=40, global_tokens=(3, 0, 9)),
    "not causal": Case(q_lens=(1, 33, 20), causal=False),
    "elsewhere": Case(q_lens=(1, 33, 20), q_start=(60, 0, 90)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_a_step_attends(name: str, given: bool) -> None:
    inputs = make(CASES[name])
    case = inputs.case
    layer = Layer(case.size, case.scale, case.softcap, inputs.sink)
    q = inputs.q.flatten(0, 1) if inputs.q.dim() == 4 else inputs.q
    out = torch.full_like(q, 7.0) if given else None
    made, lse = step_of(inputs).attend(layer, q, inputs.cache, out, return_lse=True)
    rows = sum(case.row_counts)
    assert made.shape == (rows, *q.shape[1:])
    assert lse.shape == made.shape[:2]
    inputs.check(made.view(-1, *q.shape[1:]), lse)
    if out is not None:
        assert made.data_ptr() == out.data_ptr()
        assert (out[rows:] == 7.0).all()


def test_layers_share_the_windows_of_a_step() -> None:
    inputs = make(CASES["leading"])
    step = step_of(inputs)
    assert step.window(40) is step.window(40)
    assert step.window(40).global_tokens is inputs.global_tokens
    assert step.window(None).global_tokens == 0


def step_with_span(**changed: Any) -> Step:
    """Two sequences of 5 and 9 keys, two new tokens each; the first has an image in keys 2 to 4."""
    lens = torch.tensor([5, 9], dtype=torch.int32)
    spans = torch.tensor([[[2, 5]], [[0, 0]]], dtype=torch.int32)
    return replace(Step(lens[:, None], lens, lens, num_tokens=4, max_q_len=2, max_kv_len=9, spans=spans), **changed)


def test_spans_of_a_step() -> None:
    """Bounds are shaped as q is given, whose rows stand where the step says; leading tokens stay visible."""
    flat = [[1, 5], [2, 5], [5, 8], [6, 9]]
    assert step_with_span().window(3).bounds.tolist() == [flat[:2], flat[2:]]
    assert step_with_span(num_tokens=2, max_q_len=1).window(3).bounds.tolist() == [flat[1], flat[3]]
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    assert step_with_span(cu_seqlens_q=cu).window(3).bounds.tolist() == flat
    early = step_with_span(cu_seqlens_q=cu, q_start=torch.tensor([0, 1], dtype=torch.int32), global_tokens=1)
    assert early.window(3).bounds.tolist() == [[0, 1], [0, 2], [0, 2], [0, 3]]
    assert early.window(3).global_tokens == 1
    assert early.window(None).global_tokens == 0
    with pytest.raises(ValueError, match=r"^causal: wanted True where there are spans"):
        step_with_span(causal=False).window(3)


def test_a_layer_appends_as_far_as_slots_go() -> None:
    """Rows past the slots are padding of a captured graph; a slot of -1 is one too."""
    k, v = tokens(6)
    k[3:] = v[3:] = torch.nan
    own, cache = (PagedKV.empty(torch.float32, PAGES, HEADS, SIZE, DIM) for _ in range(2))
    for one in (own, cache):
        one.k.fill_(5.0), one.v.fill_(5.0)
    slots = torch.tensor([17, 18, 3, -1])
    Layer().append(cache, k, v, slots)
    append_kv(own, k[:3], v[:3], slots[:3])
    assert torch.equal(cache.k, own.k)
    assert torch.equal(cache.v, own.v)


def test_windows_of_engines() -> None:
    assert [common.window_size(left) for left in (-1, 0, 127)] == [None, 1, 128]


def test_layers_that_are_alike_are_checked_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a layer of another kind, or with tensors that look otherwise, on its own."""
    inputs = make(CASES["mixed"])
    checked: list[object] = []
    accept = Stages.accept
    monkeypatch.setattr(Stages, "accept", lambda *args: checked.append(args) or accept(*args))
    step, q, k, v = step_of(inputs), inputs.q, inputs.cache.k, inputs.cache.v
    assert inputs.sink is not None
    caches = [inputs.cache, PagedKV(k.clone(), v.clone())]
    with torch.no_grad():
        for cache in caches:
            inputs.check(step.attend(Layer(40, sink=inputs.sink), q, cache), None)
        assert len(checked) == 1
        for layer, new in ((Layer(40), q), (Layer(41), q), (Layer(40), q.repeat_interleave(2, dim=1)[:, ::2])):
            step.attend(layer, new, caches[0])
        assert len(checked) == 4


def test_weights_of_a_sink_may_be_loaded_later() -> None:
    inputs = make(CASES["mixed"])
    assert inputs.sink is not None
    sink = torch.nn.Parameter(torch.zeros_like(inputs.sink), requires_grad=False)
    layer = Layer(40, sink=sink)
    sink.data = inputs.sink
    inputs.check(step_of(inputs).attend(layer, inputs.q, inputs.cache), None)
