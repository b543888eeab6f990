"""Which page holds which tokens of which sequence: allocation on the host, shared by all layers with one window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from swath.errors import bad_value
from swath.ops.slots import slots
from swath.pages import page_count, pages_holding, pages_within
from swath.window import Window

FREED = -1


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of new tokens through a layer: pages to copy, slots to write, then the table to read.

    start, stop: the columns of the call's new tokens that this pass takes.
    copies: page ids int64 [2, n]; the contents of row 0 go to row 1 before anything is written.
    slot_mapping: int64 [B * (stop - start)]. block_table: int32 [B, max_pages]. seq_lens: int32 [B].
    max_kv_len: the longest of seq_lens.
    """

    start: int
    stop: int
    copies: Tensor | None
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    max_kv_len: int


@dataclass
class Row:
    """The pages of one sequence; ``padding``: columns before its first token; ``passed``: entries already released."""

    padding: int = 0
    pages: list[int] = field(default_factory=list)
    passed: int = 0


class Pages:
    """A pool of pages and the table of each sequence in it.

    A page may belong to several sequences (beams share their past): it is copied when one of them is about to write
    into it, and returns to the free list when the last one lets go of it.

    Args:
        window: pages outside it, seen from the next query on, are released.
        page_size: token slots in a page.
        chunk: tokens of one pass, where the window is bounded: a long prompt never holds more than about
            window + chunk tokens at once.
    """

    def __init__(self, window: Window, page_size: int, chunk: int) -> None:
        self.window, self.page_size, self.chunk = window, page_size, chunk
        self.keep_past = False
        self.peak = 0
        self._holders: list[int] = []
        self._free: list[int] = []
        self._rows: list[Row] = []
        self._columns = 0
        self._passes: list[Pass] = []
        self._table: Tensor | None = None

    @property
    def num_pages(self) -> int:
        """Pages of the pool that every layer must have."""
        return len(self._holders)

    @property
    def batch(self) -> int:
        """Sequences that have pages."""
        return len(self._rows)

    @property
    def live(self) -> int:
        """Pages in use."""
        return len(self._holders) - len(self._free)

    def extend(self, seen: int, new: int, padding: Sequence[int], device: torch.device) -> list[Pass]:
        """Make room for ``new`` columns after the first ``seen``. The layers after the first get the same passes.

        Args:
            seen, new: columns that the calling layer held before, and those it adds.
            padding: columns before the first token of each sequence.

        Raises:
            ValueError: the batch or its padding is not that of the calls before.
        """
        if self._columns == seen + new and self._passes:
            return self._passes
        if self._columns != seen:
            raise bad_value("past_key_values", f"layers with {self._columns} tokens, as the first", seen)
        self._check_padding(padding)
        step = new if self.window.is_unbounded else self.chunk
        bounds = [*range(0, new, step), new]
        self._passes = [self._one_pass(a, b, device) for a, b in pairwise(bounds)]
        self._columns += new
        return self._passes

    def crop(self, columns: int) -> None:
        """Forget the newest ``columns`` columns.

        Raises:
            ValueError: keys that the next query sees are gone, as nobody asked to keep the past.
        """
        left = max(self._columns - columns, 0)
        for row in self._rows:
            length = max(left - row.padding, 0)
            self._check_held(row, length, columns)
        for row in self._rows:
            length = max(left - row.padding, 0)
            keep = page_count(length, self.page_size)
            self._release(row.pages[keep:])
            del row.pages[keep:]
            row.padding = min(row.padding, left)
            row.passed = min(row.passed, keep)
            self._release_passed(row, length)
        self._columns, self._table, self._passes = left, None, []

    def select(self, sequences: Sequence[int]) -> None:
        """Let sequence i continue what sequence ``sequences[i]`` was; pages are shared until written to."""
        chosen = [self._rows[i] for i in sequences]
        for row in chosen:
            for page in row.pages:
                if page != FREED:
                    self._holders[page] += 1
        for row in self._rows:
            self._release(row.pages)
        self._rows = [Row(row.padding, list(row.pages), row.passed) for row in chosen]
        self._table, self._passes = None, []

    def reset(self) -> None:
        """Forget all sequences and keep the pool."""
        self.keep_past = False
        self._holders = [0] * self.num_pages
        self._free = list(range(self.num_pages))
        self._rows, self._columns, self._passes, self._table = [], 0, [], None

    def _check_padding(self, padding: Sequence[int]) -> None:
        if not self._rows:
            self._rows = [Row() for _ in padding]
        if len(padding) != len(self._rows):
            raise bad_value("past_key_values", f"{len(self._rows)} sequences, as the calls before", len(padding))
        for row, now in zip(self._rows, padding, strict=True):
            # A sequence that was all padding so far may still be found to have more of it.
            if row.padding != now and not row.padding == self._columns <= now:
                raise bad_value("attention_mask", f"{row.padding} padded columns first, as in the calls before", now)
            row.padding = now

    def _one_pass(self, start: int, stop: int, device: torch.device) -> Pass:
        lengths = [max(self._columns + stop - row.padding, 0) for row in self._rows]
        starts = [max(self._columns + start - row.padding, 0) for row in self._rows]
        if not self.keep_past:
            for row, position in zip(self._rows, starts, strict=True):
                self._release_passed(row, position)
        copies = [c for row, p in zip(self._rows, starts, strict=True) for c in self._own_last_page(row, p)]
        for row, length in zip(self._rows, lengths, strict=True):
            self._grow_row(row, length)
        self.peak = max(self.peak, self.live)
        table = self._table_on(device)
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        tokens = len(self._rows) * (stop - start)
        return Pass(
            start,
            stop,
            torch.tensor(copies, device=device).T if copies else None,
            slots(table, seq_lens, self.page_size, num_tokens=tokens),
            table,
            seq_lens,
            max(lengths),
        )

    def _release_passed(self, row: Row, position: int) -> None:
        """Release the pages that no query from ``position`` on can see."""
        lead, left, _ = self.window.key_ranges(position, position, position + 1)
        passed = pages_within(lead, left, self.page_size)
        first, end = max(row.passed, passed.start), min(passed.stop, len(row.pages))
        if first < end:
            self._release(row.pages[first:end])
            row.pages[first:end] = [FREED] * (end - first)
            row.passed, self._table = end, None

    def _check_held(self, row: Row, length: int, columns: int) -> None:
        """Whether the query at position ``length`` would find the keys before it."""
        lead, left, _ = self.window.key_ranges(length, length, length + 1)
        seen = pages_holding(0, lead, self.page_size), pages_holding(left, length, self.page_size)
        if any(FREED in row.pages[pages] for pages in seen):
            raise bad_value("crop", "fewer tokens, or activate_past_recording() first: pages are released", columns)

    def _own_last_page(self, row: Row, position: int) -> list[tuple[int, int]]:
        """A (source, target) copy if the page that ``position`` continues belongs to others too."""
        index, slot = divmod(position, self.page_size)
        if slot == 0 or self._holders[row.pages[index]] == 1:
            return []
        source = row.pages[index]
        row.pages[index], self._table = self._take(), None
        self._release([source])
        return [(source, row.pages[index])]

    def _grow_row(self, row: Row, length: int) -> None:
        missing = page_count(length, self.page_size) - len(row.pages)
        if missing > 0:
            row.pages += [self._take() for _ in range(missing)]
            self._table = None

    def _take(self) -> int:
        if not self._free:
            grown = self.num_pages + max(len(self._rows), self.num_pages // 2)
            self._free = list(range(self.num_pages, grown))
            self._holders += [0] * len(self._free)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            if page != FREED:
                self._holders[page] -= 1
                if not self._holders[page]:
                    self._free.append(page)

    def _table_on(self, device: torch.device) -> Tensor:
        if self._table is None:
            width = max((len(row.pages) for row in self._rows), default=0)
            entries = [row.pages + [FREED] * (width - len(row.pages)) for row in self._rows]
            self._table = torch.tensor(entries, dtype=torch.int32, device=device).reshape(len(entries), width)
        return self._table
