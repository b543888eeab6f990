"""The mainloop of an MMA warpgroup: softmax(Q K^T) V for its 64 query rows.

``mainloop`` takes any number of key tiles, one after the other, in the order of FlashAttention-3: while the tensor
cores multiply the P of one key tile with its V, the warpgroup computes the softmax of the next one. ``attend_once``
takes all keys of its rows in one pass, where one stage of the pipelines holds them.

In comments on shapes, M is the 64 rows of the warpgroup, N the keys of a tile, D the head_dim, Dv that of values.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from swath.backends.device.softmax import exp_scores
from swath.backends.gluon.key_tiles import key_tile, narrow_tile, num_masked
from swath.backends.gluon.pipeline import (
    CONSUMER_ROWS,
    bytes_of,
    consumer_release,
    consumer_wait,
    key_state,
    pipeline_state,
    query_state,
)
from swath.backends.hopper.epilogue import release_stored_rows
from swath.backends.hopper.mask import masked_scores
from swath.backends.hopper.scales import positive_scale
from swath.backends.hopper.softmax import (
    fragment_max,
    fragment_softmax,
    of_rows,
    rescale_acc,
    sum_of_threads,
    thread_sums,
    to_thread_sums,
)


class QueryRows(NamedTuple):
    """The 64 rows of an MMA warpgroup in a work tile: their keys, their state before any key, and whom they see.

    All rows see the keys ``full[0] .. full[1] - 1`` of the list; of rows with bounds each warp finds out for its own.
    ``all_live``: every page in sight is in the pool.
    """

    key_tiles: gl.tensor
    m: gl.tensor  # [M]
    l: gl.tensor  # [M]
    reach: gl.tensor  # a Reach in places of the list of keys
    full: gl.tensor
    scale_log2: gl.tensor  # a number, or (``F.row_scales``) [M]
    signed: gl.tensor  # of fp8 queries whether it need not be above 0: see ``hopper/scales.py``
    cap_log2: gl.tensor
    all_live: gl.tensor


@gluon.jit
def mainloop(kv_count, work_count, WG: gl.constexpr, rows, output, pipes, batch, C: gl.constexpr):
    """The state (m, l, acc) of the rows after all key tiles, with ``l`` [M, 4] as a sum for each thread.

    ``acc`` is still waiting for the last product with V.

    ``kv_count`` key tiles and ``work_count`` work tiles went through the pipelines before.
    """
    key_tiles = rows.key_tiles
    q, k = query_state(pipes.q, work_count, WG, C), key_state(pipes.k, kv_count, C)
    start, new_from = key_tile(0, key_tiles, C)
    consumer_wait(q)
    if C.F.dots == "e4m3":
        rows = with_positive_scale(rows, q.tile, C)
    consumer_wait(k)
    s = warpgroup_mma_wait(0, deps=[start_scores(q.tile, k.tile, C)])  # [M, N]
    consumer_release("k", kv_count, C)
    if output.desc is not None:
        release_stored_rows(work_count - 1, C)
    s, scale = masked_scores(s, start, new_from, rows, batch, True, C)
    p, m, l, alpha = fragment_softmax(s, scale, rows.m, to_thread_sums(rows.l), C)  # [M, N], [M], [M, 4], [M]
    acc = new_accumulator(C)  # [M, Dv]
    masked = gl.maximum(gl.where(rows.all_live, num_masked(key_tiles), key_tiles.walk.total), 1)
    p, state = overlap(1, masked, kv_count, p, (m, l, acc, alpha), q, rows, pipes, batch, True, C)
    p, state = overlap(masked, key_tiles.walk.total, kv_count, p, state, q, rows, pipes, batch, False, C)
    m, l, acc, alpha = state
    acc = rescale_acc(acc, alpha)
    if output.desc is None:
        consumer_release("q", work_count, C)
    v = pipeline_state(pipes.v, kv_count + key_tiles.walk.total - 1)
    consumer_wait(v)
    return m, l, warpgroup_mma(as_operand(p, acc, v.tile.dtype), right_operand(v.tile, C), acc, is_async=True)


@gluon.jit
def with_positive_scale(rows, q, C: gl.constexpr):
    """The rows of fp8 queries, whose tile q has come, with a score scale above 0."""
    key_tiles, m, l, reach, full, scale_log2, signed, cap_log2, all_live = rows
    scale_log2 = positive_scale(scale_log2, signed, q, C)
    return QueryRows(key_tiles, m, l, reach, full, scale_log2, signed, cap_log2, all_live)


@gluon.jit
def overlap(first, end, kv_count, p, state, q, rows, pipes, batch, MASKED: gl.constexpr, C: gl.constexpr):
    """Key tiles ``first .. end - 1``: the product of the last tile's p with its V runs beside the softmax of this one.

    So p comes in, and goes out, before its product with V; and acc before its factor ``alpha``.
    """
    m, l, acc, alpha = state  # [M], [M, 4], [M, Dv], [M]
    for j in range(first, end):
        start, new_from = key_tile(j, rows.key_tiles, C)
        k, v = key_state(pipes.k, kv_count + j, C), pipeline_state(pipes.v, kv_count + j - 1)
        p16 = as_operand(p, acc, v.tile.dtype)  # [M, N]
        consumer_wait(k)
        scores = start_scores(q.tile, k.tile, C)  # [M, N] = [M, D] @ [D, N]
        acc = rescale_acc(acc, alpha)
        consumer_wait(v)
        values = warpgroup_mma(p16, right_operand(v.tile, C), acc, is_async=True)  # [M, Dv] += [M, N] @ [N, Dv]
        s = warpgroup_mma_wait(1, deps=[scores])
        s, scale = masked_scores(s, start, new_from, rows, batch, MASKED, C)
        p, m, l, alpha = fragment_softmax(s, scale, m, l, C)
        # A barrier known to have passed makes a block boundary here, and the move keeps p above it: otherwise ptxas
        # hoists the wait for the product with V over the softmax, and nothing overlaps. This loop waits for no other
        # barrier of q: before a second wait at a barrier Triton lets all warps meet.
        p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [p], dtype=gl.float32, is_pure=False, pack=1)
        consumer_wait(q)
        acc, p, alpha = warpgroup_mma_wait(0, deps=[values, p, alpha])
        release_tiles(kv_count + j, C)
    return p, (m, l, acc, alpha)


@gluon.jit
def release_tiles(count, C: gl.constexpr):
    """Give back the stages of the ``count``-th tile of K and of the tile of V before it."""
    consumer_release("k", count, C)
    consumer_release("v", count - 1, C)


@gluon.jit
def attend_once(work_count, WG: gl.constexpr, rows, output, pipes, batch, C: gl.constexpr):
    """The state (m, l, acc) of rows whose keys are all in one stage, a narrow tile and the two halves of a wide one.

    First all scores, then all p, then all products with V. Nothing is rescaled, and acc does not exist while the scores
    do, so that small programs have registers enough. ``work_count`` counts the tiles of every pipeline.
    """
    HALF: gl.constexpr = C.block_n // 2
    m, l, key_tiles = rows.m, rows.l, rows.key_tiles
    acc = new_accumulator(C)
    q = query_state(pipes.q, work_count, WG, C)
    k_narrow, k = key_state(pipes.narrow_k, work_count, C), key_state(pipes.k, work_count, C)
    v_narrow, v = pipeline_state(pipes.narrow_v, work_count), pipeline_state(pipes.v, work_count)
    consumer_wait(q)
    consumer_wait(k)
    narrow = start_scores(q.tile, k_narrow.tile, C)  # [M, narrow_n]
    near = start_scores(q.tile, (k.tile[0].slice(HALF, HALF),), C)  # [M, HALF]
    far = start_scores(q.tile, (k.tile[0].slice(0, HALF),), C)  # [M, HALF]
    narrow, near, far = warpgroup_mma_wait(0, deps=[narrow, near, far])
    consumer_release("k", work_count, C)
    if output.desc is None:
        consumer_release("q", work_count, C)
    else:
        release_stored_rows(work_count - 1, C)
    narrow, scale = masked_scores(narrow, narrow_tile(key_tiles, C), C.block_n, rows, batch, True, C)
    near, _ = masked_scores(near, 0, None, rows, batch, True, C, HALF)
    far, _ = masked_scores(far, 0, None, rows, batch, True, C)
    m_new = fragment_max((narrow, near, far), scale, m)  # [M]
    # In an order in which the 16-bit p take the registers that scores leave: in others ptxas spills more.
    DTYPE: gl.constexpr = v.tile.dtype
    near, l_new = p_operand(near, scale, m_new, None, acc, DTYPE)
    far, l_new = p_operand(far, scale, m_new, l_new, acc, DTYPE)
    narrow, l_new = p_operand(narrow, scale, m_new, l_new, acc, DTYPE)
    l = l * gl.exp2(m - m_new) + sum_of_threads(l_new, m)  # [M]
    consumer_wait(v)
    # [M, Dv] = [M, narrow_n] @ [narrow_n, Dv] + [M, HALF] @ [HALF, Dv] + [M, HALF] @ [HALF, Dv]
    values = warpgroup_mma(narrow, v_narrow.tile, acc, use_acc=False, is_async=True)
    values = warpgroup_mma(near, v.tile.slice(HALF, HALF), values, is_async=True)
    values = warpgroup_mma(far, v.tile.slice(0, HALF), values, is_async=True)
    # Passed already: a block boundary, without which ptxas computes addresses of the output while all p are alive.
    consumer_wait(v)
    acc = warpgroup_mma_wait(0, deps=[values])
    consumer_release("v", work_count, C)
    return m_new, l, acc


@gluon.jit
def p_operand(s, scale, m, l, acc, DTYPE: gl.constexpr):
    """exp2(s * scale - m) [M, N] as the operand of its product with V, and its sums added to ``l``, if there is one."""
    p = exp_scores(s, scale, of_rows(m, s))
    l = thread_sums(p) if l is None else l + thread_sums(p)
    return as_operand(p, acc, DTYPE), l


@gluon.constexpr_function
def score_layout(keys, C):
    """The layout of scores [M, keys] as wgmma leaves them: see ``hopper/softmax.py``.

    In a single pass one instruction makes 64 columns of them: ptxas allows it the registers that a thread has when the
    program starts, not those that the MMA warpgroups get later.
    """
    columns = min(keys, 64) if C.narrow_n else keys
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32 // bytes_of("k", C)])


@gluon.jit
def start_scores(q, k, C: gl.constexpr):
    """Start the product q @ k^T of query rows [M, D] with a key tile [N, D], both as tuples of blocks of columns."""
    KEYS: gl.constexpr = k[0].shape[0]
    SCORES: gl.constexpr = score_layout(KEYS, C)
    DTYPE: gl.constexpr = gl.int32 if k[0].dtype == gl.int8 else gl.float32
    zero = gl.full((CONSUMER_ROWS, KEYS), 0, DTYPE, layout=SCORES)
    s = warpgroup_mma(q[0], k[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(q)):
        s = warpgroup_mma(q[i], k[i].permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def as_operand(p, acc, DTYPE: gl.constexpr):
    """p [M, N] as the operand of its product with V, which stays in the registers of the threads that computed it.

    Scores leave a thread the columns 0, 1, 8, 9, 16, 17, ... (plus 2 t for thread t of a row's four). That is also how
    wgmma takes its left operand from registers, so that only the dtype changes. Of 8 bits it takes 4 neighbours of a
    thread: keys are counted in another order then, that of ``key_of_column``.
    """
    if DTYPE == gl.float8e4nv:
        M: gl.constexpr = p.shape[0]
        N: gl.constexpr = p.shape[1]
        p = p.to(DTYPE).reshape((M, N // 16, 2, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((M, N))
        return gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 4), assert_trivial=True)
    else:
        OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
        return gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True)


@gluon.jit
def right_operand(tile, C: gl.constexpr):
    """A tile of V as [N, Dv]; in e4m3 it lies in shared memory as [Dv, N]."""
    return tile.permute((1, 0)) if C.F.v_e4m3 else tile


@gluon.jit
def new_accumulator(C: gl.constexpr):
    """acc [M, Dv] of rows before any key."""
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.F.v_head_dim, 32 // bytes_of("v", C)])
    return gl.full((CONSUMER_ROWS, C.F.v_head_dim), 0.0, gl.float32, layout=VALUES)
