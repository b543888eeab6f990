"""swath.compat: what FlashAttention's users rely on, held to float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from truths import WINDOWS, check, check_ragged, seen_by, truth

from swath.compat import flash, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]
SHAPES = [(1, 147), (40, 40), (60, 20), (19, 90)]
EACH_WAY = [WINDOWS[i] for i in (0, 1, 3, 6, 7, 9, 10)]
"""One window of each way that they are computed in."""

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.fixture
def some(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def check_batch(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: Any, **how: Any
) -> None:
    assert out.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    mask = seen_by(q.shape[1], k.shape[1], causal, window)
    for b in range(q.shape[0]):
        check(out[b], lse[b], truth(q[b], k[b], v[b], mask, **how))


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
def test_windows(q_len: int, kv_len: int, causal: bool, window: Any, some: Any) -> None:
    q, k, v = some(2, q_len, 1, 32), some(2, kv_len, 1, 32), some(2, kv_len, 1, 32)
    out, lse, probabilities = flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    assert probabilities is None
    check_batch(out, lse, q, k, v, causal, window)
    assert torch.equal(flash_attn_func(q, k, v, 0.0, None, causal, window), out)


@pytest.mark.parametrize("q_len", [19, 2])
def test_values_narrower_than_keys(q_len: int, some: Any, device: str) -> None:
    """And elsewhere in memory."""
    q, k, v = some(2, q_len, 4, 32), some(2, 40, 2, 32), some(2, 40, 2, 48)[..., 8:24]
    seen, cu_q, cu_k = (True, (9, 0)), [0, q_len, 2 * q_len], [0, 40, 80]
    out, lse, _ = flash_attn_func(q, k, v, causal=True, window_size=(9, 0), return_attn_probs=True)
    assert out.shape == (2, q_len, 4, 16)
    for b in range(2):
        check(out[b], lse[b], truth(q[b], k[b], v[b], seen_by(q_len, 40, *seen)))
    flat = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bounds = ints(cu_q, device), ints(cu_k, device), q_len, 40
    out, lse, _ = flash_attn_varlen_func(*flat, *bounds, causal=True, window_size=(9, 0), return_attn_probs=True)
    check_ragged(out, lse, *flat, cu_q, cu_k, *seen)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=33, causal=True, window_size=(9, 0))
    check(out[1], None, truth(q[1], k[1, :33], v[1, :33], seen_by(q_len, 33, *seen)))


@pytest.mark.parametrize("q_len", [17, 3])
def test_no_keys(q_len: int, some: Any) -> None:
    q, k = some(2, q_len, 2, 32), some(2, 0, 1, 32)
    out, lse, _ = flash_attn_func(q, k, k, return_attn_probs=True)
    check_batch(out, lse, q, k, k, False, (-1, -1))


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("q_len", [1, 33])
def test_scores(q_len: int, kv_heads: int, some: Any) -> None:
    q, k, v, sink = some(2, q_len, 6, 64), some(2, 70, kv_heads, 64), some(2, 70, kv_heads, 64), some(6)
    how = dict(scale=0.3, softcap=5.0, sink=sink)
    out, lse, _ = flash_attn_func(
        q, k, v, softmax_scale=0.3, softcap=5.0, s_aux=sink, causal=True, deterministic=True, return_attn_probs=True
    )
    check_batch(out, lse, q, k, v, True, (-1, -1), **how)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads outside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a longer cache": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 14))[:, : x.shape[1]],
    "heads of a packed tensor": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "columns": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd distance": lambda x: torch.nn.functional.pad(x.flatten(1), (0, 8))[:, :-8].view(x.shape),
    "one sequence for all": lambda x: x[:1].expand_as(x),
}
COPIED = {"batch inside", "columns", "odd distance"}
"""Whose keys do not lie a whole number of keys apart, or not in rows."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("q_len", [2, 20])
def test_memory_layouts(layout: str, q_len: int, some: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any strides give the same result, and keys are read where they lie wherever that is possible."""
    given: list[int] = []

    def spy(name: str) -> None:
        operator = getattr(flash, name)

        def run(q: Tensor, keys: Any, *rest: Any, **options: Any) -> Any:
            given.append((keys if isinstance(keys, Tensor) else keys.k).data_ptr())
            return operator(q, keys, *rest, **options)

        monkeypatch.setattr(flash, name, run)

    spy("attention")
    spy("paged_attention")
    q, k, v = (LAYOUTS[layout](some(3, n, h, 32)) for n, h in ((q_len, 2), (50, 2), (50, 2)))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, window_size=(9, 0), return_attn_probs=True)
    check_batch(out, lse, q, k, v, True, (9, 0))
    copied = layout in COPIED - {"batch inside" if k.stride(0) % k.stride(1) == 0 else ""}
    assert (given == [k.data_ptr()]) is not copied
    mixed = flash_attn_func(q, k.contiguous(), v, causal=True, window_size=(9, 0))  # k and v lie differently
    check(mixed[0], None, truth(q[0], k[0], v[0], seen_by(q_len, 50, True, (9, 0))))


CU_Q, CU_K = [0, 5, 5, 6, 36, 40], [0, 40, 47, 64, 94, 94]
"""A chunk, no query, a decode, a whole prompt, and queries without keys."""


def ints(values: list[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def pages_of(k: Tensor, v: Tensor, cu_k: list[int], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """k and v in shuffled pages [num_pages, page_size, Hkv, D] with NaN in unused slots, and a table with -1."""
    lens = [b - a for a, b in pairwise(cu_k)]
    counts = [-(-n // page_size) for n in lens]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(lens), max(counts) + 1), -1, dtype=torch.int32)
    pools = [x.new_full((len(order), page_size, *x.shape[1:]), float("nan")) for x in (k, v)]
    for b, n in enumerate(lens):
        for i in range(counts[b]):
            table[b, i] = order.pop()
            rows = slice(cu_k[b] + i * page_size, cu_k[b] + min(n, (i + 1) * page_size))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[int(table[b, i]), : rows.stop - rows.start] = x[rows]
    return *pools, table.to(k.device)


@pytest.mark.parametrize(("causal", "window"), EACH_WAY)
@pytest.mark.parametrize("paged", [False, True])
def test_varlen(paged: bool, causal: bool, window: Any, some: Any, device: str) -> None:
    q, k, v, sink = some(40, 2, 32), some(94, 1, 32), some(94, 1, 32), some(2)
    cu_q, cu_k = ints(CU_Q, device), ints(CU_K, device)
    keys, values, table = pages_of(k, v, CU_K, 16) if paged else (k, v, None)
    options = dict(causal=causal, window_size=window, softcap=20.0, block_table=table, s_aux=sink)
    out, lse, _ = flash_attn_varlen_func(q, keys, values, cu_q, cu_k, 30, 40, return_attn_probs=True, **options)
    assert lse.shape == (2, 40)
    check_ragged(out, lse, q, k, v, CU_Q, CU_K, causal, window, softcap=20.0, sink=sink)
    bounds = cu_q.diff().max(), cu_k.diff().max()
    assert torch.equal(flash_attn_varlen_func(q, keys, values, cu_q, cu_k, *bounds, **options), out)


@pytest.mark.parametrize(("causal", "window"), EACH_WAY)
def test_varlen_decode(causal: bool, window: Any, some: Any, device: str) -> None:
    """Few queries go another way inside, by pages of one key."""
    cu_q, cu_k = [0, 1, 3, 3, 4], [0, 80, 81, 99, 150]
    packed = some(150, 3, 1, 32)
    q, k, v = some(4, 2, 32), packed[:, 1], packed[:, 2]
    arguments = (q, k, v, ints(cu_q, device, torch.int64), ints(cu_k, device), 2, 80)
    out, lse, _ = flash_attn_varlen_func(*arguments, causal=causal, window_size=window, return_attn_probs=True)
    check_ragged(out, lse, q, k, v, cu_q, cu_k, causal, window)
    assert torch.equal(flash_attn_varlen_func(*arguments, causal=causal, window_size=window), out)


LENS = [20, 33, 0]


@pytest.mark.parametrize(("causal", "window"), EACH_WAY)
@pytest.mark.parametrize("slots", [50, 64, 37])
def test_kvcache_of_any_length(slots: int, causal: bool, window: Any, some: Any, device: str) -> None:
    q, k, v = some(3, 2, 2, 32), some(3, slots, 1, 32), some(3, slots, 1, 32)
    lens = ints(LENS, device)
    out, lse = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lens, causal=causal, window_size=window, return_softmax_lse=True
    )
    for b, n in enumerate(LENS):
        check(out[b], lse[b], truth(q[b], k[b, :n], v[b, :n], seen_by(2, n, causal, window)))
    whole = flash_attn_with_kvcache(q, k, v, causal=causal, window_size=window)
    check(whole[1], None, truth(q[1], k[1], v[1], seen_by(2, slots, causal, window)))
    assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=slots, causal=causal, window_size=window), whole)


@pytest.mark.parametrize("kind", ["dense", "transposed", "values transposed", "rows", "leftpad", "paged"])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize(("rotary", "local"), [(None, True), (True, True), (True, False), (False, True)])
def test_kvcache_append(kind: str, new: int, rotary: bool | None, local: bool, some: Any, device: str) -> None:
    """New keys are rotated, written behind the old ones, and seen; no other slot changes."""
    if rotary is not None:  # a rotation that rounds its last bit otherwise must not show
        in_dtype = some
        some = lambda *shape: in_dtype(*shape).float()  # noqa: E731
    q, k, v = some(3, 2, 2, 32), some(3, new, 2, 32), some(3, new, 2, 32)
    k_cache, v_cache = some(5, 50, 2, 32), some(5, 50, 2, 32)
    if kind == "transposed":
        k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache))
    rows, pads, options = [0, 1, 2], [0, 0, 0], dict[str, Any]()
    if kind == "values transposed":
        k_cache, v_cache = some(5, 64, 2, 32), some(5, 2, 64, 32).transpose(1, 2)
    if kind in ("rows", "values transposed"):
        rows = [4, 0, 2]
        options["cache_batch_idx"] = ints(rows, device)
    if kind == "leftpad":
        pads = [3, 30, 0]
        options["cache_leftpad"] = ints(pads, device)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    if kind == "paged":
        flat = [x.reshape(250, 2, 32) for x in (k_cache, v_cache)]
        k_cache, v_cache, table = pages_of(*flat, list(range(0, 251, 50)), 16)
        options["block_table"] = table[:3]
    angle = torch.rand(96, 8, generator=torch.Generator().manual_seed(2)).to(device) * 6
    window = (9, 0) if local else (-1, -1)
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, *([None] * 2 if rotary is None else [angle.cos(), angle.sin()]),
        cache_seqlens=ints(LENS, device), window_size=window, rotary_interleaved=bool(rotary), return_softmax_lse=True,
        **options,
    )  # fmt: skip
    for b, n in enumerate(LENS):
        ahead = torch.arange(n, n + 10).to(device)
        new_k = k[b] if rotary is None else rotated(k[b], angle[ahead[:new]], rotary)
        new_q = q[b] if rotary is None else rotated(q[b], angle[ahead[:2] if local else ahead[[0, 0]]], rotary)
        want_k[rows[b], n : n + new], want_v[rows[b], n : n + new] = new_k, v[b]
        held = slice(pads[b], n + new)
        mask = seen_by(2, max(n + new - pads[b], 0), False, window)
        check(out[b], lse[b], truth(new_q, want_k[rows[b], held], want_v[rows[b], held], mask))
    if kind != "paged":
        torch.testing.assert_close(k_cache, want_k, rtol=1e-5, atol=1e-6)
        assert torch.equal(v_cache, want_v)


def rotated(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """x [S, H, D] whose first 2 R elements are complex numbers, turned by angle [S, R]."""
    size = 2 * angle.shape[1]
    part = x[..., :size].float().unflatten(2, (-1, 2) if interleaved else (2, -1))
    a, b = part.unbind(3 if interleaved else 2)
    turned = torch.view_as_real(torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle.float())[:, None])
    whole = turned.flatten(2) if interleaved else turned.transpose(2, 3).flatten(2)
    return torch.cat([whole.to(x.dtype), x[..., size:]], 2)


def test_packed_tensors_are_views(some: Any, device: str) -> None:
    """What migrating.md says of FlashAttention's functions of packed q, k and v."""
    qkv, cu = some(2, 40, 3, 4, 32), ints([0, 33, 80], device)
    apart, rows = (x.contiguous() for x in qkv.unbind(2)), qkv.flatten(0, 1)
    assert torch.equal(flash_attn_func(*qkv.unbind(2), causal=True), flash_attn_func(*apart, causal=True))
    wanted = flash_attn_varlen_func(*(x.contiguous() for x in rows.unbind(1)), cu, cu, 47, 47, causal=True)
    assert torch.equal(flash_attn_varlen_func(*rows.unbind(1), cu, cu, 47, 47, causal=True), wanted)


def test_one_split_is_the_same_alone(some: Any, device: str) -> None:
    q, k, v = some(4, 1, 4, 64), some(4, 700, 2, 64), some(4, 700, 2, 64)
    lens = ints([700, 3, 200, 650], device)
    together = flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True, num_splits=1)
    alone = flash_attn_with_kvcache(q[:1], k[:1], v[:1], cache_seqlens=lens[:1], causal=True, num_splits=1)
    assert torch.equal(together[:1], alone)


