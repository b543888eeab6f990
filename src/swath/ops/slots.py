"""``slots``: where new tokens go in a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from swath import checks
from swath.errors import bad_value
from swath.ops.torch_ops import TorchOp, must_dispatch
from swath.pages import BlockTable, PageTable, check_page_size, locate_slots


def slots(
    block_table: BlockTable,
    seq_lens: Tensor,
    page_size: int,
    *,
    num_tokens: int,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Where the newest tokens of each sequence are written, on the device of the table and without a sync.

    A worked example: ``slots(tensor([[7, 2]]), tensor([19]), 16, num_tokens=2)`` is
    ``[2 * 16 + 1, 2 * 16 + 2]``: the new tokens stand at positions 17 and 18, both in page 2.

    Args:
        block_table: [B, max_pages], flat ``(page_ids [N], page_indptr [B + 1])``, or a PageTable; int32 or int64, as
            are lengths.
        seq_lens: [B], keys of each sequence with its new tokens counted.
        page_size: token slots in a page.
        num_tokens: new tokens in all, T; without ``cu_seqlens_q`` every sequence has ``T / B``.
        cu_seqlens_q: [B + 1]; sequence b owns tokens ``cu[b] .. cu[b + 1] - 1``.

    Returns:
        int64 [T], ``page * page_size + offset``; -1 for a token without a place: a negative table entry, a position
        outside the table, the tail past ``cu_seqlens_q[-1]``. An entry past the pool gives a slot past the pool,
        which ``append_kv`` skips.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    if not must_dispatch((seq_lens,)):
        return _slots(block_table, seq_lens, page_size, num_tokens, cu_seqlens_q)
    if not torch.compiler.is_compiling():  # so that a wrong call is named as everywhere, and not by the schema
        _checked(block_table, seq_lens, page_size, num_tokens, cu_seqlens_q)
    placed: Tensor = SLOTS(
        block_table=block_table, seq_lens=seq_lens, page_size=page_size, num_tokens=num_tokens,
        cu_seqlens_q=cu_seqlens_q,
    )  # fmt: skip
    return placed


def _slots(
    block_table: BlockTable, seq_lens: Tensor, page_size: int, num_tokens: int, cu_seqlens_q: Tensor | None
) -> Tensor:
    table = _checked(block_table, seq_lens, page_size, num_tokens, cu_seqlens_q)
    return locate_slots(table, seq_lens, page_size, num_tokens, cu_seqlens_q)


def _fake(
    block_table: BlockTable, seq_lens: Tensor, page_size: int, num_tokens: int, cu_seqlens_q: Tensor | None
) -> Tensor:
    _checked(block_table, seq_lens, page_size, num_tokens, cu_seqlens_q)
    return seq_lens.new_empty((num_tokens,), dtype=torch.int64)


def _checked(
    block_table: BlockTable, seq_lens: Tensor, page_size: int, num_tokens: int, cu_seqlens_q: Tensor | None
) -> PageTable:
    """Every check of ``slots``."""
    check_page_size(checks.check_int("page_size", page_size, "an int"))
    checks.check_tensor("seq_lens", seq_lens, 1)
    checks.check_ints("seq_lens", seq_lens, None, seq_lens.device)
    num_seqs = seq_lens.shape[0]
    checks.check_int("num_tokens", num_tokens, "an int")
    if num_tokens < 0 or (cu_seqlens_q is None and num_tokens % max(num_seqs, 1)):
        raise bad_value("num_tokens", f"a multiple of the {num_seqs} sequences, at least 0", num_tokens)
    if cu_seqlens_q is not None:
        checks.check_ints("cu_seqlens_q", cu_seqlens_q, num_seqs + 1, seq_lens.device)
    return PageTable.checked(block_table, num_seqs, seq_lens.device)


ARGUMENTS = {
    "block_table": BlockTable, "seq_lens": Tensor, "page_size": int, "num_tokens": int, "cu_seqlens_q": Tensor | None,
}  # fmt: skip
SLOTS = TorchOp("slots", ARGUMENTS, "Tensor", _slots, _fake)
