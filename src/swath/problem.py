"""Checked calls in the form that every backend reads: ``Problem`` is attention, dense or paged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swath.cache import DenseKeys, PagedKeys, PagedKV
from swath.window import FULL, Window

LOG2_E = 1.4426950408889634


@dataclass(eq=False, slots=True)
class Problem:
    """Queries, where their keys are, which keys a query sees, how scores are made, and where results go.

    q: [B, Hq, D] (decode), [B, S, Hq, D] (every sequence has S query tokens), or [T, Hq, D] with cu_seqlens_q [B + 1].
    out: as q with rows of Dv (bf16 for fp8 queries); lse: None or fp32 as q without D. Both are written in place.
    max_q_len, max_kv_len: host bounds for launch and scratch; no result depends on them.
    The other fields are the options of ``paged_attention`` (see there), checked.
    memo: what backends remember of calls with this signature; None where the signature is not known, as after
        ``dataclasses.replace``.

    No field is changed once it is made; a frozen dataclass would cost each call 2.5 us more.
    """

    q: Tensor
    keys: DenseKeys | PagedKeys
    out: Tensor
    lse: Tensor | None
    scale: float
    max_q_len: int
    max_kv_len: int
    window: Window = FULL
    cu_seqlens_q: Tensor | None = None
    q_start: Tensor | None = None
    q_scale: Tensor | None = None
    softcap: float = 0.0
    sink: Tensor | None = None
    gqa: str = "grouped"
    compute: str = "float"
    split_size: int | None = None
    memo: dict[str, Any] | None = field(default=None, init=False)

    @property
    def result(self) -> Any:
        """What the public function returns."""
        return result_of((self.out, self.lse))

    def remembered(self, key: str, find: Callable[[], Any]) -> Any:
        """What was found under ``key`` for a call of this signature, or what ``find`` returns."""
        return remembered(self.memo, key, find)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch, B."""
        return self.keys.num_seqs

    @property
    def num_q_heads(self) -> int:
        """Query heads, Hq."""
        return self.q.shape[-2]

    @property
    def head_dim(self) -> int:
        """Elements of a query or key row, D."""
        return self.q.shape[-1]

    @property
    def v_head_dim(self) -> int:
        """Elements of a value or output row, Dv."""
        return self.out.shape[-1]

    @property
    def in_place(self) -> bool:
        """Whether the output is written where the queries are."""
        return is_in_place(self.q, self.out)

    @property
    def interleaved(self) -> bool:
        """Whether query head h has the kv head ``h % Hkv``, not ``h // group``."""
        return self.gqa == "interleaved"

    @property
    def steps(self) -> int:
        """Query tokens of each sequence where there is no ``cu_seqlens_q``: S."""
        return self.q.shape[1] if self.q.dim() == 4 else 1

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_q_heads // self.keys.num_kv_heads

    @property
    def score_unit(self) -> float:
        """What makes scores of q . k: in base 2, or in units of the soft cap where there is one."""
        return self.scale / self.softcap if self.softcap > 0 else self.scale * LOG2_E

    def sequences(self) -> Iterator[SequenceRows]:
        """The rows of each sequence, for host backends; reads lengths to the host."""
        num_rows = self.q.shape[0]
        bounds = [] if self.cu_seqlens_q is None else [min(max(i, 0), num_rows) for i in self.cu_seqlens_q.tolist()]
        starts = None if self.q_start is None else self.q_start.tolist()
        for b in range(self.num_seqs):
            if bounds:
                rows: int | slice = slice(bounds[b], max(bounds[b], bounds[b + 1]))
            else:
                rows = b if self.q.dim() == 4 else slice(b, b + 1)
            q, kv_len = self.q[rows], self.keys.kv_len(b)
            start = kv_len - q.shape[0] if starts is None else starts[b]
            q_scale = self.q_scale
            if q_scale is not None and q_scale.dim():
                q_scale = q_scale[rows]
            lse = None if self.lse is None else self.lse[rows]
            yield SequenceRows(b, q, q_scale, start, kv_len, self.window.for_sequence(b, rows), self.out[rows], lse)

    def by_kv_head(self, x: Tensor) -> Tensor:
        """Split the query heads of ``x`` [n, Hq, ...] by kv head: [Hkv, n, group, ...], in either GQA layout."""
        num_kv_heads = self.keys.num_kv_heads
        if self.interleaved:
            by_member: Tensor = x.unflatten(1, (self.group, num_kv_heads))
            return by_member.movedim(2, 0)
        by_head: Tensor = x.unflatten(1, (num_kv_heads, self.group))
        return by_head.movedim(1, 0)

    def by_q_head(self, x: Tensor) -> Tensor:
        """Undo ``by_kv_head``: [Hkv, n, group, ...] to [n, Hq, ...]."""
        return x.movedim(0, 2 if self.interleaved else 1).flatten(1, 2)


