"""What a benchmark case is: the numbers of one call, and the work that the call cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from swath.pages import page_count, pages_holding
from swath.quant import KVQuant
from swath.testing import Case
from swath.testing.cases import NAMES
from swath.window import Window

Op = Literal["decode", "steps", "prefill", "mixed"]
DECODES = ("decode", "steps")
"""Ops in which each sequence has one query token or a few; the others have chunks of prefill."""


@dataclass(frozen=True)
class Lengths:
    """Query tokens and keys of each sequence; the queries are the last keys."""

    q: tuple[int, ...]
    kv: tuple[int, ...]


class Draw(Protocol):
    """Where the lengths of a case come from. A draw on a GPU may differ from one on a CPU."""

    def lengths(self, _device: torch.device) -> Lengths:
        """The lengths, the same ones each time on the same kind of device."""

    def __str__(self) -> str:
        """The lengths in words, for ``swath bench list``."""


@dataclass(frozen=True)
class Groups:
    """Sequences alike in groups: (sequences, query tokens, keys)."""

    groups: tuple[tuple[int, int, int], ...]

    def lengths(self, _device: torch.device) -> Lengths:
        """As the groups say, in their order."""
        each = [(q, kv) for count, q, kv in self.groups for _ in range(count)]
        return Lengths(tuple(q for q, _ in each), tuple(kv for _, kv in each))

    def __str__(self) -> str:
        return " + ".join(f"{count} x {q} of {kv}" for count, q, kv in self.groups)


@dataclass(frozen=True)
class LogUniform:
    """``batch`` sequences with ``q_len`` query tokens over keys drawn log-uniformly from [low, high]; seed 0."""

    batch: int
    low: int
    high: int
    q_len: int = 1

    def lengths(self, _device: torch.device) -> Lengths:
        """Drawn on the CPU, whatever the device."""
        x = torch.rand(self.batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        keys = (self.low * (self.high / self.low) ** x).round().long().clamp(self.q_len)
        return Lengths((self.q_len,) * self.batch, tuple(keys.tolist()))

    def __str__(self) -> str:
        return f"{self.batch} x {self.q_len} of {self.low}..{self.high}, log-uniform"


@dataclass(frozen=True)
class UniformKeys:
    """``batch`` sequences with ``q_len`` query tokens over keys drawn uniformly from [low, high]; seed 0."""

    batch: int
    low: int
    high: int
    q_len: int = 1

    def lengths(self, _device: torch.device) -> Lengths:
        """Drawn on the CPU, whatever the device."""
        keys = torch.randint(self.low, self.high + 1, (self.batch,), generator=torch.Generator().manual_seed(0))
        return Lengths((self.q_len,) * self.batch, tuple(keys.clamp(self.q_len).tolist()))

    def __str__(self) -> str:
        return f"{self.batch} x {self.q_len} of {self.low}..{self.high}, uniform"


@dataclass(frozen=True)
class Extend:
    """The ragged table of SGLang's pull request 8860: 32 prefixes and extensions, each uniform in 1 .. n/2 - 1.

    The numbers are drawn on the device itself, with the seeds its authors used: a GPU gives their lengths, a CPU
    others.
    """

    n: int

    def lengths(self, device: torch.device) -> Lengths:
        """One extension of query tokens at the end of each prefix."""
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        prefix, extend = (
            torch.randint(1, self.n // 2, (32,), dtype=torch.int32, device=device).tolist() for _ in range(2)
        )
        return Lengths(tuple(extend), tuple(p + e for p, e in zip(prefix, extend, strict=True)))

    def __str__(self) -> str:
        return f"32 x 1..{self.n // 2 - 1} of 2..{self.n - 2}, as sglang 8860 draws them"


@dataclass(frozen=True, kw_only=True)
class BenchCase(Case):
    """A call with a name, whose lengths are drawn on the device that computes it.

    - op: "decode" (one query token), "steps" (a few), "prefill", or "mixed"
    - draw: where ``kv_lens`` and ``q_lens`` come from; they are empty until then
    - q_made: fp8 queries under a static scale are made of bf16 ones within the time
    """

    name: str
    op: Op
    draw: Draw
    tags: tuple[str, ...] = ()
    q_made: bool = False
    kv_lens: tuple[int, ...] = ()
    global_tokens: int = 0
    bounds: str = "tight"

    def __str__(self) -> str:
        return self.name

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one query token or a few."""
        return self.op in DECODES

    @property
    def has_sink(self) -> bool:
        """Whether each query head has a sink logit."""
        return self.sink != "none"

    def drawn(self, device: torch.device) -> BenchCase:
        """The case with its lengths."""
        lengths = self.draw.lengths(device)
        q_lens = lengths.q[0] if self.is_decode else lengths.q
        return replace(self, kv_lens=lengths.kv, q_lens=q_lens)

    @property
    def shape(self) -> str:
        """The numbers in words."""
        words = [str(self.draw), f"heads {self.num_q_heads}/{self.num_kv_heads}", f"D {self.head_dim}"]
        if self.v_dim != self.head_dim:
            words[-1] += f"/{self.v_dim}"
        words.append("dense" if self.dense else f"pages of {self.page_size}")
        if self.storage != KVQuant(torch.bfloat16):
            words.append(stored_name(self.storage))
        if self.dtype == torch.float8_e4m3fn:
            words.append("fp8 q made of bf16" if self.q_made else "fp8 q")
        if self.size is not None:
            words.append(f"window {self.size}")
        if self.ranges:
            words.append(str(self.ranges))
        if self.global_tokens:
            words.append(f"{self.global_tokens} leading")
        if self.has_sink:
            words.append("sinks")
        if self.compute != "float":
            words.append(f"compute {self.compute}")
        return ", ".join(words)


