"""docs/migrating.md: its functions, as they stand on the page, against plain torch; and the traps that it names."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import blocks
from test_flash import pages_of
from torch import Tensor
from truths import check, check_ragged, seen_by, truth

import swath

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
CU_Q, CU_K = [0, 5, 5, 6, 36], [0, 40, 47, 64, 94]
"""A chunk, no query, a decode, a whole prompt."""
WINDOWS = [(-1, -1), (9, 0), (9, 9)]
INTS = [torch.int32, torch.int64]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's blocks define."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for language, code in blocks(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(code, PAGE.name, "exec"), namespace)
    return namespace


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """q [36, 4, 32], k and v [94, 2, 32]."""
    torch.manual_seed(0)
    return torch.randn(36, 4, 32), torch.randn(94, 2, 32), torch.randn(94, 2, 32)


def flat_table(table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices and last_page_len of a table of pages of 16 with -1 behind the pages."""
    counts = (table >= 0).sum(1)
    lens = torch.tensor(CU_K).diff()
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(dtype), table[table >= 0].to(dtype), (
        (lens - 1) % 16 + 1
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_flash_attention_by_hand(page: Any, rows: Any, causal: bool, window: Any) -> None:
    q, k, v = rows
    out, lse = page["varlen"](q, k, v, torch.tensor(CU_Q), torch.tensor(CU_K), 30, causal, window)
    check_ragged(out, lse, q, k, v, CU_Q, CU_K, causal, window)
    q, k, v = (x[: len(x) // 2 * 2].unflatten(0, (2, -1)) for x in rows)
    out = page["dense"](q, k, v, causal, window)
    for b in range(2):
        check(out[b], None, truth(q[b], k[b], v[b], seen_by(18, 47, causal, window)))


@pytest.mark.parametrize("paged", [True, False])
def test_flash_attention_cache_by_hand(page: Any, rows: Any, paged: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 32), torch.randn(3, 2, 2, 32), torch.randn(3, 2, 2, 32)
    k_cache, v_cache = torch.randn(3, 50, 2, 32), torch.randn(3, 50, 2, 32)
    before, lens = (k_cache.clone(), v_cache.clone()), [20, 33, 0]
    table = None
    if paged:
        flat = (x.flatten(0, 1) for x in (k_cache, v_cache))
        k_cache, v_cache, table = pages_of(*flat, [0, 50, 100, 150], 16)
    out = page["with_kvcache"](q, k_cache, v_cache, k, v, torch.tensor(lens), table)
    for b, n in enumerate(lens):
        keys, values = (torch.cat([old[b, :n], new[b]]) for old, new in zip(before, (k, v), strict=True))
        check(out[b], None, truth(q[b], keys, values, seen_by(2, n + 2, True, (-1, -1))))


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("window_left", [-1, 9])
def test_flashinfer(page: Any, rows: Any, window_left: int, layout: str, dtype: torch.dtype) -> None:
    q, k, v = rows
    k_pages, v_pages, table = pages_of(k, v, CU_K, 16)
    indptr, indices, last = flat_table(table, dtype)
    kv = torch.stack([k_pages, v_pages], 1)
    kv = kv if layout == "NHD" else kv.transpose(2, 3).contiguous()
    out, lse = page["flashinfer_prefill"](
        q, kv, torch.tensor(CU_Q).to(dtype), indptr, indices, last, layout, window_left, 30.0, 0.2
    )
    seen = True, (window_left, 0)
    check_ragged(out, lse.T * math.log(2), q, k, v, CU_Q, CU_K, *seen, scale=0.2, softcap=30.0)
    one = torch.randn(4, 4, 32)
    out = page["flashinfer_decode"](one, torch.stack([k_pages, v_pages], 1), indptr, indices, last, window_left)
    for b, (k0, k1) in enumerate(pairwise(CU_K)):
        check(out[b : b + 1], None, truth(one[b : b + 1], k[k0:k1], v[k0:k1], seen_by(1, k1 - k0, *seen)))


@pytest.mark.parametrize("storage", ["fp32", "fp8", "int8 token"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_vllm(page: Any, rows: Any, window: Any, causal: bool, storage: str) -> None:
    q, k, v = rows
    k_pages, v_pages, table = (x.nan_to_num() for x in pages_of(k, v, CU_K, 16))
    sink, scales = torch.randn(4), dict[str, Any](k_descale=None, v_descale=None)
    if storage == "fp8":
        scale = torch.tensor(0.05)
        k, v, k_pages, v_pages = ((x / scale).to(torch.float8_e4m3fn) for x in (k, v, k_pages, v_pages))
        k, v = k.float() * scale, v.float() * scale
        scales = dict(k_descale=scale.expand(4, 2), v_descale=scale.expand(4, 2))
    elif storage == "int8 token":
        largest = [x.abs().amax(-1).clamp(min=1e-6) / 127 for x in (k_pages, v_pages)]
        k, v = (
            (x / (size := x.abs().amax(-1, keepdim=True) / 127)).round().to(torch.int8).float() * size for x in (k, v)
        )
        k_pages, v_pages = (
            (x / s[..., None]).round().to(torch.int8) for x, s in zip((k_pages, v_pages), largest, strict=True)
        )
        scales |= dict(k_scale_cache=largest[0], v_scale_cache=largest[1])
    out = torch.full_like(q, torch.nan)
    lens = torch.tensor(CU_K).diff()
    page["unified_attention"](
        q, k_pages, v_pages, out, torch.tensor(CU_Q), 30, lens, 40, 0.2, causal, window, table, 20.0, sinks=sink,
        **scales,
    )  # fmt: skip
    for (q0, q1), (k0, k1) in zip(pairwise(CU_Q), pairwise(CU_K), strict=True):
        wanted = truth(
            q[q0:q1], k[k0:k1], v[k0:k1], seen_by(q1 - q0, k1 - k0, causal, window), 0.2, softcap=20.0, sink=sink
        )
        check(out[q0:q1], None, wanted)


@pytest.mark.parametrize("dtype", INTS)
def test_sglang(page: Any, rows: Any, dtype: torch.dtype) -> None:
    _, k, v = rows
    q, sink, slots = torch.randn(4, 4, 32), torch.randn(4), torch.randperm(200)[:94]
    k_buffer, v_buffer = torch.full((2, 200, 2, 32), torch.nan)
    k_buffer[slots], v_buffer[slots] = k, v
    o = torch.empty_like(q)
    indptr = torch.tensor(CU_K).to(dtype)
    page["decode_attention_fwd"](q, k_buffer, v_buffer, o, indptr, slots.to(dtype), 0.2, 20.0, sink)
    for b, (k0, k1) in enumerate(pairwise(CU_K)):
        seen = seen_by(1, k1 - k0, True, (-1, -1))
        check(o[b : b + 1], None, truth(q[b : b + 1], k[k0:k1], v[k0:k1], seen, 0.2, softcap=20.0, sink=sink))


@pytest.mark.parametrize("lens", [(30, 30), (11, 30)])
@pytest.mark.parametrize("leading", [0, 4])
def test_flex_attention(page: Any, lens: tuple[int, int], leading: int) -> None:
    """Against plain torch, and against flex_attention itself."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 32) for heads, n in ((4, lens[0]), (2, lens[1]), (2, lens[1])))
    out = page["flex_window"](q, k, v, swath.Window(8, global_tokens=leading))
    i, j = torch.arange(lens[0])[:, None], torch.arange(lens[1])
    seen = (j <= i) & ((i - j < 8) | (j < leading))
    for b in range(2):
        check(out[b].transpose(0, 1), None, truth(*(x[b].transpose(0, 1) for x in (q, k, v)), seen))

    def mask(_b: Tensor, _h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < 8) | (kv_idx < leading))

    blocks = create_block_mask(mask, None, None, *lens, device="cpu")
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks, enable_gqa=True), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 8])
def test_xformers(page: Any, rows: Any, window: int | None) -> None:
    q, k, v = rows
    lens = [[b - a for a, b in pairwise(cu)] for cu in (CU_Q, CU_K)]
    out = page["xformers_local"](q[None], k[None], v[None], *lens, window)[0]
    seen = True, (-1 if window is None else window - 1, 0)
    for (q0, q1), (k0, k1) in zip(pairwise(CU_Q), pairwise(CU_K), strict=True):
        check(out[q0:q1], None, truth(q[q0:q1], k[k0:k1], v[k0:k1], seen_by(q1 - q0, k1 - k0, *seen)))


def test_words_of_other_libraries_are_answered_with_swaths(rows: Any) -> None:
    q, k, v = rows
    cu_q, cu_k = torch.tensor(CU_Q), torch.tensor(CU_K)
    words = {"softmax_scale": "scale=", "window_size": "window=", "sinks": "sink=", "sm_scale": "scale="}
    pages = swath.PagedKV(k[:, :, None], v[:, :, None])
    for word, answer in words.items():
        wrong: dict[str, Any] = {word: 1}
        with pytest.raises(TypeError, match=f"^{word}: wanted {answer}.*as swath calls it"):
            swath.attention(q, k, v, cu_q, cu_k, **wrong)
        with pytest.raises(TypeError, match=f"^{word}: wanted {answer}.*as swath calls it"):
            swath.paged_attention(q[:4], pages, (cu_q, cu_k), cu_k, **wrong)
