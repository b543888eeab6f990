"""Masks of padded batches in O(batch) numbers instead of a batch x queries x keys tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from swath.errors import bad_type, bad_value
from swath.hf.carried import CarriedMask
from swath.hf.mask_functions import read
from swath.hf.mask_runs import runs_of
from swath.window import Window

REPRESENTABLE = "a causal, sliding or full mask with padding at the ends, or keys in one run for each query"
UNBROKEN = f"{REPRESENTABLE} (generate: pad on the left)", "padding between tokens"
OTHER_FORM = REPRESENTABLE, "a mask of another form"


@dataclass(frozen=True, eq=False)
class BandMask:
    """A window over the real tokens of a padded batch: what most 4-D attention masks say.

    The batch is a rectangle of columns; the real tokens of sequence b are columns ``first[b] .. end[b] - 1``, and
    query row i stands in column ``q_column + i``. Distances between real tokens are the same with and without the
    padding, so positions count from ``first[b]``. Queries that are padding see what their position sees, or nothing.

    A mask of another form, in which each query sees one run of keys (image tokens, prefixes, chunks), is a window of
    bounds, [batch * q_len, 2] in positions.

    Args:
        window: which keys a query sees.
        batch: sequences in the batch.
        q_len, kv_len: rows and columns of the mask.
        q_column: the column of the first query, an int or an int32 tensor without dimensions.
        padding: real columns of each sequence, int32 [2, batch]: the first, and the end. None: all are real.
        dropped: keys that the cache no longer holds, those before column 0.
        host_first: the first real column of each sequence on the host, if it has been read.
    """

    window: Window
    batch: int
    q_len: int
    kv_len: int
    q_column: int | Tensor
    padding: Tensor | None = None
    dropped: int = 0
    host_first: tuple[int, ...] | None = None

    @classmethod
    def of_padding(cls, window: Window, real: Tensor, q_len: int, q_column: int | Tensor, dropped: int = 0) -> BandMask:
        """From the 2-D mask of real tokens, bool [B, columns]. Reads it to the host once, unless it is traced.

        Raises:
            ValueError: padding stands between real tokens (RuntimeError, when it is traced and the trace runs).
        """
        batch, kv_len = real.shape
        column = torch.arange(kv_len, device=real.device)
        first = torch.where(real, column, kv_len).amin(1)
        end = torch.maximum(first, torch.where(real, column + 1, 0).amax(1))
        whole = (end - first == real.sum(1)).all()
        padding = torch.stack([first, end]).to(torch.int32)
        if is_tracing(real):
            _require(whole, *UNBROKEN)
            return cls(window, batch, q_len, kv_len, q_column, padding, dropped)
        *host_first, host_whole = torch.cat([first, whole[None]]).tolist()
        if not host_whole:
            raise bad_value("attention_mask", *UNBROKEN)
        return cls(window, batch, q_len, kv_len, q_column, padding, dropped, tuple(host_first))

    @classmethod
    def of_dense(
        cls, mask: Tensor, q_column: int | Tensor, guess: Window, dropped: int = 0, real: Tensor | None = None
    ) -> BandMask:
        """From a 4-D mask, bool or additive [B, 1, q_len, kv_len]: a window or runs of keys, found from what it shows.

        A mask that is traced shows nothing yet: its window is taken to be ``guess``, and the trace checks that.
        ``real``, bool [B, kv_len], tells real tokens from padding; None: a column that no query sees is padding.

        Raises:
            TypeError, ValueError: another shape or dtype, a bias that is neither 0 nor minus infinity, a mask that is
                neither a window with padding at the ends nor runs (RuntimeError, when it is traced and the trace runs).
        """
        visible = _visible(mask)
        q_len, kv_len = visible.shape[1:]
        _require(visible.flatten(1).any(1), "a key to see in every sequence", "a sequence with none")
        real = visible.any(1) if real is None else real  # [B, kv_len]
        q_pos, k_pos = _positions(q_len, kv_len, q_column, mask.device)
        if is_tracing(mask):
            _require(guess.mask(q_pos, k_pos) & real[:, None] == visible, *OTHER_FORM)
            return cls.of_padding(guess, real, q_len, q_column, dropped)
        for window in _windows_reaching(visible.any(0), q_pos[:, None] - k_pos):
            if torch.equal(window.mask(q_pos, k_pos) & real[:, None], visible):
                return cls.of_padding(window, real, q_len, q_column, dropped)
        rows = (q_pos >= 0) & (q_pos < kv_len)
        stand_on = real[:, q_pos.clamp(0, max(kv_len - 1, 0))] & rows  # [B, q_len]: queries that are no padding
        _require(visible.any(2) | ~stand_on, *OTHER_FORM)
        band = cls.of_padding(Window(), real, q_len, q_column, dropped)
        runs = _runs(visible) - band.padding[0][:, None, None]  # type: ignore[index]
        return replace(band, window=Window(bounds=runs.clamp(min=0).flatten(0, 1)))

    def cut(self, sequences: range, rows: range, columns: range) -> BandMask:
        """The mask of some neighbouring sequences, rows and columns."""
        padding, host_first, width, window = self.padding, self.host_first, len(columns), self.window
        if padding is not None:
            padding = (padding[:, sequences.start : sequences.stop] - columns.start).clamp(0, width)
        if window.bounds is not None:
            runs = self.columns_seen[sequences.start : sequences.stop, rows.start : rows.stop] - columns.start
            first = 0 if padding is None else padding[0][:, None, None]
            window = Window(bounds=(runs.clamp(0, width) - first).clamp(min=0).flatten(0, 1))
        if host_first is not None:
            host_first = tuple(min(max(host_first[b] - columns.start, 0), width) for b in sequences)
        q_column = self.q_column + rows.start - columns.start
        dropped = self.dropped + columns.start
        return BandMask(window, len(sequences), len(rows), width, q_column, padding, dropped, host_first)

    def with_columns(self, low: Tensor, end: Tensor, whole: Tensor) -> BandMask | None:
        """The same mask of rows that see the columns [low, end), int64 [batch or 1, q_len], in place of its window.

        None where ``whole`` is false, where a row that is no padding sees nothing, and while it is traced.
        """
        if is_tracing(whole):
            return None
        edges = torch.tensor([[0], [self.kv_len]], device=low.device) if self.padding is None else self.padding
        first, last = edges[..., None].long()  # [batch or 1, 1]
        low = torch.maximum(low, first).expand(self.batch, -1)
        end = torch.minimum(end, last).expand(self.batch, -1)
        column = torch.arange(self.q_len, device=low.device) + self.q_column
        is_real, sees = (column >= first) & (column < last), low < end
        if not bool(whole & (sees | ~is_real).all()):
            return None
        runs = torch.stack([low - first, end - first], -1).masked_fill(~sees[..., None], 0)
        return replace(self, window=Window(bounds=runs.to(torch.int32).flatten(0, 1)))

    def with_runs(self, device: torch.device) -> BandMask:
        """The same mask by the bounds of each row: what pages are read by where a window reaches to both sides."""
        q_pos, k_pos = _positions(self.q_len, self.kv_len, self.q_column, device)
        visible = self.window.mask(q_pos, k_pos).expand(self.batch, -1, -1)
        first = 0
        if self.padding is not None:
            first, end = self.padding.to(device)[..., None, None]  # [batch, 1, 1]
            visible = visible & (k_pos >= first) & (k_pos < end)
        return replace(self, window=Window(bounds=(_runs(visible) - first).clamp(min=0).flatten(0, 1)))

    @property
    def first(self) -> tuple[int, ...]:
        """The first real column of each sequence, on the host.

        Raises:
            ValueError: the mask was made while tracing, when the host cannot know.
        """
        if self.padding is None:
            return (0,) * self.batch
        if self.host_first is None:
            raise bad_value("past_key_values", "a cache of Transformers while tracing or compiling", "a PagedCache")
        return self.host_first

    @property
    def columns_seen(self) -> Tensor:
        """Of a window of bounds: the columns [lo, hi) that each row sees, [batch, q_len, 2]."""
        runs: Tensor = cast(Tensor, self.window.bounds).unflatten(0, (self.batch, self.q_len))
        return runs if self.padding is None else runs + self.padding[0][:, None, None]

    @property
    def host_runs(self) -> Tensor | None:
        """``columns_seen`` on the host, read once; None for other windows."""
        if self.window.bounds is None:
            return None
        made: dict[str, Tensor] = self.__dict__.setdefault("_host_runs", {})
        if not made:
            made["runs"] = self.columns_seen.cpu()
        return made["runs"]

    def says(self, window: Window) -> bool:
        """Whether ``window`` shows the same keys: it is the mask's own, or neither hides a key by distance."""
        if window == self.window or self.window.bounds is not None:
            return window == self.window
        plain = not isinstance(window.global_tokens, Tensor) and window.global_tokens == 0
        reach_all = all(w.size is None or w.size >= self.kv_len for w in (window, self.window))
        return plain and reach_all and window.causal == self.window.causal

    def varlen_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``cu_seqlens_q``, ``cu_seqlens_k``, ``q_start`` over the rows and columns of the batch laid end to end.

        The padded columns before each sequence form a sequence of their own that no query belongs to, so keys and
        values stay where they are. All int32. They are made once: the layers of a model share the mask.
        """
        made: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = self.__dict__.setdefault("_on_device", {})
        if device in made:
            return made[device]
        varlen = self._varlen(device)
        if not torch.compiler.is_compiling():  # what a compiled graph makes is not to outlive it
            made[device] = varlen
        return varlen

    def _varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        sequence = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        cu_q, cu_k = sequence * self.q_len, sequence * self.kv_len
        q_column = self.q_column.to(device) if isinstance(self.q_column, Tensor) else self.q_column
        if self.padding is None:
            return cu_q, cu_k, torch.zeros_like(sequence[1:]) + q_column
        first, end = self.padding.to(device)
        starts = torch.stack([torch.zeros_like(first), q_column - first], 1).flatten()
        bounds = torch.stack([cu_k[:-1] + first, cu_k[:-1] + end], 1).flatten()
        return cu_q.repeat_interleave(2)[:-1], torch.cat([cu_k[:1], bounds]), starts


def band_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **others: Any,
) -> CarriedMask:
    """The mask function for AttentionMaskInterface: Transformers' description of a mask, to a carried BandMask.

    Arguments as for ``transformers.masking_utils.sdpa_mask``. A ``mask_function`` that is not made of Transformers'
    own is written out in full and must turn out to be a window, or a run of keys for each query. So is any but the
    plain causal and bidirectional ones under torch.compile, where it must be the window that ``local_size`` names.

    Raises:
        ValueError: the mask is neither, or has padding between tokens (RuntimeError, when a compiled graph finds out).
    """
    written_out: dict[str, Any] = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, use_vmap=use_vmap, device=device, allow_is_causal_skip=False,
    )  # fmt: skip
    q_column = q_offset - kv_offset
    if isinstance(q_column, Tensor):
        q_column = q_column.to(torch.int32, copy=True)  # the cache counts on in the tensor that it gave
    real = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    real = None if real is None else real[:, kv_offset : kv_offset + kv_length].bool()
    window = _window_of(mask_function)
    if window is None and torch.compiler.is_compiling():
        window = _window_named(local_size, bidirectional="allow_is_bidirectional_skip" in others)
        q_pos, k_pos = _positions(q_length, kv_length, q_column, device)
        _require(window.mask(q_pos, k_pos) == sdpa_mask(**written_out)[:, 0], *OTHER_FORM)
    plain = Window() if window is None else window
    if real is None:
        band = BandMask(plain, batch_size, q_length, kv_length, q_column, dropped=kv_offset)
    else:
        band = BandMask.of_padding(plain, real, q_length, q_column, kv_offset)
    if window is not None:
        return CarriedMask(band, device)
    runs = runs_of(mask_function, torch.arange(q_length, device=device) + q_offset)
    in_runs = None if runs is None else band.with_columns(runs.low - kv_offset, runs.end - kv_offset, runs.whole)
    if in_runs is not None:
        return CarriedMask(in_runs, device)
    dense = sdpa_mask(**written_out, attention_mask=attention_mask)
    real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if real is None else real
    return CarriedMask(BandMask.of_dense(dense, q_column, Window(), kv_offset, real), device)


def _window_of(mask_function: Callable[..., Any]) -> Window | None:
    """The window that a mask function describes, or None if only its values can tell."""
    reading = read(mask_function)
    window = None if reading is None else reading.reach.window
    if reading is None or window is None:
        return None
    for condition in reading.conditions:
        if is_tracing(condition):
            _require(condition, *OTHER_FORM)
        elif not bool(condition.all()):
            return None
    return window


def _window_named(local_size: int | None, *, bidirectional: bool) -> Window:
    """The window that the mask builders of Transformers name beside their mask function."""
    if not bidirectional or local_size is None:
        return Window(local_size, causal=not bidirectional)
    return Window(local_size + 1, causal=False)


def _positions(q_len: int, kv_len: int, q_column: int | Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Where rows and columns of a mask stand."""
    return torch.arange(q_len, device=device) + q_column, torch.arange(kv_len, device=device)


