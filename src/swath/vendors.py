"""How other projects write windows and lay out caches, in terms of plain numbers and tensors.

The nouns have a door for each of them: ``Window.from_mojo``, ``PagedKV.from_packed``, ``PagedKV.from_aiter`` and
``PagedKV.from_dense``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swath.checks import check_count, check_is_tensor, check_rows, check_values
from swath.errors import bad_value
from swath.pages import is_page_size, page_size_dividing

PACKED_LAYOUTS = ("nhd", "hnd")


def mojo_window(local: int | None, global_: int | None) -> tuple[int | None, int]:
    """Size and leading tokens of mojo_opset's ``local_window_size``, which excludes the query, and its global one."""
    if global_ is not None:
        check_count("global_", global_, "an int >= 0 or None")
    if local is None:
        return (None, 0) if global_ is None else (0, global_)
    return check_count("local", local, "an int >= 0 or None") + 1, global_ or 0


def vllm_pages(kv: Tensor, layout: str, v_head_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """K and V [num_pages, Hkv, page_size, D] of vLLM's one tensor a layer, whose rows hold K then V. Views.

    ``layout``: "nhd" is [num_pages, page_size, Hkv, 2 * D], the shape in vLLM 0.25 to 0.31; "hnd" is
    [num_pages, Hkv, page_size, 2 * D], the shape from vLLM 0.32 on, whatever its strides. ``v_head_dim``: elements of V
    where they are not half of a row, as in vLLM's backends for K and V of two sizes.
    """
    if layout not in PACKED_LAYOUTS:
        raise bad_value("layout", f"one of {', '.join(map(repr, PACKED_LAYOUTS))}", repr(layout))
    shape = "num_pages, page_size, num_kv_heads" if layout == "nhd" else "num_pages, num_kv_heads, page_size"
    row = "2 * head_dim" if v_head_dim is None else "head_dim + v_head_dim"
    _check_dims("kv", kv, (4,), f"[{shape}, {row}]")
    if v_head_dim is None and kv.shape[3] % 2:
        raise bad_value("kv", f"shape [{shape}, {row}]", tuple(kv.shape))
    width = kv.shape[3] // 2
    if v_head_dim is not None:
        width = check_count("v_head_dim", v_head_dim, "an int >= 0 or None", most=width)
    rows = kv.transpose(1, 2) if layout == "nhd" else kv
    k, v = rows.split([kv.shape[3] - width, width], dim=3)
    return k, v


def aiter_pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [num_pages, Hkv, page_size, D] of aiter's blocked caches. Copies. V may have shorter rows.

    K is [num_pages, Hkv, D/x, page_size, x]; V is [num_pages, Hkv, D, page_size], or in its shuffled layout
    [num_pages, Hkv, page_size/x, D, x].
    """
    _check_dims("k", k, (5,), "[num_pages, Hkv, D/x, page_size, x]")
    _check_dims("v", v, (4, 5), "[num_pages, Hkv, D, page_size] or [num_pages, Hkv, page_size/x, D, x]")
    keys = k.permute(0, 1, 3, 2, 4).flatten(3)
    values = v.transpose(2, 3) if v.dim() == 4 else v.permute(0, 1, 2, 4, 3).flatten(2, 3)
    return keys.contiguous(), values.contiguous()


def dense_pages(k: Tensor, v: Tensor, page_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """K and V [num_pages, Hkv, page_size, D] of dense caches [B, S, Hkv, D], and their table [B, pages]. Views.

    ``page_size``: None for the largest that is possible. Pages begin at multiples of it from the first key, so the
    sequences must lie a whole number of keys apart, those of v as many as those of k. Where heads lie outside of keys,
    as in memory [B, Hkv, S, D], there are pages that begin in one head and end in another; no table entry names them.
    Other sequences are a page each, if a page can have as many keys.
    """
    shape = "[B, S, num_kv_heads, head_dim]"
    for name, x in (("k", k), ("v", v)):
        _check_dims(name, x, (4,), shape)
    check_values(v, k)
    for name, x in (("k", k), ("v", v)):
        check_rows(name, x)
    (batch, keys, heads, _), apart = k.shape, keys_apart(k)
    if apart is None or keys_apart(v) != apart:
        return _a_page_each(k, v, page_size)
    size = page_size_dividing(keys, apart) if page_size is None else _page_size(page_size)
    if keys % size or apart % size:
        raise bad_value("page_size", f"a divisor of {keys} keys, {apart} apart", size)
    between = apart // size
    count = (batch - 1) * between + keys // size if batch and keys else 0
    pools = []
    for x in (k, v):
        step = x.stride(1) if keys > 1 else x.stride(0)
        pools.append(x.as_strided((count, heads, size, x.shape[3]), (size * step, x.stride(2), step, 1)))
    first = torch.arange(batch, dtype=torch.int32, device=k.device) * between
    return pools[0], pools[1], first[:, None] + torch.arange(keys // size, dtype=torch.int32, device=k.device)


def _a_page_each(k: Tensor, v: Tensor, page_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, keys = k.shape[:2]
    if not is_page_size(keys) or page_size not in (None, keys):
        apart = keys_apart(k)
        name, x, each = ("k", k, "a whole number of") if apart is None else ("v", v, str(apart))
        wanted = f"sequences that lie {each} keys apart, or pages of all their keys, 1, 8 or a multiple of 16"
        raise bad_value(name, wanted, f"strides {x.stride()}, {keys} keys, page_size {page_size}")
    return k.transpose(1, 2), v.transpose(1, 2), torch.arange(batch, dtype=torch.int32, device=k.device)[:, None]


def _page_size(page_size: object) -> int:
    return check_count("page_size", page_size, "an int >= 1 or None", least=1)


def keys_apart(k: Tensor) -> int | None:
    """Keys from the first of a sequence of k [B, S, ...] to the first of the next; None for no whole number of them."""
    (batch, keys), (between, step) = k.shape[:2], k.stride()[:2]
    if batch <= 1 or keys <= 1:
        return keys
    return between // step if step > 0 and between % step == 0 else None


def _check_dims(name: str, x: object, dims: tuple[int, ...], shape: str) -> None:
    x = check_is_tensor(name, x)
    if x.dim() not in dims:
        raise bad_value(name, f"shape {shape}", tuple(x.shape))
