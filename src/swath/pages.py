"""Which page holds which key: page tables and slots, the home of page arithmetic on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swath.checks import check_choice, check_int_dtype, check_ints, check_tensor
from swath.errors import bad_type, bad_value

UNITS = ("page", "token")
LARGEST = 2**31 - 1
"""Of a page's number, and of a length."""


def is_page_size(size: int) -> bool:
    """Page sizes are 1, 8 or a multiple of 16."""
    return size in (1, 8) or (size > 0 and size % 16 == 0)


def check_page_size(page_size: int) -> None:
    """Check that it is one."""
    if not is_page_size(page_size):
        raise bad_value("page_size", "1, 8 or a multiple of 16", page_size)


def page_count(keys: int, page_size: int) -> int:
    """Pages that this number of keys takes."""
    return -(-keys // page_size)


def page_size_dividing(*keys: int) -> int:
    """The largest page of at most 128 keys of which each of these numbers of keys is a whole number."""
    return next(size for size in (128, 64, 32, 16, 8, 1) if all(n % size == 0 for n in keys))


def pages_holding(start: int, stop: int, page_size: int) -> slice[int, int, None]:
    """Which pages of a sequence hold its keys ``start .. stop - 1``; of no keys: the page that ``start`` is inside."""
    return slice(start // page_size, page_count(stop, page_size))


def pages_within(start: int, stop: int, page_size: int) -> slice[int, int, None]:
    """Which pages of a sequence hold nothing but its keys ``start .. stop - 1``."""
    return slice(page_count(start, page_size), stop // page_size)


@dataclass(frozen=True, eq=False, repr=False)
class PageTable:
    """Which page holds which tokens of a sequence.

    A worked example: with pages of 16 the row ``[7, 2]`` of pages, and the row ``[112, 113, ..., 127, 32, 33, ...]`` of
    tokens, both say that positions 0 to 15 are in page 7 and those from 16 on in page 2.

    Args:
        entries: [B, max_pages], a row for each sequence; flat, [N], with ``indptr``; or with ``rows`` a larger table,
            [R, max_pages], which is read in place.
        indptr: None, or [B + 1]: sequence b owns ``entries[indptr[b]:indptr[b + 1]]``.
        rows: None, or [B]: sequence b owns ``entries[rows[b]]``.
        unit: "page" for entries that are pages, or "token" for one entry a position: the slot of that token,
            ``page * page_size + offset``. Of these the first one of each page is read, and names the page.

    Tensors are int32 or int64. Entries, rows and bounds that name nothing are not followed.

    Raises:
        TypeError, ValueError: naming the field.
    """

    entries: Tensor
    indptr: Tensor | None = None
    rows: Tensor | None = None
    unit: str = "page"

    def __post_init__(self) -> None:
        check_int_dtype("entries", check_tensor("entries", self.entries, 2 if self.indptr is None else 1))
        check_choice("unit", self.unit, UNITS)
        for name, x in (("indptr", self.indptr), ("rows", self.rows)):
            if x is not None:
                check_ints(name, x, None, self.entries.device)
        if self.indptr is not None and self.rows is not None:
            raise bad_value("rows", "None for a flat table, which has no rows", f"shape {tuple(self.rows.shape)}")

    def __repr__(self) -> str:
        tensors = {"entries": self.entries, "indptr": self.indptr, "rows": self.rows}
        shown = [f"{name}={x.dtype}{list(x.shape)}" for name, x in tensors.items() if x is not None]
        return f"PageTable({', '.join(shown)}, unit={self.unit!r}, device='{self.entries.device}')"

    @classmethod
    def of(cls, block_table: BlockTable) -> PageTable:
        """From the public argument, of which ``checked`` has seen one that looks the same: nothing is checked again."""
        if isinstance(block_table, PageTable):
            return block_table
        entries, indptr = (block_table, None) if isinstance(block_table, Tensor) else block_table
        table = object.__new__(cls)
        table.__dict__.update(entries=entries, indptr=indptr, rows=None, unit="page")
        return table

    @classmethod
    def checked(cls, block_table: object, num_seqs: int, device: torch.device) -> PageTable:
        """From the public argument (see ``BlockTable``), for ``num_seqs`` sequences on ``device``.

        Raises:
            TypeError, ValueError: naming ``block_table`` or its part.
        """
        if isinstance(block_table, Tensor):
            entries = check_tensor("block_table", block_table, 2, device)
            check_int_dtype("block_table", entries)
            if entries.shape[0] != num_seqs:
                raise bad_value("block_table", f"shape [{num_seqs}, max_pages]", tuple(entries.shape))
            return cls(entries)
        if isinstance(block_table, PageTable):
            table, names = block_table, ("entries", "indptr", "rows")
        elif isinstance(block_table, (tuple, list)) and len(block_table) == 2:
            names = ("page_ids", "page_indptr", "rows")
            ids, indptr = (
                check_ints(f"block_table.{n}", x, None, device) for n, x in zip(names, block_table, strict=False)
            )
            table = cls(ids, indptr)
        else:
            wanted = "a tensor, a pair (page_ids, page_indptr) or a PageTable"
            raise bad_type("block_table", wanted, type(block_table).__name__)
        table._check_batch([f"block_table.{name}" for name in names], num_seqs, device)
        return table

    def _check_batch(self, names: Sequence[str], num_seqs: int, device: torch.device) -> None:
        """Check that the parts, called by ``names``, are a table of that many sequences on ``device``."""
        if self.entries.device != device:
            raise bad_value(names[0], f"a tensor on {device}, as the others", self.entries.device)
        index, length = (self.rows, num_seqs) if self.indptr is None else (self.indptr, num_seqs + 1)
        if index is None and self.entries.shape[0] != num_seqs:
            raise bad_value(names[0], f"shape [{num_seqs}, max_pages]", tuple(self.entries.shape))
        if index is not None and index.shape[0] != length:
            raise bad_value(names[2 if self.indptr is None else 1], f"shape [{length}]", tuple(index.shape))

    def max_pages(self, page_size: int) -> int:
        """Most pages a sequence can have."""
        return page_count(self.entries.shape[-1], self._step(page_size))

    def _step(self, page_size: int) -> int:
        """Entries a page."""
        return 1 if self.unit == "page" else page_size

    def row(self, b: int, page_size: int) -> Tensor:
        """The pages of sequence ``b``, int [pages]; reads the index to the host, each time: it may change in place."""
        if self.indptr is not None:
            first, end = (min(max(i, 0), self.entries.shape[0]) for i in self.indptr[b : b + 2].tolist())
            entries = self.entries[first : max(first, end)]
        else:
            row = b if self.rows is None else int(self.rows[b])
            entries = self.entries[row] if 0 <= row < self.entries.shape[0] else self.entries.new_empty(0)
        step = self._step(page_size)
        return entries if step == 1 else entries[::step].div(step, rounding_mode="floor")

    def lookup(self, seq: Tensor, page: Tensor, page_size: int) -> Tensor:
        """Pages number ``page`` [N] of the sequences ``seq`` [N], int64, -1 where there is none; on the device."""
        step, width = self._step(page_size), self.entries.shape[-1]
        column = page * step
        found = (page >= 0) & (column < width)
        at: tuple[Tensor, ...]
        if self.indptr is not None:
            ends = self.indptr.long().clamp(0, width)
            column = column + ends[seq]
            found &= column < ends[seq + 1]
            at = (column,)
        else:
            row = seq if self.rows is None else self.rows.long()[seq]
            found &= (row >= 0) & (row < self.entries.shape[0])
            at = row, column
        if not self.entries.numel():
            return torch.full_like(page, -1)
        entries = self.entries[tuple(x.where(found, 0) for x in at)].long().where(found, -1)
        return entries.div(step, rounding_mode="floor").clamp(-1, LARGEST)


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
    if num_seqs == 0:
        return torch.full_like(token, -1)
    if cu_seqlens_q is None:
        per_seq = num_tokens // num_seqs
        seq, index = token // max(per_seq, 1), token % max(per_seq, 1)
        q_len = torch.full_like(token, per_seq)
    else:
        cu = cu_seqlens_q.long().clamp(0, num_tokens)
        seq = (torch.searchsorted(cu, token, right=True) - 1).clamp(0, num_seqs - 1)
        index, q_len = token - cu[seq], cu[seq + 1] - cu[seq]
    position = seq_lens.long()[seq].clamp(0, LARGEST) - q_len + index
    page = table.lookup(seq, position.div(page_size, rounding_mode="floor"), page_size)
    placed = (page >= 0) & (index >= 0) & (index < q_len)
    return torch.where(placed, page * page_size + position % page_size, -1)
