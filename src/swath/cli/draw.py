"""The picture of a window: what each query and each key are to one another, as a grid of cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from swath.errors import bad_value
from swath.window import LARGEST_SIZE, Window

MAX_CELLS = 1 << 24


class Cell(IntEnum):
    """A query and a key, by rising weight: where cells are pooled, the weightiest shows."""

    HIDDEN = 0
    """Hidden in full attention too: the key comes after a causal query."""
    SKIPPED = 1
    """Full attention sees it, this window does not."""
    LEADING = 2
    """Seen only because the key is one of the leading tokens."""
    WINDOW = 3
    """Seen because the key is near."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Queries against keys.

    cells: uint8 [Q, K] of ``Cell`` values; row i is the query at position ``q_start + i``, column k the key k.
    """

    window: Window
    q_start: int
    cells: Tensor

    @property
    def last(self) -> int:
        """Position of the last query."""
        return self.q_start + self.cells.shape[0] - 1

    @property
    def seen(self) -> Tensor:
        """bool [Q, K]: the query sees the key."""
        return self.cells >= Cell.LEADING

    @property
    def full(self) -> Tensor:
        """bool [Q, K]: full attention sees the key."""
        return self.cells >= Cell.SKIPPED

    def pages_held(self, page_size: int) -> Tensor:
        """bool [Q, pages]: when a query runs, the page holds a key that this query or a later one can see.

        Without causality no query is later than another, so every page is held.
        """
        rows, kv_len = self.cells.shape
        wanted = torch.ones(rows, kv_len, dtype=torch.bool)
        if self.window.causal:
            end = max(self.last, kv_len - 1)
            for i in range(rows):
                later = self.window.of_rows(i, rows)  # with bounds, of the queries that are drawn
                lead, left, right = later.key_ranges(self.q_start + i, end, kv_len)
                wanted[i, lead:left] = wanted[i, right:] = False
        return torch.stack([page.any(1) for page in wanted.split(page_size, dim=1)], dim=1)

    def pooled(self, step: int) -> Tensor:
        """Cells [ceil(Q / step), ceil(K / step)], each the weightiest of ``step x step``."""
        if step == 1:
            return self.cells
        pool = torch.nn.functional.max_pool2d(self.cells[None, None].float(), step, ceil_mode=True)
        return pool[0, 0].to(torch.uint8)


def picture(window: Window, q_len: int, kv_len: int, q_start: int | None = None) -> Picture:
    """Which keys queries see: ``q_len`` queries from position ``q_start`` (None: they are the last), ``kv_len`` keys.

    The rule is ``Window.mask``. The kinds of cells come from comparing windows: no limit at all, this one, and this
    one without its leading tokens.

    Raises:
        ValueError: more than ``MAX_CELLS`` cells, or positions beyond int32.
    """
    if q_len * kv_len > MAX_CELLS:
        raise bad_value("q_len x kv_len", f"at most {MAX_CELLS} cells to draw", q_len * kv_len)
    start = kv_len - q_len if q_start is None else q_start
    if not -LARGEST_SIZE <= start <= LARGEST_SIZE:
        raise bad_value("q_start", f"a position within {LARGEST_SIZE} of 0", start)
    queries, keys = torch.arange(start, start + q_len), torch.arange(kv_len)
    cells = torch.full((q_len, kv_len), Cell.HIDDEN, dtype=torch.uint8)
    cells[Window(causal=window.causal).mask(queries, keys)] = Cell.SKIPPED
    cells[window.mask(queries, keys)] = Cell.LEADING
    cells[replace(window, global_tokens=0).mask(queries, keys)] = Cell.WINDOW
    return Picture(window, start, cells)


def spelled(window: Window) -> str:
    """The window as one would write it: ``Window(4, global_tokens=2)``."""
    parts = [] if window.size is None else [str(window.size)]
    if window.global_tokens:
        parts.append(f"global_tokens={window.global_tokens}")
    if not window.causal:
        parts.append("causal=False")
    return f"Window({', '.join(parts)})"


def stride_for(count: int, most: int) -> int:
    """The smallest of 1, 2, 4, 8, ... that cuts ``count`` positions into at most ``most`` parts."""
    stride = 1
    while count > most * stride:
        stride *= 2
    return stride


def runs(seen: Tensor) -> list[tuple[int, int]]:
    """The unbroken runs of True in bool [K], as (first, last)."""
    edges = torch.diff(seen.to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = torch.nonzero(edges > 0).flatten(), torch.nonzero(edges < 0).flatten()
    return [(int(a), int(b) - 1) for a, b in zip(starts, ends, strict=True)]