def _require(condition: Tensor, wanted: str, got: str) -> None:
    """Raise ValueError unless all of ``condition`` is true, or let a trace check it when it runs."""
    if is_tracing(condition):
        torch._assert_async(condition.all(), f"attention_mask: wanted {wanted}, got {got}")
    elif not bool(condition.all()):
        raise bad_value("attention_mask", wanted, got)


def _windows_reaching(seen: Tensor, distance: Tensor) -> Iterator[Window]:
    """The windows that may show what ``seen`` says [queries, keys], by how far that lies before and after."""
    past, future = int(distance[seen].max()), int(-distance[seen].min())
    if future <= 0:
        yield Window()
        yield Window(max(past, 0) + 1)
    yield Window(causal=False)
    yield Window(max(past, future, 0) + 1, causal=False)


def _runs(visible: Tensor) -> Tensor:
    """The columns [lo, hi) that each row sees, int32 [B, q_len, 2], of a mask whose rows have no gaps."""
    low, count = visible.to(torch.int8).argmax(-1), visible.sum(-1)
    runs = torch.stack([low, low + count], -1).to(torch.int32)
    column = torch.arange(visible.shape[-1], device=visible.device)
    _require((runs[..., :1] <= column) & (column < runs[..., 1:]) == visible, *OTHER_FORM)
    return runs


def _visible(mask: Tensor) -> Tensor:
    """A 4-D mask as bool [B, q_len, kv_len], true where a query sees a key."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise bad_value("attention_mask", "shape [batch, 1, queries, keys]", tuple(mask.shape))
    if mask.dtype == torch.bool:
        return mask[:, 0]
    if not mask.dtype.is_floating_point:
        raise bad_type("attention_mask", "bool or floating point", mask.dtype)
    visible, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    _require(visible | hidden, "0 where a key is seen and the least value where not", "a bias between them")
    return visible[:, 0]
