"""What a call can be asked for, as host values: one frozen ``Case`` per test, benchmark row or bug report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from swath.errors import bad_type
from swath.quant import KVQuant
from swath.testing.budget import Arithmetic
from swath.testing.ranges import RULES, Rule
from swath.window import Window

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
"""What tables and the command line call dtypes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Case:
    """An attention call: every field is a host value, so a case prints, compares and hashes.

    Lengths
        kv_lens: keys of each sequence; negative ones count as 0.
        q_lens: an int S (1: decode, q [B, Hq, D]; more: n-step, q [B, S, Hq, D]), or one length per sequence (ragged,
            with cu_seqlens_q).
        q_start: position of each sequence's first query, or None.
        tail: rows of q past the last sequence's; ragged only.
    Shapes
        dense: ``attention`` in place of ``paged_attention``. num_kv_heads, group, head_dim, page_size.
        v_head_dim: elements of a value row, where these are fewer.
    Storage
        dtype: of q. quant: of the cache; None is q's dtype. scale_dtype: of the cache's scales. q_scale: "none",
        "tensor" or "token", of fp8 queries. layout: "hnd", "nhd", "packed", "packed hnd", "padded", or "apart", where V
        lies otherwise than K.
        strided: q, out and a table that is not flat lie in wider buffers.
    Page table
        table: "rectangular", "flat", or "rows" of a larger one. unit: its entries are a "page" or a "token" each.
        index_dtype: of it, of lengths and of positions: int32 or int64.
    Which keys a query sees
        size, global_tokens (one per sequence where it is a tuple), max_global_tokens, causal: as ``Window``.
        ranges: "" or which bounds the rows have, by name (``ranges.RULES``) or as a rule; their ``max_visible`` goes by
            ``bounds``.
    Scores
        scale (None is D^-0.5), softcap, sink ("none", "fp32" or "q": its dtype), gqa.
    Launch
        compute, split_size; bounds: "none", "tight" or "loose" max_q_len and max_kv_len.
    Malice
        spiked: keys aligned with the queries, with one-hot values, where a mistake of one key would be (``edges``).
        holes: one page in the middle of what each sequence sees has a hostile entry.
    """

    kv_lens: tuple[int, ...] = (70, 33, 129)
    q_lens: int | tuple[int, ...] = 1
    q_start: tuple[int, ...] | None = None
    tail: int = 0
    dense: bool = False
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    quant: KVQuant | None = None
    scale_dtype: torch.dtype = torch.float32
    q_scale: str = "none"
    table: str = "rectangular"
    unit: str = "page"
    index_dtype: torch.dtype = torch.int32
    layout: str = "hnd"
    strided: bool = False
    size: int | None = None
    global_tokens: int | tuple[int, ...] = 0
    max_global_tokens: int | None = None
    causal: bool = True
    ranges: str | Rule = ""
    scale: float | None = None
    softcap: float = 0.0
    sink: str = "none"
    gqa: str = "grouped"
    compute: str = "float"
    split_size: int | None = None
    bounds: str = "none"
    spiked: bool = False
    holes: bool = False

    def __str__(self) -> str:
        """The fields that differ from the defaults: a test's id."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={_short(value)}" for name, value in changed) or "default"

    @property
    def num_seqs(self) -> int:
        """Sequences, B."""
        return len(self.kv_lens)

    @property
    def num_q_heads(self) -> int:
        """Query heads, Hq."""
        return self.num_kv_heads * self.group

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Query rows of each sequence."""
        return (self.q_lens,) * self.num_seqs if isinstance(self.q_lens, int) else self.q_lens

    @property
    def ragged(self) -> bool:
        """Whether rows of q lie end to end, with cu_seqlens_q."""
        return self.dense or not isinstance(self.q_lens, int)

    @property
    def q_shape(self) -> tuple[int, ...]:
        """The shape of q."""
        lead = (sum(self.row_counts) + self.tail,) if self.ragged else (self.num_seqs,)
        steps = (self.q_lens,) if isinstance(self.q_lens, int) and not self.ragged and self.q_lens != 1 else ()
        return (*lead, *steps, self.num_q_heads, self.head_dim)

    @property
    def v_dim(self) -> int:
        """Elements of a row of V and of the result, Dv."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return torch.bfloat16 if self.dtype == torch.float8_e4m3fn else self.dtype

    @property
    def storage(self) -> KVQuant:
        """How K and V are stored."""
        return KVQuant(self.dtype) if self.quant is None else self.quant

    @property
    def arithmetic(self) -> Arithmetic:
        """What the error budget of its results depends on."""
        return Arithmetic(self.storage, self.compute, self.e4m3)

    @property
    def e4m3(self) -> bool:
        """Whether queries and keys may multiply in e4m3."""
        return self.dtype == self.storage.dtype == torch.float8_e4m3fn

    @property
    def window(self) -> Window:
        """Which keys a query sees, where all sequences have as many leading tokens."""
        if not isinstance(self.global_tokens, int):
            raise bad_type("global_tokens", "an int here; leading(b) is for one sequence", "a count for each sequence")
        return Window(self.size, self.global_tokens, self.causal)

    @property
    def score_scale(self) -> float:
        """What multiplies q . k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def leading(self, b: int) -> int:
        """The leading tokens of sequence ``b``."""
        return self.global_tokens if isinstance(self.global_tokens, int) else self.global_tokens[b]

    def first_position(self, b: int) -> int:
        """Where the first query row of sequence ``b`` stands."""
        return max(self.kv_lens[b], 0) - self.row_counts[b] if self.q_start is None else self.q_start[b]

    def ranges_of(self, b: int) -> list[tuple[int, int]]:
        """The bounds [lo, hi) of each query row of sequence ``b``."""
        rule = RULES[self.ranges] if isinstance(self.ranges, str) else self.ranges
        first, kv_len = self.first_position(b), max(self.kv_lens[b], 0)
        return [rule(i, first + i, kv_len) for i in range(self.row_counts[b])]

    def edges(self, b: int) -> list[int]:
        """The keys of sequence ``b`` where a mistake of one key would be: both sides of every edge there is.

        These are the window's edges, the bounds and the causal edge of the rows (of three of them where there are more
        than eight), the leading tokens' end, the page edges around each of these, and split boundaries.
        """
        first, count = self.first_position(b), self.row_counts[b]
        starts = {0, self.leading(b)}  # positions at which something begins
        for row in range(count) if count <= 8 else (0, count // 2, count - 1):
            p = first + row
            starts |= {p, p + 1}
            if self.size is not None:
                starts |= {p - self.size + 1, p + self.size}
            if self.ranges:
                starts |= set(self.ranges_of(b)[row])
        starts |= {start // self.page_size * self.page_size for start in starts}
        if self.split_size:
            starts |= set(range(0, max(self.kv_lens[b], 0), self.split_size))
        keys = {start + side for start in starts for side in (-1, 0)}
        return sorted(k for k in keys if 0 <= k < self.kv_lens[b])


def _short(value: object) -> str:
    if isinstance(value, KVQuant):
        dtype = _short(value.dtype)
        return dtype if value.k == value.v_granularity == "none" else f"{dtype}-{value.k}-{value.v_granularity}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(str, value))
    return str(value).removeprefix("torch.")
