"""A kernel of the kind that swath's predecessors replaced: one program for each query token and head.

No matrix units, no sharing of keys between heads or tokens, one dequantisation for each of them. It does skip what
the window hides, so that ratios against it show what tiles and folding bring, and nothing that a window brings.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(scale, page, head, slot, column, live, in_dim, scale_page, scale_head, scale_token, KIND: tl.constexpr):
    """What multiplies stored rows [N, D]: a factor, one for each channel, or one for each key."""
    if KIND == "none":
        return 1.0
    elif KIND == "tensor":
        return tl.load(scale).to(tl.float32)
    elif KIND == "channel":
        return tl.load(scale + head * scale_head + column, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    else:
        at = scale + page * scale_page + head * scale_head + slot * scale_token
        return tl.load(at, mask=live, other=0.0).to(tl.float32)[:, None]


@triton.jit
def scalar_kernel(
    q, k, v, out, sink, k_scale, v_scale, table, row_seq, row_pos,
    scale, size, leading,
    group, kv_page, kv_head, kv_token, scale_page, scale_head, scale_token, table_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr,
    HAS_SINK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[row, head] over the visible keys of the row, in blocks of BLOCK_N keys; size < 0 is no window."""
    row, q_head = tl.program_id(0), tl.program_id(1)
    head = q_head // group
    p = tl.load(row_pos + row)
    entries = table + tl.load(row_seq + row).to(tl.int64) * table_stride
    column = tl.arange(0, PADDED_DIM)
    in_dim = column < DIM
    query = tl.load(q + (row.to(tl.int64) * HEADS + q_head) * DIM + column, mask=in_dim, other=0.0).to(tl.float32)
    m, l = -float("inf"), 0.0
    if HAS_SINK:
        m, l = tl.load(sink + q_head).to(tl.float32), 1.0
    acc = tl.zeros([PADDED_DIM], tl.float32)
    left = tl.maximum(p - size + 1, 0) if size >= 0 else 0
    lead_blocks = tl.cdiv(tl.minimum(leading, left), BLOCK_N)
    first = tl.maximum(left // BLOCK_N, lead_blocks)
    for i in range(lead_blocks + tl.cdiv(p + 1, BLOCK_N) - first):
        block = tl.where(i < lead_blocks, i, first + i - lead_blocks)
        pos = block * BLOCK_N + tl.arange(0, BLOCK_N)
        live = (pos <= p) & ((pos >= left) | (pos < leading))
        page = tl.load(entries + pos // PAGE, mask=live, other=0).to(tl.int64)
        slot = pos % PAGE
        at = (page * kv_page + head * kv_head + slot * kv_token)[:, None] + column[None, :]
        wanted = live[:, None] & in_dim[None, :]
        keys = tl.load(k + at, mask=wanted, other=0.0).to(tl.float32)
        keys *= scale_of(k_scale, page, head, slot, column, live, in_dim, scale_page, scale_head, scale_token, KIND)
        s = tl.where(live, tl.sum(keys * query[None, :], 1) * scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        weight = tl.exp(s - m_new)
        alpha = tl.exp(m - m_new)
        values = tl.load(v + at, mask=wanted, other=0.0).to(tl.float32)
        values *= scale_of(v_scale, page, head, slot, column, live, in_dim, scale_page, scale_head, scale_token, KIND)
        acc = acc * alpha + tl.sum(values * weight[:, None], 0)
        l = l * alpha + tl.sum(weight, 0)
        m = m_new
    at = out + (row.to(tl.int64) * HEADS + q_head) * DIM + column
    tl.store(at, (acc / l).to(out.dtype.element_ty), mask=in_dim)