def stored_name(storage: KVQuant) -> str:
    """How keys and values are stored, in words: "bf16", "int8 token"."""
    return NAMES[storage.dtype] + (f" {storage.k}" if storage.k != "none" else "")


@dataclass(frozen=True)
class Work:
    """What a case with these lengths cannot avoid, and what its cache must keep."""

    flops: int
    nbytes: int
    cache_bytes: int


def work_of(case: Case) -> Work:
    """Both matrix products over visible pairs; q, out, and once each key, value and scale that some query sees.

    cache_bytes: the pages that the next token still needs; the others may be freed. Of dense keys none.
    """
    window, per_key = case.window, case.storage.bytes_per_token(case.num_kv_heads, case.head_dim, case.v_dim)
    pairs = keys = kept = 0
    for b, (q_len, kv_len) in enumerate(zip(case.row_counts, case.kv_lens, strict=True)):
        more_pairs, more_keys = _in_ranges(case, b) if case.ranges else _in_window(window, q_len, kv_len)
        pairs, keys = pairs + more_pairs, keys + more_keys
        kept += 0 if case.dense else _kept_slots(window, kv_len, case.page_size)
    elements = case.num_q_heads * (case.head_dim + case.v_dim)
    row = case.num_q_heads * (case.dtype.itemsize * case.head_dim + case.out_dtype.itemsize * case.v_dim)
    rows = sum(case.row_counts) * row
    return Work(2 * elements * pairs, keys * per_key + rows, kept * per_key)


def _in_window(window: Window, q_len: int, kv_len: int) -> tuple[int, int]:
    """(query, key) pairs of a sequence, and keys that some query sees."""
    lead, left, right = window.key_ranges(kv_len - q_len, kv_len - 1, kv_len)
    return visible_pairs(window, kv_len - q_len, kv_len), lead + right - left


def _in_ranges(case: Case, b: int) -> tuple[int, int]:
    """The same of a sequence whose rows have bounds, which leave no keys out between them."""
    ranges = case.ranges_of(b)
    return sum(end - low for low, end in ranges), max(end for _, end in ranges) - min(low for low, _ in ranges)


def visible_pairs(window: Window, first: int, kv_len: int) -> int:
    """(query, key) pairs that a causal ``window`` leaves, for queries at ``first .. kv_len - 1``.

    The query at p sees ``min(p + 1, cap)`` keys, where cap is what the last query would see of a longer past.
    """
    if kv_len <= first:
        return 0
    lead, left, right = window.key_ranges(kv_len - 1, kv_len - 1, kv_len)
    cap = lead + right - left
    rising = max(min(cap, kv_len) - first, 0)  # queries that see all that came before
    return rising * (2 * first + rising + 1) // 2 + (kv_len - first - rising) * cap


def _kept_slots(window: Window, kv_len: int, page_size: int) -> int:
    lead, left, right = window.key_ranges(kv_len, kv_len, kv_len + 1)
    lead_pages, others = page_count(lead, page_size), pages_holding(left, min(right, kv_len), page_size)
    return (lead_pages + max(others.stop - max(others.start, lead_pages), 0)) * page_size
