"""Write new tokens into a paged cache: a program per (token, kv head) quantises one row of K and one of V."""

from __future__ import annotations

import triton
import triton.language as tl

from swath.backends.device.cache import v_offset
from swath.backends.device.quant import channel_scale, encode, head_scale, own_scale


@triton.jit
def stored_scale(x, scale, at, kv_head, column, live, OF_V: tl.constexpr, LARGEST: tl.constexpr, F: tl.constexpr):
    """The scale that divides the row ``x``: its own token scale, stored at ``at``, or the cache's static scale."""
    fold: tl.constexpr = F.v_fold if OF_V else F.k_fold
    if fold == "token":
        own = own_scale(tl.max(tl.where(x == x, tl.abs(x), float("inf")), 0), LARGEST).to(scale.dtype.element_ty)
        tl.store(scale + at, own)
        unit = own.to(tl.float32)
    elif fold == "channel":
        unit = channel_scale(scale, kv_head, column, F.v_head_dim if OF_V else F.head_dim, live)
        unit = tl.where(unit != 0, unit, 1.0)
    else:
        unit = head_scale(scale, kv_head, OF_V, F) + 0.0 * column
        unit = tl.where(unit != 0, unit, 1.0)
    return unit


@triton.jit(do_not_specialize=("num_slots",))
def append_kernel(
    k, v, cache_k, cache_v, k_scale, v_scale, slots, num_slots,
    k_token, k_head, v_token, v_head, page_stride, head_stride, token_stride,
    ks_page, ks_head, ks_token, vs_page, vs_head, vs_token,
    F: tl.constexpr, BLOCK_D: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program per (token, kv head), heads fastest; a slot outside the cache is skipped."""
    kv_head = tl.program_id(0) % F.kv_heads
    token = (tl.program_id(0) // F.kv_heads).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    page, offset = slot // F.page_size, slot % F.page_size
    head = kv_head.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    live = column < F.head_dim
    row = page * page_stride + head * head_stride + offset * token_stride
    x = tl.load(k + token * k_token + head * k_head + column, mask=live, other=0.0)
    at = page * ks_page + head * ks_head + offset * ks_token
    if F.quantised:
        x = x.to(tl.float32)
        x = tl.div_rn(x, stored_scale(x, k_scale, at, kv_head, column, live, False, LARGEST, F))
    tl.store(cache_k + row + column, encode(x, F).to(cache_k.dtype.element_ty), mask=live)
    row = v_offset(row, page, head, offset, F)
    live = column < F.v_head_dim
    x = tl.load(v + token * v_token + head * v_head + column, mask=live, other=0.0)
    at = page * vs_page + head * vs_head + offset * vs_token
    if F.quantised:
        x = x.to(tl.float32)
        x = tl.div_rn(x, stored_scale(x, v_scale, at, kv_head, column, live, True, LARGEST, F))
    tl.store(cache_v + row + column, encode(x, F).to(cache_v.dtype.element_ty), mask=live)