def refusals(some: Any) -> dict[str, Callable[[], Any]]:
    q, k, cache = some(2, 1, 4, 32), some(2, 1, 2, 32), some(2, 50, 2, 32)
    lens = torch.tensor([3, 4], dtype=torch.int32, device=q.device)
    cos, one = some(50, 8), cache[:1].expand(2, -1, -1, -1)

    def over(**options: Any) -> Callable[[], Any]:
        arguments: dict[str, Any] = dict(k_cache=cache, v_cache=cache.clone(), cache_seqlens=lens)
        return lambda: flash_attn_with_kvcache(q, **{**arguments, **options})

    return {
        "dropout_p": lambda: flash_attn_func(q, k, k, dropout_p=0.1),
        "alibi_slopes": lambda: flash_attn_func(q, k, k, alibi_slopes=some(4)),
        "window_size": lambda: flash_attn_func(q, k, k, window_size=(3,)),
        "window_size ": lambda: flash_attn_func(q, k, k, window_size=(-2, 0)),
        "window_size  ": lambda: flash_attn_func(q, k, k, window_size=3),  # type: ignore[arg-type]
        "causal": lambda: flash_attn_func(q, k, k, causal=1),
        "softcap": lambda: flash_attn_func(q, k, k, softcap=-1.0),
        "q": lambda: flash_attn_func(q.flatten(0, 1), k, k),
        "k": lambda: flash_attn_func(q, k[:1], k[:1]),
        "v": lambda: flash_attn_func(q, k, k[:, :, :1]),
        "k ": lambda: flash_attn_varlen_func(q[0], k, k, lens, lens, 1, 1),
        "cu_seqlens_k": lambda: flash_attn_varlen_func(q[0], k[0], k[0], lens, None, 1, 1),  # type: ignore[arg-type]
        "cu_seqlens_q": lambda: flash_attn_varlen_func(q[0], k[0], k[0], lens[:1], lens, 1, 1),
        "max_seqlen_q": lambda: flash_attn_varlen_func(q[0], k[0], k[0], lens, lens, 1.0, 1),  # type: ignore[arg-type]
        "num_splits": over(num_splits=4),
        "alibi_slopes ": over(alibi_slopes=some(4)),
        "cache_seqlens": over(k=k, v=k, cache_seqlens=None),
        "cache_seqlens ": over(cache_seqlens=3.7),  # not 3
        "cache_seqlens  ": over(cache_seqlens=lens[:1]),
        "cache_seqlens   ": over(cache_seqlens=lens.float()),
        "window_size   ": over(window_size=None),
        "cache_batch_idx": over(cache_batch_idx=lens, block_table=lens[:, None]),
        "cache_leftpad": over(cache_leftpad=lens, block_table=lens[:, None]),
        "cache_batch_idx ": over(cache_batch_idx=lens[:1]),
        "page_size": over(block_table=lens[:, None]),
        "v ": over(k=k),
        "rotary_sin": over(k=k, v=k, rotary_cos=cos),
        "rotary_cos": over(k=k, v=k, rotary_sin=cos),
        "k  ": over(rotary_cos=cos, rotary_sin=cos),
        "rotary_cos ": over(k=k, v=k, rotary_cos=cos.repeat(1, 4), rotary_sin=cos.repeat(1, 4)),
        "rotary_cos  ": over(k=k, v=k, rotary_cos=cos[:49], rotary_sin=cos[:49]),
        "k_cache": over(k_cache=cache[:1], v_cache=cache[:1]),
        "v_cache": over(v_cache=cache[:, :49]),
        "k_cache  ": over(k=k, v=k, k_cache=one, v_cache=one),  # both sequences would write the same slots
        "rotary_cos   ": over(k=k, v=k, rotary_cos=cos.int(), rotary_sin=cos.int()),
        "v_cache ": over(v_cache=LAYOUTS["heads outside"](cache)),
        "softmax_scale": lambda: flash_attn_func(q, k, k, softmax_scale=float("nan")),
        "s_aux": over(s_aux=some(3)),
        "return_attn_probs": lambda: flash_attn_func(q, k, k, return_attn_probs=1),  # type: ignore[arg-type]
        "return_softmax_lse": over(return_softmax_lse=1),
        "max_seqlen_q ": lambda: flash_attn_varlen_func(q[0], k[0], k[0], lens, lens, -1, 1),
        "max_seqlen_k": lambda: flash_attn_varlen_func(q[0], k[0], k[0], lens, lens, 1, -1),
        "k   ": over(k=k[..., :16], v=k[..., :16]),
        "v_cache  ": over(v_cache=cache.half()),
        "k_cache   ": over(k_cache=cache.to(torch.int8), v_cache=cache.to(torch.int8)),  # without scales
        "k_cache ": over(**dict.fromkeys(("k_cache", "v_cache"), LAYOUTS["odd distance"](cache))),
    }


