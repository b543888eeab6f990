"""Masks of padded batches in O(batch) numbers instead of a batch x queries x keys tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import getclosurevars
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from swath.errors import bad_type, bad_value
from swath.window import Window

REPRESENTABLE = "a causal, sliding or full mask with padding at the ends of the sequences"


@dataclass(frozen=True, eq=False)
class BandMask:
    """A window over the real tokens of a padded batch: what most 4-D attention masks say.

    The batch is a rectangle of columns; the real tokens of sequence b are columns ``first[b] .. end[b] - 1``, and
    query row i stands in column ``q_column + i``. Distances between real tokens are the same with and without the
    padding, so positions count from ``first[b]``. Queries that are padding see what their position sees, or nothing.

    Args:
        window: who sees whom.
        q_len, kv_len: rows and columns of the mask.
        q_column: the column of the first query.
        first, end: real columns of each sequence.
        dropped: keys that the cache no longer holds, those before column 0.
    """

    window: Window
    q_len: int
    kv_len: int
    q_column: int
    first: tuple[int, ...]
    end: tuple[int, ...]
    dropped: int = 0

    @classmethod
    def unpadded(cls, window: Window, batch: int, q_len: int, kv_len: int, q_column: int, dropped: int = 0) -> BandMask:
        """All columns are real."""
        return cls(window, q_len, kv_len, q_column, (0,) * batch, (kv_len,) * batch, dropped)

    @classmethod
    def of_padding(cls, window: Window, padding: Tensor, q_len: int, q_column: int, dropped: int = 0) -> BandMask:
        """From the 2-D mask of real tokens, bool [B, columns]. Reads it to the host once.

        Raises:
            ValueError: padding stands between real tokens.
        """
        kv_len = padding.shape[1]
        column = torch.arange(kv_len, device=padding.device)
        first = torch.where(padding, column, kv_len).amin(1)
        end = torch.where(padding, column + 1, 0).amax(1)
        firsts, ends, counts = torch.stack([first, torch.maximum(first, end), padding.sum(1)]).tolist()
        if any(stop - start != n for start, stop, n in zip(firsts, ends, counts, strict=True)):
            raise bad_value("attention_mask", f"{REPRESENTABLE} (generate: pad on the left)", "padding between tokens")
        return cls(window, q_len, kv_len, q_column, tuple(firsts), tuple(ends), dropped)

    @classmethod
    def of_dense(cls, mask: Tensor, windows: Iterable[Window], q_column: int, dropped: int = 0) -> BandMask:
        """From a 4-D mask, bool or additive [B, 1, q_len, kv_len], by the first of ``windows`` that explains it all.

        Raises:
            TypeError, ValueError: another shape or dtype, a bias that is neither 0 nor minus infinity, or a mask
                that is no window of ``windows`` with padding at the ends.
        """
        visible = _visible(mask)
        q_len, kv_len = visible.shape[1:]
        real = visible.any(1)  # [B, kv_len]
        if not bool(real.any(1).all()):
            raise bad_value("attention_mask", "a key to see in every sequence", "a sequence with none")
        q_pos = torch.arange(q_column, q_column + q_len, device=mask.device)
        k_pos = torch.arange(kv_len, device=mask.device)
        for window in windows:
            if torch.equal(window.mask(q_pos, k_pos) & real[:, None], visible):
                return cls.of_padding(window, real, q_len, q_column, dropped)
        raise bad_value("attention_mask", REPRESENTABLE, "a mask of another form")

    def carried(self, device: torch.device | str) -> Tensor:
        """This mask as the attribute ``band`` of a tensor [batch, 1, q_len, kv_len]: models hand masks on as such.

        The tensor is a single int8 expanded, so it takes no memory, and whoever reads it without its attribute
        (after a slice, say) finds no mask in it: neither the dtype of one nor its values.
        """
        shape = self.batch, 1, self.q_len, self.kv_len
        mask = torch.ones(1, dtype=torch.int8, device=device).expand(shape)
        mask.band = self  # type: ignore[attr-defined]
        return mask

    @property
    def batch(self) -> int:
        """Sequences in the batch."""
        return len(self.first)

    @property
    def is_padded(self) -> bool:
        """Whether a column is not a real token."""
        return any(self.first) or any(stop != self.kv_len for stop in self.end)

    def varlen(self) -> tuple[list[int], list[int], list[int]]:
        """``cu_seqlens_q``, ``cu_seqlens_k``, ``q_start`` over the rows and columns of the batch laid end to end.

        The padded columns before each sequence form a sequence of their own that no query belongs to, so keys and
        values stay where they are.
        """
        rows, columns = self.q_len, self.kv_len
        starts = [self.q_column - first for first in self.first]
        if not self.is_padded:
            return list(range(0, (self.batch + 1) * rows, rows)), [b * columns for b in range(self.batch + 1)], starts
        cu_q = [0, *accumulate(chain.from_iterable((0, rows) for _ in range(self.batch)))]
        ends = ((b * columns + self.first[b], b * columns + self.end[b]) for b in range(self.batch))
        return cu_q, [0, *chain.from_iterable(ends)], list(chain.from_iterable((0, start) for start in starts))

    def varlen_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``varlen()`` as int32 tensors, made once: the layers of a model share the mask."""
        made: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = self.__dict__.setdefault("_on_device", {})
        if device not in made:
            cu_q, cu_k, q_start = (torch.tensor(x, dtype=torch.int32, device=device) for x in self.varlen())
            made[device] = cu_q, cu_k, q_start
        return made[device]


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
    **_: Any,
) -> Tensor:
    """The mask function for AttentionMaskInterface: Transformers' description of a mask, to a carried BandMask.

    Arguments as for ``transformers.masking_utils.sdpa_mask``. A ``mask_function`` that Transformers' own causal,
    sliding and bidirectional builders did not make is written out in full and must turn out to say the same.

    Raises:
        ValueError: the mask is no window with padding at the ends.
    """
    q_column = int(q_offset) - kv_offset
    window = window_of(mask_function)
    if window is None:
        dense = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            allow_is_causal_skip=False,
        )  # fmt: skip
        windows = *likely_windows(local_size, causal=True), *likely_windows(None, causal=False)
        return BandMask.of_dense(dense, windows, q_column, kv_offset).carried(device)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return BandMask.unpadded(window, batch_size, q_length, kv_length, q_column, kv_offset).carried(device)
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    return BandMask.of_padding(window, padding, q_length, q_column, kv_offset).carried(device)


