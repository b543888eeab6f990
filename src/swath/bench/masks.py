"""Masks of models that are a range of keys for each query row: rules for the ``ranges`` of a case."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunks:
    """Causal attention within chunks of ``size`` positions (Llama 4)."""

    size: int

    def __call__(self, _i: int, p: int, _kv_len: int) -> tuple[int, int]:
        """The keys of the row at ``p``."""
        return p // self.size * self.size, p + 1

    def __str__(self) -> str:
        return f"chunks of {self.size}"


@dataclass(frozen=True)
class Images:
    """An image of ``tokens`` tokens at the end of every ``every``, whose rows see all of it (Gemma 3).

    size: keys of the causal window that the other rows, and these beside their image, see; None is no window.
    """

    tokens: int
    every: int
    size: int | None = None

    def __call__(self, _i: int, p: int, kv_len: int) -> tuple[int, int]:
        """The keys of the row at ``p``."""
        low = 0 if self.size is None else max(p - self.size + 1, 0)
        begin = (p // self.every + 1) * self.every - self.tokens
        return (low, p + 1) if p < begin else (min(low, begin), min(begin + self.tokens, kv_len))

    def __str__(self) -> str:
        window = "" if self.size is None else f", window {self.size}"
        return f"images of {self.tokens} in {self.every}{window}"

    def spans(self, kv_len: int) -> list[tuple[int, int]]:
        """The keys [begin, end) of all images."""
        begins = range(self.every - self.tokens, kv_len, self.every)
        return [(begin, min(begin + self.tokens, kv_len)) for begin in begins]
