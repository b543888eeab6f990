"""FlashAttention itself, where it is installed, computes what the tests of swath.compat say that it does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_flash import CU_K, CU_Q, ints
from truths import WINDOWS, seen_by, truth

from swath import compat

MODULE = next((name for name in ("flash_attn_interface", "flash_attn") if find_spec(name) is not None), None)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MODULE is None, reason="no FlashAttention is installed (flash_attn_interface or flash_attn)"),
]


@pytest.fixture
def theirs() -> Any:
    return pytest.importorskip(str(MODULE), reason="FlashAttention cannot be loaded")


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def agree(ours: Any, theirs: Any) -> None:
    """Out and LSE; rows without keys have an LSE of -inf here and in FlashAttention 3, and of +inf in 2."""
    torch.testing.assert_close(ours[0].float(), theirs[0].float(), rtol=2e-2, atol=2e-2)
    theirs_lse = theirs[1].where(theirs[1] < torch.inf, -torch.inf)
    torch.testing.assert_close(ours[1], theirs_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def test_gpu_flash_attention_agrees(causal: bool, window: Any, theirs: Any) -> None:
    torch.manual_seed(0)
    for q_len, kv_len in ((1, 147), (40, 40), (60, 20), (113, 203)):
        q, k, v = some(2, q_len, 4, 64), some(2, kv_len, 2, 64), some(2, kv_len, 2, 64)
        options = dict(causal=causal, window_size=window, return_attn_probs=True)
        out, lse, *_ = theirs.flash_attn_func(q, k, v, **options)
        agree(compat.flash_attn_func(q, k, v, **options), (out, lse))
        wanted = truth(q[1], k[1], v[1], seen_by(q_len, kv_len, causal, window))
        torch.testing.assert_close(out[1].double().cpu(), wanted.out, rtol=2e-2, atol=2e-2)
    q, k, v = some(40, 4, 64), some(94, 2, 64), some(94, 2, 64)
    bounds = ints(CU_Q, "cuda"), ints(CU_K, "cuda"), 30, 47
    options = dict(causal=causal, window_size=window, return_attn_probs=True)
    agree(*(m.flash_attn_varlen_func(q, k, v, *bounds, **options) for m in (compat, theirs)))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_gpu_flash_attention_appends_and_rotates_alike(interleaved: bool, local: bool, theirs: Any) -> None:
    torch.manual_seed(0)
    q, k, v = some(3, 2, 4, 64), some(3, 2, 2, 64), some(3, 2, 2, 64)
    angle = torch.rand(128, 16, device="cuda") * 6
    caches = [some(3, 128, 2, 64), some(3, 128, 2, 64)]
    options = dict(
        rotary_cos=angle.cos().bfloat16(), rotary_sin=angle.sin().bfloat16(), rotary_interleaved=interleaved,
        cache_seqlens=ints([20, 33, 0], "cuda"), causal=True, window_size=(9, 0) if local else (-1, -1),
        return_softmax_lse=True,
    )  # fmt: skip
    results, stored = [], []
    for functions in (compat, theirs):
        stored.append([x.clone() for x in caches])
        results.append(functions.flash_attn_with_kvcache(q, *stored[-1], k, v, **options))
    agree(*results)
    torch.testing.assert_close(*stored, rtol=2e-2, atol=2e-2)
