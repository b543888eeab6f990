"""From FlashAttention's tensors and windows to those of swath's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.checks import check_count, check_ints, check_tensor, check_values
from swath.errors import bad_type, bad_value
from swath.ops.append import append_kv
from swath.ops.slots import slots
from swath.pages import LARGEST, BlockTable, PageTable, is_page_size
from swath.vendors import keys_apart
from swath.window import Window


def with_rows(name: str, x: object, dims: int) -> Tensor:
    """A tensor with rows of one piece, which FlashAttention makes as well."""
    x = check_tensor(name, x, dims)
    return x if x.stride(-1) == 1 else x.contiguous()


def filled(length: int, value: int, like: Tensor) -> Tensor:
    """int32 [length] of one value, on the device of a tensor."""
    return torch.full((length,), value, dtype=torch.int32, device=like.device)


def lengths_of(cache_seqlens: object, q: Tensor) -> Tensor:
    """Lengths [B] from ``cache_seqlens`` for q [B, ...]: those, or one int for all sequences."""
    if isinstance(cache_seqlens, Tensor):
        return check_ints("cache_seqlens", cache_seqlens, q.shape[0], q.device)
    length = check_count("cache_seqlens", cache_seqlens, "an int >= 0 or a tensor [B]", most=LARGEST)
    return filled(q.shape[0], length, q)


def window_of(window_size: Sequence[int], causal: bool, reach: int) -> tuple[Window, int | None]:
    """The window, and how far queries are moved to the right for it: None for not at all.

    The keys ``p - left .. p + right`` are those of a causal window of ``left + right + 1`` keys at ``p + right``. No
    two positions of the call are ``reach`` or more apart, so that much is no limit.
    """
    if not isinstance(window_size, (tuple, list)):
        raise bad_type("window_size", "(left, right)", type(window_size).__name__)
    if len(window_size) != 2:
        raise bad_value("window_size", "(left, right)", tuple(window_size))
    left, right = (check_count("window_size", n, "two ints >= -1", least=-1) for n in window_size)
    if not isinstance(causal, bool):
        raise bad_type("causal", "a bool", type(causal).__name__)
    left, right = (-1 if n >= reach else n for n in (left, right))
    if causal or right == 0 or right == left:
        return Window.from_flash(left, right, causal=causal), None
    right = reach if right == -1 else right
    return Window(None if left == -1 else left + right + 1), right


def is_regular(k: Tensor, v: Tensor) -> bool:
    """Whether the sequences of k and v [B, S, Hkv, D] lie a whole number of keys apart, the same of both."""
    return keys_apart(k) is not None and keys_apart(k) == keys_apart(v)


def laid_flat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v end to end and their bounds, as ``attention`` takes them.

    Keys are not copied: what lies between those of two sequences becomes a sequence without queries.
    """
    (batch, q_len), kv_len, apart = q.shape[:2], k.shape[1], keys_apart(k)
    if apart is None or apart == kv_len:
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends * q_len, ends * kv_len
    rows = (batch - 1) * apart + kv_len
    keys, values = (x.as_strided((rows, *x.shape[2:]), x.stride()[1:]) for x in (k, v))
    b = torch.arange(batch, dtype=torch.int32, device=q.device)
    q_bounds = torch.stack([b * q_len, (b + 1) * q_len], 1).flatten()
    return q.flatten(0, 1), keys, values, q_bounds, torch.stack([b * apart, b * apart + kv_len], 1).flatten()


def cache_of(
    k_cache: Tensor,
    v_cache: Tensor,
    batch: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> tuple[PagedKV, BlockTable]:
    """The cache as pages, and the table of ``batch`` sequences. The cache is a view."""
    check_values(check_tensor("v_cache", v_cache, 4), check_tensor("k_cache", k_cache, 4), "v_cache", "k_cache")
    if block_table is not None:
        for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if x is not None:
                raise bad_value(name, "None where there is a block_table", type(x).__name__)
        return PagedKV.from_nhd(k_cache, v_cache), check_tensor("block_table", block_table, 2)
    keys = k_cache.shape[1]
    if not is_regular(k_cache, v_cache) and (cache_leftpad is not None or not is_page_size(keys)):
        name, x = ("k_cache", k_cache) if keys_apart(k_cache) is None else ("v_cache", v_cache)
        wanted = "sequences that lie a whole number of keys apart, of v_cache as of k_cache"
        wanted += ", or 1, 8 or a multiple of 16 keys each and no cache_leftpad"
        raise bad_value(name, wanted, f"strides {x.stride()}, {keys} keys")
    cache, table = PagedKV.from_dense(k_cache, v_cache, page_size=None if cache_leftpad is None else 1)
    if cache_batch_idx is not None:
        rows = PageTable(table, rows=check_ints("cache_batch_idx", cache_batch_idx, batch, table.device))
    elif table.shape[0] < batch:
        raise bad_value("k_cache", f"a batch of {batch} or more, or a cache_batch_idx", table.shape[0])
    else:
        rows = PageTable(table[:batch])
    return cache, rows if cache_leftpad is None else _shifted(rows, cache_leftpad, batch)


def _shifted(table: PageTable, leftpad: Tensor, batch: int) -> Tensor:
    """A table of pages of one key, each row without its first ``leftpad`` entries."""
    device, width = table.entries.device, table.entries.shape[1]
    check_ints("cache_leftpad", leftpad, batch, device)
    seq = torch.arange(batch, device=device)[:, None].expand(batch, width)
    page = leftpad.long()[:, None] + torch.arange(width, device=device)
    return table.lookup(seq.flatten(), page.flatten(), 1).view(batch, width)


def append(cache: PagedKV, table: BlockTable, k: Tensor | None, v: Tensor | None, seq_lens: Tensor) -> Tensor:
    """Write k and v [B, S, Hkv, D] behind the ``seq_lens`` keys of each sequence, and return how many it has then."""
    k, v = (with_rows(name, x, 4) for name, x in (("k", k), ("v", v)))
    check_values(v, k)
    batch, num_kv_heads, head_dim = seq_lens.shape[0], cache.num_kv_heads, cache.head_dim
    if (k.shape[0], *k.shape[2:]) != (batch, num_kv_heads, head_dim):
        raise bad_value("k", f"shape [{batch}, S_new, {num_kv_heads}, {head_dim}]", tuple(k.shape))
    seq_lens = seq_lens + k.shape[1]
    where = slots(table, seq_lens, cache.page_size, num_tokens=k.shape[0] * k.shape[1])
    append_kv(cache, k.flatten(0, 1), v.flatten(0, 1), where)
    return seq_lens
