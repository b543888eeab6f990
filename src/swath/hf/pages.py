"""Which page holds which tokens of which sequence: allocation on the host, shared by all layers with one window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from swath.errors import bad_value
from swath.hf.pools import Pools
from swath.ops.slots import slots
from swath.pages import page_count, pages_holding, pages_within
from swath.window import Window

FREED = -1


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of new tokens through a layer: slots to write, then the table to read.

    start, stop: the columns of the call's new tokens that this pass takes.
    held, stored: the first token of each sequence that is not released, and the columns that are stored by the end.
    slot_mapping: int64 [B * (stop - start)]. block_table: int32 [B, max_pages]. seq_lens: int32 [B].
    max_kv_len: the longest of seq_lens.
    """

    start: int
    stop: int
    held: tuple[int, ...]
    stored: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    max_kv_len: int

    def on(self, device: torch.device) -> Pass:
        """The same pass for a layer on another device."""
        if self.seq_lens.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("slot_mapping", "block_table", "seq_lens")}
        return replace(self, **moved)


@dataclass
class Row:
    """The pages of one sequence; ``padding``: columns before its first token; ``passed``: entries already released."""

    padding: int = 0
    pages: list[int] = field(default_factory=list)
    passed: int = 0

    def length(self, columns: int) -> int:
        """Tokens of the sequence in its first ``columns`` columns."""
        return max(columns - self.padding, 0)


def ends_of_passes(new: int, chunk: int, reach: Sequence[int] = ()) -> list[int]:
    """Where passes over ``new`` columns end: each has ``chunk`` of them, and more where one reaches beyond that.

    12 columns in chunks of 4, of which 3 to 5 see an image of the columns 3, 4 and 5, end at 6, 10 and 12.
    """
    ends = [0]
    farthest = [*accumulate(reach, max)] or range(1, new + 1)
    while ends[-1] < new:
        end = min(ends[-1] + chunk, new)
        while end < new and farthest[end - 1] > end:
            end += 1
        ends.append(end)
    return ends[1:]


