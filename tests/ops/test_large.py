"""Tensors of more than 2^31 elements: addresses past what 32 bits hold, against the float64 truth of the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pools import at_the_end, in_a_large_pool
from torch import Tensor

from conftest import PORTABLE, Prepare, each_backend, skip_unless_able
from swath import KVQuant, PagedKV, append_kv
from swath.testing import Case, Inputs

BEYOND = 2**31
ROOM = 24 << 30
ALIGNED = 64
"""Elements: the strides of rows are multiples of this, as the tensor memory accelerator needs."""

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Memory for such tensors, which one test process at a time may take."""
    import fcntl  # here, so that machines without it can still collect the file

    with (Path(tempfile.gettempdir()) / "swath-large-tensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < ROOM:
            pytest.skip(f"needs {ROOM >> 30} GiB of free GPU memory, there are {free >> 30}")
        yield
        torch.cuda.empty_cache()


def spread_out(x: Tensor, row: int = -1) -> Tensor:
    """The same values with rows so far apart that ``row``, or the last one, begins 2^31 elements or more in."""
    stride = -(-BEYOND // (row % x.shape[0] * ALIGNED)) * ALIGNED
    buffer = torch.empty(stride * (x.shape[0] - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(x)


def pages_beyond(cache: PagedKV) -> int:
    """Pages of a pool whose last ones, as many as the cache has, lie 2^31 elements or more after its start."""
    return -(-BEYOND // cache.k[0].numel()) + cache.num_pages


def check(near: Inputs, far: Inputs, impl: str) -> None:
    """Run ``far``, with queries and results spread out too, against the truth of ``near``: the same values."""
    far = replace(far, q=spread_out(near.q))
    skip_unless_able(impl, far.why_not(impl))
    out = spread_out(torch.full_like(near.q, torch.nan))
    near.check(*far.run(impl, out=out))


@pytest.mark.parametrize(
    "case",
    [
        Case((3000, 40, 700)),
        Case((3000, 40, 900), 3, size=500, global_tokens=4),
        Case((700, 3000, 1), quant=KVQuant(torch.int8, "token")),
        Case((300, 200, 90), (100, 150, 1), spiked=True),
        Case((900, 200), (300, 150), size=100, spiked=True),
        Case((900, 200), (300, 150), quant=KVQuant(torch.int8, "token")),
        Case((300, 200), (100, 150), quant=KVQuant(torch.int8, "channel"), compute="int8"),
    ],
    ids=str,
)
@each_backend("attention", but=PORTABLE)
def test_pages_at_the_far_end_of_a_pool(case: Case, prepare: Prepare, impl: str) -> None:
    """Decode, n-step decode and chunked prefill, 8-bit ones among them.

    Decode has three sequences, so that the stride from one to the next still fits 32 bits and only products do not.
    """
    near = prepare(case)
    check(near, in_a_large_pool(near, pages_beyond(near.cache)), impl)


@pytest.mark.parametrize(
    ("case", "row"),
    [
        (Case((300,), (150,), dense=True, spiked=True), 299),
        (Case((300, 40), (100, 20), dense=True, spiked=True, head_dim=128), 300),
        (Case((300, 40), (100, 20), dense=True, spiked=True, size=30), 300),
    ],
    ids=str,
)
@each_backend("attention", but=PORTABLE)
def test_dense_rows_far_apart(case: Case, row: int, prepare: Prepare, impl: str) -> None:
    """From ``row`` on keys lie beyond: the last of a sequence, or a whole sequence."""
    near = prepare(case)
    assert isinstance(near.keys, tuple)
    k, v = (spread_out(x, row) for x in near.keys)
    check(near, replace(near, keys=(k, v)), impl)


@pytest.mark.parametrize("quant", [KVQuant(torch.bfloat16), KVQuant(torch.int8, "token")], ids=["bf16", "int8 token"])
@each_backend("append", but=PORTABLE)
def test_slots_at_the_far_end_of_a_pool(quant: KVQuant, impl: str, device: str) -> None:
    """What is written there is what the plain reference writes into a small pool."""
    torch.manual_seed(0)
    small = PagedKV.empty(quant, 4, 2, 16, 64, device=device)
    far = at_the_end(small, pages_beyond(small))
    k, v = (torch.randn(5, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    slots = torch.tensor([0, 17, 63, 40, 32], device=device)
    append_kv(far, spread_out(k), spread_out(v), slots + (far.num_pages - 4) * 16, impl=impl)
    append_kv(small, k, v, slots, impl="reference")
    for name in ("k", "v", "k_scale", "v_scale"):
        got, want = getattr(far, name), getattr(small, name)
        assert want is None or torch.equal(got[-4:], want), name
        assert want is None or (got[:-4] == -128).all(), f"{name}: a write elsewhere"