def likely_windows(size: int | None, causal: bool) -> tuple[Window, ...]:
    """The windows that a mask of unknown origin is compared with."""
    if not causal:
        return (Window(causal=False),)
    return (Window(),) if size is None else (Window(size), Window())


def window_of(mask_function: Callable[..., Any]) -> Window | None:
    """The window of a mask function made by Transformers' causal, sliding or bidirectional builders, else None.

    Such functions are closures: they are told by their code objects, and their size is read from their variables.
    """
    if mask_function is causal_mask_function:
        return Window()
    if mask_function is bidirectional_mask_function:
        return Window(causal=False)
    for build, overlay, convert in (
        (sliding_window_causal_mask_function, sliding_window_overlay, Window),
        # There the window reaches `size` keys to each side, as in FlashAttention's convention.
        (
            sliding_window_bidirectional_mask_function,
            sliding_window_bidirectional_overlay,
            lambda size: Window.from_flash(size, size, causal=False),
        ),
    ):
        ours, theirs = _parts(build(1)), _parts(mask_function)
        if len(ours) == len(theirs) == 2 and ours[1] is theirs[1] and theirs[0].__code__ is overlay(1).__code__:
            return convert(getclosurevars(theirs[0]).nonlocals["sliding_window"])
    return None


def _parts(mask_function: Callable[..., Any]) -> tuple[Any, ...]:
    """The functions that ``and_masks`` joined, or nothing."""
    joined = sliding_window_causal_mask_function(1).__code__
    if getattr(mask_function, "__code__", None) is not joined:
        return ()
    return tuple(getclosurevars(mask_function).nonlocals["mask_functions"])


def _visible(mask: Tensor) -> Tensor:
    """A 4-D mask as bool [B, q_len, kv_len], true where a query sees a key."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise bad_value("attention_mask", "shape [batch, 1, queries, keys]", tuple(mask.shape))
    if mask.dtype == torch.bool:
        return mask[:, 0]
    if not mask.dtype.is_floating_point:
        raise bad_type("attention_mask", "bool or floating point", mask.dtype)
    visible, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    if not bool((visible | hidden).all()):
        raise bad_value("attention_mask", "0 where a key is seen and the least value where not", "a bias between them")
    return visible[:, 0]