@dataclass(frozen=True, eq=False, slots=True)
class SequenceRows:
    """The query rows of one sequence: q [n, Hq, D] standing at positions ``start .. start + n - 1``."""

    index: int
    q: Tensor
    q_scale: Tensor | None
    start: int
    kv_len: int
    window: Window
    out: Tensor
    lse: Tensor | None

    def positions(self, first: int = 0, end: int | None = None) -> Tensor:
        """Positions of rows ``first .. end - 1``, int64."""
        end = self.q.shape[0] if end is None else end
        return torch.arange(self.start + first, self.start + end, device=self.q.device)

    def visible(self, keys: DenseKeys | PagedKeys, first: int, end: int) -> tuple[int, int, int]:
        """Keys that rows ``first .. end - 1`` can see together, as ``Window.key_ranges``; nothing for no rows."""
        if end <= first:
            return 0, 0, 0
        last = self.start + end - 1
        return self.window.of_rows(first, end).key_ranges(self.start + first, last, min(self.kv_len, keys.capacity))

    def mask(self, first: int, end: int, key_positions: Tensor) -> Tensor:
        """Which keys [K] rows ``first .. end - 1`` see, bool [rows, K]."""
        return self.window.of_rows(first, end).mask(self.positions(first, end), key_positions)

    def dequantised_q(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """Query rows ``first .. end - 1`` in ``dtype``, the fp8 scale applied."""
        q = self.q[first:end].to(dtype)
        if self.q_scale is None:
            return q
        scale = self.q_scale.to(dtype)
        return q * (scale[first:end, :, None] if scale.dim() else scale)


@dataclass(frozen=True, eq=False, slots=True)
class AppendCase:
    """New tokens k [T, Hkv, D], v [T, Hkv, Dv] and their slots int64 [T] in ``cache``."""

    cache: PagedKV
    k: Tensor
    v: Tensor
    slot_mapping: Tensor
    memo: dict[str, Any] | None = None
    """What backends remember of calls with this signature; None where that is not known."""

    @property
    def result(self) -> None:
        """Nothing: the cache is written in place."""


@dataclass(frozen=True, eq=False, slots=True)
class QuantiseCase:
    """Queries q [..., Hq, D], a static scale [] or None, and where fp8 ones go: out, and q_scale, one a row or []."""

    q: Tensor
    scale: Tensor | None
    out: Tensor
    q_scale: Tensor
    memo: dict[str, Any] | None = None
    """What backends remember of calls with this signature; None where that is not known."""

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """The queries and their scale."""
        return self.out, self.q_scale


@dataclass(frozen=True, eq=False, slots=True)
class MergeCase:
    """Attention states of the same rows over disjoint keys, and where their union goes.

    Two states, or without ``out_b`` and ``lse_b`` N of them, stacked [N, ...]. base2: LSEs are to base 2.
    """

    out_a: Tensor
    lse_a: Tensor
    out_b: Tensor | None
    lse_b: Tensor | None
    out: Tensor
    lse: Tensor
    base2: bool = False

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Out and LSE of the first state, and those of the others, stacked [N - 1, ...]."""
        if self.out_b is None or self.lse_b is None:
            return self.out_a[0], self.lse_a[0], self.out_a[1:], self.lse_a[1:]
        return self.out_a, self.lse_a, self.out_b[None], self.lse_b[None]

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """The union."""
        return self.out, self.lse


def remembered(memo: dict[str, Any] | None, key: str, find: Callable[[], Any]) -> Any:
    """What a memo has under ``key``, or what ``find`` returns, which it then keeps."""
    memo = {} if memo is None else memo
    if key not in memo:
        memo[key] = find()
    return memo[key]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the checks found about a call, and with it about every call of the same signature."""

    values: dict[str, Any]
    """Checked numbers and words, by the names of Problem's fields."""
    v_head_dim: int
    """Elements of a row of the output."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What backends remember of such calls, by backend."""
    ready: dict[str, Callable[[Sequence[Any]], bool] | None] = field(default_factory=dict)
    """How to launch such calls from their arguments alone, by the ``impl`` asked for: see ``Operator.run_alike``."""

    def problem(self, q: Tensor, keys: DenseKeys | PagedKeys, options: dict[str, Any], outputs: Outputs) -> Problem:
        """The call with the tensors of ``options``."""
        fields = {**options, **self.values, "window": Window.of(options.get("window"))}
        fields["out"], fields["lse"] = outputs
        fields.pop("return_lse", None)
        problem = Problem(q, keys, **fields)
        problem.memo = self.memo
        return problem


def is_in_place(q: object, out: object) -> bool:
    """Whether results go where the queries are; arguments of any type, not checked yet."""
    return isinstance(q, Tensor) and isinstance(out, Tensor) and out.data_ptr() == q.data_ptr() != 0


def output_dtype(q: Tensor) -> torch.dtype:
    """The output has q's dtype; fp8 queries give bf16."""
    return torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype


Outputs = tuple[Tensor | None, Tensor | None]
"""out and LSE, or fp8 queries and their scale; None for what an operator does not make, or was not asked for."""


def result_of(outputs: Outputs) -> Any:
    """What a public function returns: out, or both where there is another output."""
    return outputs[0] if outputs[1] is None else outputs


def make_outputs(q: Tensor, v_head_dim: int, options: dict[str, Any]) -> Outputs:
    """The given ``out`` or a new one with rows of ``v_head_dim``, and a new LSE if asked for."""
    out = options.get("out")
    if out is None and v_head_dim == q.shape[-1]:  # in half the time of what follows
        out = torch.empty_like(q, dtype=output_dtype(q), memory_format=torch.contiguous_format)
    elif out is None:
        out = q.new_empty((*q.shape[:-1], v_head_dim), dtype=output_dtype(q))
    return out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if options.get("return_lse") else None
