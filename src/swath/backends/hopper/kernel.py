"""The kernel: persistent and warp-specialised, in the design of FlashAttention-3, over dense or paged keys.

A program has one or two MMA warpgroups of 64 query rows each and two load warps. As many programs as fit run from the
start to the end of the launch; they take work tiles, longest first, so that none waits for another. The tiles, their
masks and results are those of the Triton kernels (``triton/kernels/tile.py``), by the same helpers. The parts:

    gluon/scheduler.py    work tiles, and how they reach the warps
    gluon/key_tiles.py    the keys of a work tile
    gluon/pipeline.py     the pipelines in shared memory
    load.py               the load warps
    mainloop.py           softmax(Q K^T) V of an MMA warpgroup, with softmax.py and mask.py
    epilogue.py           its results
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from swath.backends.device.cache import load_entries, page_in_sight, pages_in_sight, pages_of, table_row
from swath.backends.device.softmax import FLOOR, state_of_sink
from swath.backends.device.window import interior_of, reach_of, rows_of, view_near
from swath.backends.gluon.key_tiles import key_tiles_of
from swath.backends.gluon.pipeline import (
    CONSUMER_ROWS,
    Descriptors,
    Pipelines,
    as_columns,
    as_tiles,
    barriers_suffice,
    blocks_of,
    box_columns,
    columns_of,
    consumer_release,
    consumer_wait,
    new_barriers,
    new_pipeline,
    query_boxes,
    query_state,
    value_box,
    with_narrow_tile,
)
from swath.backends.gluon.scheduler import (
    Batch,
    get_work,
    has_work,
    heads_of,
    new_work_pipeline,
    release_work,
    reread_work,
)
from swath.backends.hopper.config import config_of
from swath.backends.hopper.epilogue import Output, epilogue, q_heads
from swath.backends.hopper.load import load_qk_warp, load_v_warp
from swath.backends.hopper.mainloop import QueryRows, attend_once, mainloop, score_layout
from swath.backends.hopper.scales import ScoreScales, is_signed, score_scale
from swath.backends.hopper.softmax import P_LOG2, sum_of_threads
from swath.backends.triton.kernels.walk import reach_in_list


@gluon.jit
def mma_warpgroup(WG: gl.constexpr, output, score_scales, pipes, batch, C: gl.constexpr):
    """An MMA warpgroup: 64 rows of every work tile of this program over all their keys."""
    D: gl.constexpr = columns_of("k", C)
    DV: gl.constexpr = columns_of("v", C)
    k = as_tiles(pipes.k, C.block_n, D, pipes.k.stages.dtype)
    if C.F.v_e4m3:
        v = as_columns(pipes.v, DV, C.block_n)
    else:
        v = as_tiles(pipes.v, C.block_n, DV, pipes.v.stages.dtype)
    if C.narrow_n > 0:
        narrow_k = as_tiles(pipes.narrow_k, C.narrow_n, D, pipes.k.stages.dtype)
        narrow_v = as_tiles(pipes.narrow_v, C.narrow_n, DV, pipes.v.stages.dtype)
        tiles = Pipelines(pipes.q, k, v, narrow_k, narrow_v, pipes.work)
        run_single_pass(WG, output, score_scales, tiles, batch, C)
    else:
        run_mainloop(WG, output, score_scales, Pipelines(pipes.q, k, v, None, None, pipes.work), batch, C)
    if output.desc is not None:
        tma.store_wait(0)


@gluon.constexpr_function
def rereads_work(C):
    """Whether a warpgroup reads its work tile again for the epilogue, and keeps none of its numbers meanwhile.

    It does where registers are few: loops over heads of 64 have enough, and were 8 % slower so, in the same
    instructions.
    """
    return C.narrow_n > 0 or C.F.value.v_head_dim > 128


@gluon.jit
def run_mainloop(WG: gl.constexpr, output, score_scales, pipes, batch, C: gl.constexpr):
    """Work tiles with any number of key tiles. The next one begins while the last product of this one still runs."""
    work_count = 0
    kv_count = 0
    rows = next_rows(work_count, WG, output.sink, score_scales, pipes, batch, C)
    while has_work(rows.key_tiles.work, C):
        m, l, values = mainloop(kv_count, work_count, WG, rows, output, pipes, batch, C)
        work = rows.key_tiles.work
        kv_count += rows.key_tiles.walk.total
        work_count += 1
        rows = next_rows(work_count, WG, output.sink, score_scales, pipes, batch, C)
        l = sum_of_threads(l, m)
        if output.desc is not None:
            # Passed already: a block boundary, or ptxas finds the next rows after the wait for the product. The stage
            # is not loaded anew before these rows' results have left it.
            consumer_wait(query_state(pipes.q, work_count - 1, WG, C))
        acc = warpgroup_mma_wait(0, deps=[values])  # [M, Dv]
        consumer_release("v", kv_count - 1, C)
        if rereads_work(C):
            work = reread_work(work_count - 1, pipes.work, 4)
        epilogue((m, l, acc), work_count - 1, work, WG, output, batch, C)


@gluon.jit
def run_single_pass(WG: gl.constexpr, output, score_scales, pipes, batch, C: gl.constexpr):
    """Work tiles whose keys are all in one stage. Other programs of the multiprocessor fill the gaps between them."""
    work_count = 0
    rows = next_rows(work_count, WG, output.sink, score_scales, pipes, batch, C)
    while has_work(rows.key_tiles.work, C):
        state = attend_once(work_count, WG, rows, output, pipes, batch, C)
        epilogue(state, work_count, reread_work(work_count, pipes.work, 4), WG, output, batch, C)
        work_count += 1
        rows = next_rows(work_count, WG, output.sink, score_scales, pipes, batch, C)


@gluon.jit
def next_rows(work_count, WG: gl.constexpr, sink, score_scales, pipes, batch, C: gl.constexpr):
    """Wait for the ``work_count``-th work tile and prepare the rows of a warpgroup in it."""
    POSITIONS: gl.constexpr = CONSUMER_ROWS // C.pack
    i = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, score_layout(C.block_n, C)))
    work = get_work(work_count, pipes.work, 4, C)
    if not rereads_work(C):
        release_work(work_count, pipes.work)
    key_tiles = key_tiles_of(work, batch, C)
    m, l = initial_state(i, work.head, sink, C)
    first = work.q_start + work.q_begin + WG * POSITIONS
    p = first + i // C.pack
    # Rows past the end have the bounds of the last one. After the last work tile there are no rows, but addresses.
    last = gl.maximum(work.q_len - 1, 0) if C.F.bounds else first + POSITIONS - 1
    view = view_near(work.q_start, work.q_row, batch.window, C.F)
    own = rows_of(first, last, p, view, work.kv_len, C.F)
    reach = reach_in_list(reach_of(p, own, key_tiles.band, work.lead, C.F), key_tiles.walk)
    full = seen_by_all(own, key_tiles, C)
    scale_log2 = score_scale(i, work, WG, score_scales, C)
    all_live = all_pages_live(key_tiles, batch, C)
    signed = is_signed(scale_log2, C)
    return QueryRows(key_tiles, m, l, reach, full, scale_log2, signed, score_scales.cap_log2, all_live)


@gluon.jit
def seen_by_all(rows, key_tiles, C: gl.constexpr):
    """From where to where the list has keys that all rows see. With bounds nothing: see ``hide_outside_window``."""
    if C.F.bounds:
        return ()
    else:
        full_from, full_to = interior_of(key_tiles.band, rows, C.F)
        return full_from - key_tiles.walk.gap, full_to - key_tiles.walk.gap


@gluon.jit
def initial_state(i, head, sink, C: gl.constexpr):
    """The state (m, l) of the rows ``i`` [M] before any key: that of their sink logits, if there are any."""
    m = gl.full((CONSUMER_ROWS,), FLOOR, gl.float32, layout=i.type.layout)
    l = gl.full((CONSUMER_ROWS,), 0.0, gl.float32, layout=i.type.layout)
    if sink is not None:
        last: gl.constexpr = heads_of(C) - 1  # after the last work tile there is no head, but an address
        m, l = state_of_sink(gl.load(sink + q_heads(i, gl.minimum(head, last), C)).to(gl.float32))
        if C.F.v_e4m3:
            m, l = m - P_LOG2, l * (2.0**P_LOG2)
    return m, l


@gluon.jit
def all_pages_live(key_tiles, batch, C: gl.constexpr):
    """Whether every table entry of the keys in sight names a page of the pool."""
    if C.F.page_size == 0:
        return key_tiles.work.head == key_tiles.work.head  # true, and a tensor as below
    else:
        lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
        entries, _ = table_row(
            batch.table, batch.table_index, key_tiles.work.b, batch.table_stride, batch.table_width, C.F
        )
        dead = lane * 0
        for i in range(gl.cdiv(pages_in_sight(key_tiles.band, C.F.page_size), 128)):
            page, seen = page_in_sight(i * 128 + lane, key_tiles.band, C.F.page_size)
            entry = pages_of(load_entries(entries, page, seen, 0, C.F), C.F)
            dead = dead | gl.where((entry < 0) | (entry >= batch.num_pages), 1, 0)
        return gl.max(dead, 0) == 0


RUN_TIME = (
    "lead", "window", "steps", "claimed", "num_seqs", "table_width", "num_pages", "table_stride", "num_tiles",
    "v_table_width",
)  # fmt: skip


@gluon.jit(do_not_specialize=RUN_TIME)
def hopper_tile_kernel(
    q_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc, out_desc, counter, out, lse, sink, q_scale, k_scale, v_scale,
    table, table_index, lens, cu_q, q_start, lead, scale_log2, cap_log2, window,
    steps, claimed, num_seqs, table_width, num_pages, table_stride, num_tiles, v_table, v_table_width,
    out_seq, out_token, out_head, F: gl.constexpr, LAUNCH: gl.constexpr,
):  # fmt: skip
    """The programs of a launch, as many as multiprocessors hold at once, share ``num_tiles`` work tiles."""
    C: gl.constexpr = config_of(F, LAUNCH)
    gl.static_assert(barriers_suffice(C), "each stage needs a named barrier, and a program has 16")
    K_BLOCKS: gl.constexpr = blocks_of("k", C)
    V_BLOCKS: gl.constexpr = blocks_of("v", C)
    BOXES: gl.constexpr = C.block_n // C.box_rows
    V_BOX: gl.constexpr = value_box(C)
    # Of q's memory results are another user, so that it is counted in boxes of their type.
    OUT: gl.constexpr = out.dtype.element_ty
    q_pipe = new_pipeline(C.q_stages, C.consumers * query_boxes(C), CONSUMER_ROWS, box_columns("out", C), OUT)
    k_pipe = new_pipeline(C.stages, K_BLOCKS * BOXES, C.box_rows, box_columns("k", C), k_desc.dtype)
    v_pipe = new_pipeline(C.stages, V_BLOCKS * BOXES, V_BOX[0], V_BOX[1], v_desc.dtype)
    narrow_k, narrow_v = None, None
    if C.narrow_n > 0:
        narrow_k = with_narrow_tile(k_pipe, K_BLOCKS, C.narrow_n, C.narrow_rows)
        narrow_v = with_narrow_tile(v_pipe, V_BLOCKS, C.narrow_n, C.narrow_rows)
    pipes = Pipelines(q_pipe, k_pipe, v_pipe, narrow_k, narrow_v, new_work_pipeline(C.consumers))
    descriptors = Descriptors(q_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc)
    cut_loaded = new_barriers(1, 1).index(0)
    fence_async_shared()
    batch = Batch(
        table, table_index, lens, cu_q, q_start, lead, window, steps, claimed, num_seqs, table_width, num_pages,
        table_stride, num_tiles, v_table, v_table_width,
    )  # fmt: skip
    output = Output(out_desc, q_pipe, out, lse, sink, v_scale, out_seq, out_token, out_head)
    score_scales = ScoreScales(scale_log2, cap_log2, k_scale, q_scale)
    load_registers: gl.constexpr = C.producer_registers
    mma_registers: gl.constexpr = C.consumer_registers
    if C.consumers == 2:
        gl.warp_specialize(
            [
                (mma_warpgroup, (gl.constexpr(0), output, score_scales, pipes, batch, C)),
                (mma_warpgroup, (gl.constexpr(1), output, score_scales, pipes, batch, C)),
                (load_qk_warp, (descriptors, counter, pipes, batch, C)),
                (load_v_warp, (descriptors, cut_loaded, pipes, batch, C)),
            ],
            [4, 1, 1],
            [mma_registers, load_registers, load_registers],
        )
    else:
        gl.warp_specialize(
            [
                (mma_warpgroup, (gl.constexpr(0), output, score_scales, pipes, batch, C)),
                (load_qk_warp, (descriptors, counter, pipes, batch, C)),
                (load_v_warp, (descriptors, cut_loaded, pipes, batch, C)),
            ],
            [1, 1],
            [load_registers, load_registers],
        )