def test_refusals_name_the_argument(some: Any) -> None:
    for name, call in refusals(some).items():
        with pytest.raises((ValueError, TypeError), match=rf"^{name.strip()}: wanted "):
            call()


UNKNOWN = {
    "page_table": (flash_attn_with_kvcache, "block_table"),
    "cu_seqlens_q": (flash_attn_with_kvcache, "flash_attn_varlen_func"),
    "k_descale": (flash_attn_with_kvcache, "k_scale of a PagedKV"),
    "return_attn_probs": (flash_attn_with_kvcache, "return_softmax_lse"),
    "seqused_k": (flash_attn_varlen_func, "cu_seqlens_k"),
    "return_softmax_lse": (flash_attn_func, "return_attn_probs"),
    "sinks": (flash_attn_func, "s_aux"),
    "pack_gqa": (flash_attn_func, "one of q, k, v, "),
}
"""Keywords of other releases, and what the error says to give."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_keywords_of_other_releases(name: str, some: Any) -> None:
    function, wanted = UNKNOWN[name]
    q = some(1, 2, 2, 32)
    with pytest.raises(TypeError, match=rf"^{name}: wanted {wanted}.*, got {name}=$"):
        function(q, q, q, **{name: None})


def test_gradients_are_refused(some: Any) -> None:
    q = some(1, 2, 2, 32).requires_grad_()
    with pytest.raises(ValueError, match=r"^q: wanted a tensor without grad"):
        flash_attn_func(q, q.detach(), q.detach())


COMMON = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
NAMES = {
    flash_attn_func: f"q k v {COMMON}",
    flash_attn_varlen_func: f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {COMMON} block_table",
    flash_attn_with_kvcache: "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
    "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
}


def test_names_and_their_order(device: str) -> None:
    """As FlashAttention 2.8 documents them, and as the one that is installed has them."""
    try:
        import flash_attn
    except ImportError:
        flash_attn = None
    for function, names in NAMES.items():
        parameters = list(inspect.signature(function).parameters)
        assert parameters == [*names.split(), "s_aux"], device
        if flash_attn is not None and hasattr(flash_attn, function.__name__):
            theirs = inspect.signature(getattr(flash_attn, function.__name__)).parameters
            assert parameters[: len(theirs)] == list(theirs)
