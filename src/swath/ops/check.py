"""``check``: read a page table to the host and say what is wrong with it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from swath import checks
from swath.cache import PagedKeys, PagedKV
from swath.errors import bad_type, bad_value
from swath.pages import BlockTable, PageTable
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
        TypeError, ValueError: naming the argument, and what is wrong in it: the sequence, the entry.
    """
    window = Window.of(window)
    checks.check_count("num_steps", num_steps, "an int >= 0")
    keys = _checked(cache, block_table, seq_lens, cu_seqlens_q, num_steps, q_start, window)
    lengths = seq_lens.tolist()
    q_lens = [num_steps] * len(lengths) if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
    starts = None if q_start is None else q_start.tolist()
    by_row = window if window.bounds is None else replace(window, bounds=window.bounds.reshape(-1, 2))
    for b, (kv_len, q_len) in enumerate(zip(lengths, q_lens, strict=True)):
        if kv_len < 0:
            raise bad_value("seq_lens", "lengths >= 0", f"{kv_len} for sequence {b}")
        if q_len < 0:
            raise bad_value("cu_seqlens_q", "an ascending tensor", f"{q_len} rows for sequence {b}")
        pages = keys.table.row(b, cache.page_size).shape[0]
        if kv_len > pages * cache.page_size:
            raise bad_value("block_table", f"pages for {kv_len} keys of sequence {b}", pages)
        first = kv_len - q_len if starts is None else starts[b]
        if q_len:
            row = b * num_steps if cu_seqlens_q is None else int(cu_seqlens_q[b])
            of_sequence = by_row.for_sequence(b, slice(row, row + q_len))
            _check_visible(keys, of_sequence, b, first, first + q_len - 1)


def _checked(
    cache: PagedKV,
    block_table: BlockTable,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    num_steps: int,
    q_start: Tensor | None,
    window: Window,
) -> PagedKeys:
    """The keys that the arguments of ``check`` describe, if their types and shapes are right."""
    if not isinstance(cache, PagedKV):
        raise bad_type("cache", "a PagedKV", type(cache).__name__)
    device = cache.k.device
    num_seqs = checks.check_ints("seq_lens", seq_lens, None, device).shape[0]
    if cu_seqlens_q is not None:
        checks.check_ints("cu_seqlens_q", cu_seqlens_q, num_seqs + 1, device)
    if q_start is not None:
        checks.check_ints("q_start", q_start, num_seqs, device)
    if isinstance(window.global_tokens, Tensor):
        checks.check_ints("window.global_tokens", window.global_tokens, num_seqs, device)
    if window.bounds is not None:
        _check_bounds(window.bounds, seq_lens, num_steps, cu_seqlens_q)
    return PagedKeys(cache, PageTable.checked(block_table, num_seqs, device), seq_lens)


def _check_bounds(bounds: Tensor, seq_lens: Tensor, num_steps: int, cu_seqlens_q: Tensor | None) -> None:
    """Check that every query row has a range: of rows that no sequence has, nothing is known here."""
    if cu_seqlens_q is not None:
        checks.check_tensor("window.bounds", bounds, 2, seq_lens.device)
        most = max(cu_seqlens_q.tolist())
        if bounds.shape[0] < most:
            raise bad_value("window.bounds", f"shape [{most} or more, 2], a range for each row", tuple(bounds.shape))
        return
    checks.check_tensor("window.bounds", bounds, bounds.dim(), seq_lens.device)
    rows = (seq_lens.shape[0], num_steps, 2)
    if bounds.shape != rows and (num_steps != 1 or bounds.shape != (rows[0], 2)):
        raise bad_value("window.bounds", f"shape {rows}, a range [lo, hi) for each query row", tuple(bounds.shape))


def _check_visible(keys: PagedKeys, window: Window, b: int, first: int, last: int) -> None:
    row = keys.table.row(b, keys.cache.page_size).cpu()
    seen = window.seen_by_any(first, last, keys.kv_len(b)).nonzero().flatten()
    held = torch.unique(seen // keys.cache.page_size)
    bad = held[(row[held] < 0) | (row[held] >= keys.cache.num_pages)].tolist()
    if bad:
        wanted = f"visible entries in [0, {keys.cache.num_pages})"
        raise bad_value("block_table", wanted, f"{int(row[bad[0]])} at sequence {b}, entry {bad[0]}")
