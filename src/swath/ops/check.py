"""``check``: read a page table to the host and say what is wrong with it."""

from __future__ import annotations

import torch
from torch import Tensor

from swath import checks
from swath.cache import PagedKeys, PagedKV
from swath.errors import bad_value
from swath.pages import BlockTable, PageTable, pages_holding
from swath.window import Window


def check(
    cache: PagedKV,
    block_table: BlockTable,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    num_steps: int = 1,
    q_start: Tensor | None = None,
    window: Window | int | None = None,
) -> None:
    """Check the contents of device tensors, which no operator does: a debugging aid that syncs.

    Looks at lengths, at ``cu_seqlens_q``, and at every table entry that holds a key some query can see: it must lie
    in the pool.

    Args:
        cache, block_table, seq_lens, cu_seqlens_q, q_start, window: as ``paged_attention`` takes them.
        num_steps: S, query tokens of each sequence where ``cu_seqlens_q`` is None.

    Raises:
        ValueError: naming the argument, the sequence and the entry.
    """
    window = Window.of(window)
    checks.check_tensor("seq_lens", seq_lens, 1)
    keys = PagedKeys(cache, PageTable.checked(block_table, seq_lens.shape[0]), seq_lens)
    lengths = seq_lens.tolist()
    q_lens = [num_steps] * len(lengths) if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
    for b, (kv_len, q_len) in enumerate(zip(lengths, q_lens, strict=True)):
        if kv_len < 0:
            raise bad_value("seq_lens", "lengths >= 0", f"{kv_len} for sequence {b}")
        if q_len < 0:
            raise bad_value("cu_seqlens_q", "an ascending tensor", f"{q_len} rows for sequence {b}")
        if kv_len > keys.table.row(b).shape[0] * cache.page_size:
            raise bad_value("block_table", f"pages for {kv_len} keys of sequence {b}", keys.table.row(b).shape[0])
        first = kv_len - q_len if q_start is None else int(q_start[b])
        if q_len:
            _check_visible(keys, window.for_sequence(b), b, first, first + q_len - 1)


def _check_visible(keys: PagedKeys, window: Window, b: int, first: int, last: int) -> None:
    lead, left, right = window.key_ranges(first, last, keys.kv_len(b))
    size, row = keys.cache.page_size, keys.table.row(b)
    for start, stop in ((0, lead), (left, right)):
        if start == stop:
            continue
        held = pages_holding(start, stop, size)
        pages = row[held]
        bad = torch.nonzero((pages < 0) | (pages >= keys.cache.num_pages)).flatten().tolist()
        if bad:
            entry = held.start + bad[0]
            wanted = f"visible entries in [0, {keys.cache.num_pages})"
            raise bad_value("block_table", wanted, f"{int(row[entry])} at sequence {b}, entry {entry}")
