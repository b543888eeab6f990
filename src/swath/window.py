"""Which keys a query sees: the window rule on the host (its device twin is backends/device/window.py)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from swath.checks import check_count, check_int_dtype, check_ints, check_is_tensor
from swath.errors import bad_type, bad_value
from swath.vendors import mojo_window

LARGEST_SIZE = 2**31 - 1
"""Positions are int32."""
GUESS_STEP = 64
"""Keys, of which guesses are multiples."""


@dataclass(frozen=True, eq=False)
class Window:
    """Which keys a query sees, by position; keys stand at 0, 1, 2, ... and a query at ``p``.

    - causal: ``k <= p and (size is None or p - k < size or k < global_tokens)``
    - not causal: ``size is None or |p - k| < size or k < global_tokens``
    - with bounds, a range ``[lo, hi)`` for each query row, where positions of queries say nothing:
      ``lo <= k < hi or k < min(global_tokens, hi)``

    A worked example: ``Window(size=4, global_tokens=2)`` lets the query at position 10 see keys 7, 8, 9, 10
    (four keys, itself included) and the leading keys 0 and 1. The query at position 3 sees 0, 1, 2, 3.

    Args:
        size: keys in the window, the query's own included, as Hugging Face and vLLM configurations count.
            None is no limit, and 2**31 - 1 the largest. With ``causal=False`` the window reaches ``size - 1`` keys
            to each side.
        global_tokens: leading keys of the sequence that stay visible: an int, or a tensor [B], int32 or int64, with
            one count per sequence. (gpt-oss "sinks" are something else: logits, see ``sink=`` of the operators.)
        causal: whether keys after the query are hidden.
        max_global_tokens: upper bound of a tensor ``global_tokens``, used to size launches; None: not known.
        bounds: int32 or int64, shaped as q with ``[lo, hi)`` in place of heads and D: [B, 2], [B, S, 2] or [T, 2]. What
            is outside the sequence's keys is cut off, and a range that goes down is empty. ``swath.bounds`` makes
            those of image spans, chunks, prefixes and shards. ``size`` and ``causal`` keep their defaults.
        max_visible: upper bound of ``hi - lo``, to choose launches by; None: not known. It changes last bits at most.

    Raises:
        TypeError, ValueError: naming the field.
    """

    size: int | None = None
    global_tokens: int | Tensor = 0
    causal: bool = True
    max_global_tokens: int | None = None
    bounds: Tensor | None = None
    max_visible: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_count("size", self.size, "an int >= 0 or None", most=LARGEST_SIZE)
        if not isinstance(self.causal, bool):
            raise bad_type("causal", "a bool", type(self.causal).__name__)
        if isinstance(self.global_tokens, Tensor):
            check_ints("global_tokens", self.global_tokens, None, self.global_tokens.device)
            if self.max_global_tokens is not None:
                check_count("max_global_tokens", self.max_global_tokens, "an int >= 0 or None")
        else:
            check_count("global_tokens", self.global_tokens, "an int >= 0 or a tensor [B]", most=LARGEST_SIZE)
            if self.max_global_tokens is not None:
                raise bad_value("max_global_tokens", "None unless global_tokens is a tensor", self.max_global_tokens)
        if self.bounds is not None:
            self._check_bounds(self.bounds)
        elif self.max_visible is not None:
            raise bad_value("max_visible", "None unless there are bounds", self.max_visible)

    def _check_bounds(self, bounds: Tensor) -> None:
        check_int_dtype("bounds", check_is_tensor("bounds", bounds))
        if bounds.dim() not in (2, 3) or bounds.shape[-1] != 2:
            wanted = "shape [B, 2], [B, S, 2] or [T, 2]: a range [lo, hi) for each query row"
            raise bad_value("bounds", wanted, tuple(bounds.shape))
        if self.size is not None:
            raise bad_value("size", "None where there are bounds", self.size)
        if not self.causal:
            raise bad_value("causal", "True, its default, where there are bounds", self.causal)
        if self.max_visible is not None:
            check_count("max_visible", self.max_visible, "an int >= 0 or None")

    def __eq__(self, other: object) -> bool:
        """Field by field; tensors are the same only if they are the same object."""
        return isinstance(other, Window) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: ``key`` names tensors that a copy does not have."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What makes two windows the same: the fields, a tensor by its identity."""
        g, bounds = self.global_tokens, self.bounds
        leading = id(g) if isinstance(g, Tensor) else g, self.max_global_tokens
        return self.size, *leading, self.causal, None if bounds is None else id(bounds), self.max_visible

    @classmethod
    def of(cls, window: object) -> Window:
        """The argument ``window`` of an operator: a Window, a size for ``Window(size)``, or None for full attention.

        Raises:
            TypeError: anything else.
        """
        if window is None:
            return FULL
        if isinstance(window, Window):
            return window
        if isinstance(window, int) and not isinstance(window, bool):
            return cls(window)
        raise bad_type("window", "a Window, an int or None", type(window).__name__)

    @classmethod
    def from_flash(cls, left: int, right: int, *, causal: bool) -> Window:
        """From ``window_size=(left, right)`` and ``causal`` of FlashAttention, FlashInfer's ``window_left``.

        There ``left`` excludes the query itself, -1 is no limit, and ``causal=True`` hides all keys after the query,
        whatever ``right`` says: ``(127, 0)`` and ``(127, 127)`` with ``causal=True`` are ``Window(128)``, and
        ``(-1, -1)`` with ``causal=True`` is ``Window()``. Without it ``(-1, -1)`` is ``Window(causal=False)``, and
        ``right == left`` is a window to both sides.
        """
        check_count("left", left, "an int >= -1", least=-1)
        check_count("right", right, "an int >= -1", least=-1)
        if not isinstance(causal, bool):
            raise bad_type("causal", "a bool", type(causal).__name__)
        size = None if left == -1 else left + 1
        if causal or right == 0:
            return cls(size)
        if right == left:
            return cls(size, causal=False)
        raise bad_value("right", f"0 (causal) or {left} (as left)", right)

    @classmethod
    def from_mojo(cls, local: int | None, global_: int | None) -> Window:
        """From mojo_opset's ``local_window_size`` (excludes the query) and ``global_window_size``.

        ``(None, None)`` is full causal attention; ``(None, g)`` sees the first g keys only; ``(w, g)`` sees
        w + 1 keys and the first g.
        """
        return cls(*mojo_window(local, global_))

    @property
    def is_unbounded(self) -> bool:
        """True where no key is hidden by distance: full attention, causal or not."""
        return self.size is None and self.bounds is None

    def for_sequence(self, b: int, rows: int | slice = slice(None)) -> Window:
        """The window of sequence ``b``, whose query rows are q[rows]: its bounds [n, 2], if it has any, and its count
        of leading tokens, read to the host (reference and cpu only)."""
        window = self
        if isinstance(self.global_tokens, Tensor):
            window = replace(window, global_tokens=max(int(self.global_tokens[b]), 0), max_global_tokens=None)
        return window if self.bounds is None else replace(window, bounds=self.bounds[rows])

    def of_rows(self, first: int, end: int) -> Window:
        """The window of a sequence's query rows ``first .. end - 1``."""
        return self if self.bounds is None else replace(self, bounds=self.bounds[first:end])

    def global_bound(self, max_kv_len: int) -> int:
        """An upper bound of the leading tokens of any sequence, for launches and scratch."""
        g = self.max_global_tokens if isinstance(self.global_tokens, Tensor) else self.global_tokens
        return max_kv_len if g is None else min(g, max_kv_len)

    def mask(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The rule itself: bool [Q, K], true where the query at ``q_pos[i]`` sees the key at ``k_pos[j]``.

        Positions are integer tensors [Q] and [K] and may be negative or beyond the keys. ``global_tokens``
        must be an int (see ``for_sequence``). Bounds are [Q, 2], and positions of queries say nothing then.
        """
        p, k = q_pos[:, None], k_pos[None, :]
        if self.bounds is not None:
            low, end = self.bounds[:, :1], self.bounds[:, 1:]
            return (k < end) & ((k >= low) | (k < self._global_int()))
        visible = torch.ones(p.shape[0], k.shape[1], dtype=torch.bool, device=k.device)
        if self.size is not None:
            visible = ((p - k).abs() < self.size) | (k < self._global_int())
        return visible & (k <= p) if self.causal else visible

    def key_ranges(self, first: int, last: int, kv_len: int) -> tuple[int, int, int]:
        """Keys that any query at positions ``first .. last`` can see: ``(lead, left, right)``.

        They are ``[0, lead)`` and ``[left, right)``, disjoint, with ``lead <= left <= right <= kv_len``.
        ``Window(4, global_tokens=2).key_ranges(10, 11, 100)`` is ``(2, 7, 12)``. With bounds, whose rows may leave out
        keys between them, no row sees any others.
        """
        if self.bounds is not None:
            return self._bounded_ranges(self.bounds, kv_len)
        causal_end = min(max(last + 1, 0), kv_len) if self.causal else kv_len
        if self.size is None:
            return 0, 0, causal_end
        lead = min(self._global_int(), causal_end)
        right = min(max(last + self.size, 0), causal_end) if self.size else 0
        left = min(max(first - self.size + 1, 0), right)
        return _joined(lead, left, right)

    def _bounded_ranges(self, bounds: Tensor, kv_len: int) -> tuple[int, int, int]:
        low, end = bounds.long().clamp(0, kv_len).unbind(-1)
        seen = low < end
        lead = min(self._global_int(), int(end.max()) if len(end) else 0)
        right = int(end[seen].max()) if seen.any() else 0
        return _joined(lead, int(low[seen].min()) if right else 0, right)

    def seen_by_any(self, first: int, last: int, kv_len: int) -> Tensor:
        """Which of the keys ``0 .. kv_len - 1`` some query at positions ``first .. last`` sees, bool [kv_len]."""
        lead, left, right = self.key_ranges(first, last, kv_len)
        begun = torch.zeros(kv_len + 1, dtype=torch.int64)
        if self.bounds is not None:
            low, end = self.bounds.long().cpu().clamp(0, kv_len).unbind(-1)
            lead, left, right = min(self._global_int(), int(end.max()) if len(end) else 0), 0, 0
            ones = (low < end).long()
            begun.index_add_(0, low, ones).index_add_(0, end, -ones)
        seen = begun[:kv_len].cumsum(0) > 0
        seen[:lead] = seen[left:right] = True
        return seen

    def interior(self, first: int, last: int, left: int, right: int) -> tuple[int, int]:
        """Which of the keys ``left .. right - 1`` every query at positions ``first .. last`` sees by its window alone.

        They are ``start .. stop - 1``, with ``left <= start <= stop``.
        """
        start, stop = left, right
        if self.bounds is not None and len(self.bounds):
            start, stop = max(start, int(self.bounds[:, 0].max())), min(stop, int(self.bounds[:, 1].min()))
            return start, max(start, stop)
        if self.size is not None:
            start = max(start, last - self.size + 1)
        if self.causal:
            stop = min(stop, first + 1)
        elif self.size is not None:
            stop = min(stop, first + self.size)
        return start, max(start, stop)

    def visible_bound(self, max_q_len: int, max_kv_len: int) -> int:
        """An upper bound of the keys that ``max_q_len`` neighbouring queries see together, and those between them."""
        if self.size is None:
            return max_kv_len
        sides = 1 if self.causal else 2
        span = sides * max(self.size - 1, 0) + max_q_len if self.size else 0
        return min(max_kv_len, span + self.global_bound(max_kv_len))

    def visible_guess(self, q_len: int, max_kv_len: int) -> int:
        """The same for choices on which no result depends: with bounds, what their ``max_visible`` lets one expect.

        Rounded up, so that bounds that grow by a token leave the choice as it is.
        """
        if self.bounds is None or self.max_visible is None:
            return self.visible_bound(q_len, max_kv_len)
        span = -(-self.max_visible // GUESS_STEP) * GUESS_STEP + q_len - 1
        return min(max_kv_len, span + self.global_bound(max_kv_len))

    def _global_int(self) -> int:
        if isinstance(self.global_tokens, Tensor):
            raise bad_type("global_tokens", "an int here; call for_sequence(b) first", "a tensor")
        return self.global_tokens


def _joined(lead: int, left: int, right: int) -> tuple[int, int, int]:
    """Leading keys and a window as ``key_ranges`` has them: one range where they touch."""
    return (0, 0, max(lead, right)) if left <= lead else (lead, left, right)


FULL = Window()
"""Full causal attention: what a call without a window means."""
