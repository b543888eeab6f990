"""Which page holds which key: page tables and slots. The only host code with page arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swath.errors import bad_type, bad_value


def check_page_size(page_size: int) -> None:
    """Page sizes are 1, 8 or a multiple of 16."""
    if page_size < 1 or (page_size % 16 and page_size not in (1, 8)):
        raise bad_value("page_size", "1, 8 or a multiple of 16", page_size)


def page_count(keys: int, page_size: int) -> int:
    """Pages that so many keys take."""
    return -(-keys // page_size)


def pages_holding(start: int, stop: int, page_size: int) -> slice[int, int, None]:
    """Which pages of a sequence hold its keys ``start .. stop - 1``; of no keys: the page that ``start`` is inside."""
    return slice(start // page_size, page_count(stop, page_size))


def pages_within(start: int, stop: int, page_size: int) -> slice[int, int, None]:
    """Which pages of a sequence hold nothing but its keys ``start .. stop - 1``."""
    return slice(page_count(start, page_size), stop // page_size)


@dataclass(frozen=True, eq=False)
class PageTable:
    """Which page holds which tokens of a sequence, rectangular or flat.

    Args:
        entries: int32 [B, max_pages], or flat page ids [N].
        indptr: None, or int32 [B + 1]: sequence b owns ``entries[indptr[b]:indptr[b + 1]]``.
    """

    entries: Tensor
    indptr: Tensor | None = None

    @classmethod
    def of(cls, block_table: BlockTable) -> PageTable:
        """From the public argument: a tensor [B, max_pages], the pair (page_ids [N], page_indptr [B + 1]), or one."""
        if isinstance(block_table, Tensor):
            return cls(block_table)
        return block_table if isinstance(block_table, PageTable) else cls(*block_table)

    @classmethod
    def checked(cls, block_table: object, num_seqs: int) -> PageTable:
        """The same, with every check of what came.

        Raises:
            TypeError, ValueError: naming ``block_table`` or its part.
        """
        if isinstance(block_table, PageTable):
            block_table = (
                block_table.entries if block_table.indptr is None else (block_table.entries, block_table.indptr)
            )
        if isinstance(block_table, Tensor):
            if block_table.dim() != 2 or block_table.shape[0] != num_seqs:
                raise bad_value("block_table", f"shape [{num_seqs}, max_pages]", tuple(block_table.shape))
            if block_table.dtype != torch.int32:
                raise bad_type("block_table", "int32", block_table.dtype)
            return cls(block_table)
        if not isinstance(block_table, (tuple, list)) or len(block_table) != 2:
            raise bad_type("block_table", "a tensor or a pair (page_ids, page_indptr)", type(block_table).__name__)
        page_ids, indptr = block_table
        for name, x in (("page_ids", page_ids), ("page_indptr", indptr)):
            if not isinstance(x, Tensor) or x.dtype != torch.int32:
                raise bad_type(f"block_table.{name}", "an int32 tensor", getattr(x, "dtype", type(x).__name__))
            if x.dim() != 1:
                raise bad_value(f"block_table.{name}", "one dimension", tuple(x.shape))
        if indptr.shape[0] != num_seqs + 1:
            raise bad_value("block_table.page_indptr", f"shape [{num_seqs + 1}]", tuple(indptr.shape))
        return cls(page_ids, indptr)

    @property
    def max_pages(self) -> int:
        """Most pages a sequence can have."""
        return self.entries.shape[-1]

    @cached_property
    def _bounds(self) -> list[int]:
        bounds: list[int] = [] if self.indptr is None else self.indptr.tolist()
        return bounds

    def row(self, b: int) -> Tensor:
        """The entries of sequence ``b``, int32 [pages]; a hostile ``indptr`` is cut to what exists."""
        if self.indptr is None:
            return self.entries[b]
        first, end = (min(max(i, 0), self.max_pages) for i in self._bounds[b : b + 2])
        return self.entries[first : max(first, end)]

    def extents(self, seq: Tensor) -> tuple[Tensor, Tensor]:
        """First entry (in ``entries`` laid flat) and number of pages of the sequences ``seq``, on the device."""
        if self.indptr is None:
            return seq * self.max_pages, torch.full_like(seq, self.max_pages)
        ends = self.indptr.long().clamp(0, self.max_pages)
        return ends[seq], ends[seq + 1] - ends[seq]


BlockTable = Tensor | Sequence[Tensor] | PageTable
"""What ``block_table`` of a public function may be: [B, max_pages], ``(page_ids, page_indptr)``, or a PageTable."""


def locate_slots(
    table: PageTable,
    seq_lens: Tensor,
    page_size: int,
    num_tokens: int,
    cu_seqlens_q: Tensor | None,
) -> Tensor:
    """``swath.slots`` (see there): token i of a sequence's q_len new ones stands at ``seq_len - q_len + i``."""
    num_seqs = seq_lens.shape[0]
    token = torch.arange(num_tokens, device=seq_lens.device)
    if cu_seqlens_q is None:
        per_seq = num_tokens // max(num_seqs, 1)
        seq, index = token // max(per_seq, 1), token % max(per_seq, 1)
        q_len = torch.full_like(token, per_seq)
    else:
        cu = cu_seqlens_q.long()
        seq = (torch.searchsorted(cu, token, right=True) - 1).clamp(0, num_seqs - 1)
        index, q_len = token - cu[seq], cu[seq + 1] - cu[seq]
    position = seq_lens.long()[seq].clamp(min=0) - q_len + index
    page = position.div(page_size, rounding_mode="floor")
    first, pages = table.extents(seq)
    placed = (position >= 0) & (page < pages) & (index >= 0) & (index < q_len)
    entries = table.entries.reshape(-1).long()
    if not entries.numel():
        return torch.full_like(token, -1)
    entry = entries[(first + page).clamp(0, entries.shape[0] - 1)]
    return torch.where(placed & (entry >= 0), entry * page_size + position % page_size, -1)