class Pages:
    """The pages of a group of layers, and the table of each sequence in them.

    A page may belong to several sequences (beams share their past): it is copied when one of them is about to write
    into it, and returns to the free list when the last one lets go of it.

    A worked example of the pool's size: a prompt of 512 tokens in pages of 16 behind a window of 128 takes 33 pages,
    one of them to spare. The next call needs 9 or 10, so the pool shrinks to 11; it grows by half when those are taken.

    Args:
        window: pages outside it, seen from the next query on, are released.
        page_size: token slots in a page.
        chunk: tokens of one pass, where the window is bounded: a long prompt never holds more than about
            window + chunk tokens at once. None: all tokens of a call are one pass.
    """

    def __init__(self, window: Window, page_size: int, chunk: int | None) -> None:
        self.window, self.page_size = window, page_size
        self.chunk = None if window.is_unbounded else chunk
        self.keep_past = False
        self.peak = 0
        self.pools = Pools()
        self.passes: list[Pass] = []
        self._holders: list[int] = []
        self._free: list[int] = []
        self._rows: list[Row] = []
        self._columns = 0
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

    def tokens(self, columns: int) -> int:
        """Tokens of all sequences in their first ``columns`` columns."""
        return sum(row.length(columns) for row in self._rows)

    def holding(self, columns: int) -> list[int]:
        """The pages that hold tokens of the first ``columns`` columns."""
        pages = {p for row in self._rows for p in row.pages[: page_count(row.length(columns), self.page_size)]}
        return sorted(pages - {FREED})

    def extend(
        self, seen: int, new: int, padding: Sequence[int], device: torch.device, reach: Sequence[int] = ()
    ) -> list[Pass]:
        """Make room for ``new`` columns after the first ``seen``. The layers after the first get the same passes.

        Args:
            seen, new: columns that the calling layer held before, and those it adds.
            padding: columns before the first token of each sequence.
            reach: of rows that see keys behind their own: the end of what each of the new columns sees, counted from
                the first of them. No pass ends before that.

        Raises:
            ValueError: the batch or its padding is not that of the calls before.
        """
        if self._columns == seen + new and self.passes:
            return self.passes
        if self._columns != seen:
            raise bad_value("past_key_values", f"layers with {self._columns} tokens, as the first", seen)
        self._set_padding(padding)
        bounds = [0, *ends_of_passes(new, self.chunk or new, reach)]
        self.passes = []
        passes = [self._one_pass(a, b, new, device) for a, b in pairwise(bounds)]
        self._columns, self.passes = seen + new, passes
        return passes

    def check_crop(self, columns: int) -> None:
        """Raise ValueError where ``crop(columns)`` would lack keys that the next query sees."""
        for row in self._rows:
            length = row.length(columns)
            lead, left, right = self.window.key_ranges(length, length, length + 1)
            seen = (0, lead), (left, min(right, length)), (length, length)
            if any(FREED in row.pages[pages_holding(start, stop, self.page_size)] for start, stop in seen):
                wanted = "fewer tokens, or activate_past_recording() first: pages are released; reset() forgets all"
                raise bad_value("crop", wanted, self._columns - columns)

    def crop(self, columns: int) -> None:
        """Go back to the first ``columns`` columns; ``check_crop`` says whether that can be."""
        for row in self._rows:
            length = row.length(columns)
            keep = page_count(length, self.page_size)
            self._release(row.pages[keep:])
            del row.pages[keep:]
            row.padding = min(row.padding, columns)
            row.passed = min(row.passed, keep)
            self._release_passed(row, length)
        if not columns:
            self._rows = []  # without a token, the next call may have any batch
        self._columns, self._table, self.passes = columns, None, []

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
        self._table, self.passes = None, []

    def reset(self) -> None:
        """Forget all sequences and keep the pool."""
        self.keep_past = False
        self._holders = [0] * self.num_pages
        self._free = list(range(self.num_pages))
        self._rows, self._columns, self.passes, self._table = [], 0, [], None

    def _set_padding(self, padding: Sequence[int]) -> None:
        rows = self._rows or [Row() for _ in padding]
        if len(padding) != len(rows):
            raise bad_value("past_key_values", f"{len(rows)} sequences, as the calls before", len(padding))
        for row, now in zip(rows, padding, strict=True):
            # A sequence that was all padding so far may still be found to have more of it.
            if row.padding != now and not row.padding == self._columns <= now:
                raise bad_value("attention_mask", f"{row.padding} padded columns first, as in the calls before", now)
        self._rows = rows
        for row, now in zip(rows, padding, strict=True):
            row.padding = now

    def _one_pass(self, start: int, stop: int, new: int, device: torch.device) -> Pass:
        firsts = [row.length(self._columns + start) for row in self._rows]
        lengths = [row.length(self._columns + stop) for row in self._rows]
        if not self.keep_past:
            for row, position in zip(self._rows, firsts, strict=True):
                self._release_passed(row, position)
        shared = self._shared_places(firsts)
        missing = [
            max(page_count(n, self.page_size) - len(r.pages), 0) for r, n in zip(self._rows, lengths, strict=True)
        ]
        self._fit(len(shared) + sum(missing), may_shrink=stop - start == new)
        self._own(shared)
        for row, pages in zip(self._rows, missing, strict=True):
            row.pages += self._take(pages)
        if shared or any(missing):
            self._table = None
        self.peak = max(self.peak, self.live)
        table = self._table_on(device)
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        slot_mapping = slots(table, seq_lens, self.page_size, num_tokens=len(self._rows) * (stop - start))
        held = tuple(row.passed * self.page_size for row in self._rows)
        stored = self._columns + stop
        return Pass(start, stop, held, stored, slot_mapping, table, seq_lens, max(lengths))

    def _release_passed(self, row: Row, position: int) -> None:
        """Release the pages that no query from ``position`` on can see."""
        lead, left, right = self.window.key_ranges(position, position, position + 1)
        for start, stop in ((lead, left), (right, position)):  # the window 0 ends before its query
            passed = pages_within(start, stop, self.page_size)
            first, end = max(row.passed, passed.start), min(passed.stop, len(row.pages))
            if first < end:
                self._release(row.pages[first:end])
                row.pages[first:end] = [FREED] * (end - first)
                row.passed, self._table = end, None

    def _shared_places(self, positions: Sequence[int]) -> list[tuple[Row, int]]:
        """The entries that rows are about to write into and that other rows have too; the last of them keeps it."""
        writers: Counter[int] = Counter()
        places = []
        for row, position in zip(self._rows, positions, strict=True):
            index, slot = divmod(position, self.page_size)
            if slot:
                page = row.pages[index]
                writers[page] += 1
                if writers[page] < self._holders[page]:
                    places.append((row, index))
        return places

    def _own(self, places: Sequence[tuple[Row, int]]) -> None:
        """Put copies in the place of shared pages."""
        free = self._free[len(self._free) - len(places) :]
        self.pools.copy([(row.pages[index], page) for (row, index), page in zip(places, free, strict=True)])
        for (row, index), page in zip(places, self._take(len(places)), strict=True):
            self._release([row.pages[index]])
            row.pages[index] = page

    def _fit(self, wanted: int, *, may_shrink: bool) -> None:
        """Make the pool large enough for ``wanted`` more pages, or smaller if it is half as large again as it need be.

        A page to spare for each sequence, so that steps of decode that begin and leave pages change nothing.
        """
        fitting = self.live + wanted + len(self._rows)
        if wanted > len(self._free):
            num_pages = max(fitting, self.num_pages * 3 // 2)
            self.pools.resize(num_pages)
            self._free += range(self.num_pages, num_pages)
            self._holders += [0] * (num_pages - self.num_pages)
        elif may_shrink and self.num_pages > fitting * 3 // 2:
            self._shrink(fitting)

    def _shrink(self, num_pages: int) -> None:
        """Move the pages in use to the first ``num_pages`` places and give the others back."""
        moved = [page for page in range(num_pages, self.num_pages) if self._holders[page]]
        room = [page for page in range(num_pages) if not self._holders[page]]
        place = dict(zip(moved, room, strict=False))
        self.pools.copy(list(place.items()))
        for row in self._rows:
            row.pages = [place.get(page, page) for page in row.pages]
        for old, new in place.items():
            self._holders[new] = self._holders[old]
        del self._holders[num_pages:]
        self._free = [page for page in range(num_pages) if not self._holders[page]]
        self._table = None
        self.pools.resize(num_pages)

    def _take(self, count: int) -> list[int]:
        """Pages off the free list, which ``_fit`` has made long enough."""
        rest = len(self._free) - count
        pages = self._free[rest:]
        del self._free[rest:]
        for page in pages:
            self._holders[page] = 1
        return pages

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
