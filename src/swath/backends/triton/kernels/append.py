"""Write new tokens into a paged cache: a program quantises some rows of K and the same of V."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.cache import v_offset
from swath.backends.device.quant import channel_scale, encode, head_scale, own_scale


@triton.jit(do_not_specialize=("num_rows", "num_slots"))
def append_kernel(
    k, v, cache_k, cache_v, k_scale, v_scale, slots, num_rows, num_slots,
    k_token, k_head, v_token, v_head, page_stride, head_stride, token_stride,
    ks_page, ks_head, ks_token, vs_page, vs_head, vs_token,
    F: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One program per ``ROWS`` rows (token, kv head), heads fastest; a slot outside the cache is skipped."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // F.kv_heads).to(tl.int64), (row % F.kv_heads).to(tl.int64)
    slot = tl.load(slots + token, mask=row < num_rows, other=-1).to(tl.int64)
    wanted = (slot >= 0) & (slot < num_slots)
    page, offset = slot // F.page_size, slot % F.page_size
    to = page * page_stride + head * head_stride + offset * token_stride
    scale_at = page * ks_page + head * ks_head + offset * ks_token
    copy_rows(k + token * k_token + head * k_head, cache_k + to, k_scale, scale_at, head, wanted,
              False, F, LARGEST, HARDWARE)  # fmt: skip
    to = v_offset(to, page, head, offset, F)
    scale_at = page * vs_page + head * vs_head + offset * vs_token
    copy_rows(v + token * v_token + head * v_head, cache_v + to, v_scale, scale_at, head, wanted,
              True, F, LARGEST, HARDWARE)  # fmt: skip


@triton.jit
def copy_rows(source, target, scale, scale_at, head, wanted, OF_V: tl.constexpr, F: tl.constexpr,
              LARGEST: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """The ``wanted`` rows [N] of K or V from ``source`` [N] to where the cache has them, ``target`` [N]."""
    column = tl.arange(0, F.block_dv if OF_V else F.block_d)
    live = (column < (F.v_head_dim if OF_V else F.head_dim))[None, :]
    x = tl.load(source[:, None] + column[None, :], mask=wanted[:, None] & live, other=0.0)
    if F.quantised:
        x = x.to(tl.float32)
        x = tl.div_rn(x, stored_scale(x, scale, scale_at, head, wanted, column, live, OF_V, LARGEST, F))
    x = encode(x, F, HARDWARE).to(target.dtype.element_ty)
    tl.store(target[:, None] + column[None, :], x, mask=wanted[:, None] & live)


@triton.jit
def stored_scale(x, scale, at, head, wanted, column, live, OF_V: tl.constexpr, LARGEST: tl.constexpr, F: tl.constexpr):
    """The scales that divide rows x [N, D]: token scales of their own, stored at ``at`` [N], or static ones."""
    fold: tl.constexpr = F.v_fold if OF_V else F.k_fold
    if fold == "token":
        own = own_scale(tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1), LARGEST).to(scale.dtype.element_ty)
        tl.store(scale + at, own, mask=wanted)
        unit = own.to(tl.float32)[:, None]
    elif fold == "channel":
        dim: tl.constexpr = F.v_head_dim if OF_V else F.head_dim
        unit = channel_scale(scale, head[:, None], column[None, :], dim, live)
        unit = tl.where(unit != 0, unit, 1.0)
    else:
        unit = (head_scale(scale, head, OF_V, F) + 0.0 * head)[:, None]
        unit = tl.where(unit != 0, unit, 1.0)
    return unit
