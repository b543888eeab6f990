"""The tensors of a ``Case``, and running and judging the call they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.ops.attention import attention
from swath.ops.explain import explain
from swath.ops.paged import paged_attention
from swath.pages import PageTable
from swath.testing import budget, oracle
from swath.testing.cases import Case
from swath.testing.oracle import Truth
from swath.window import Window

SENTINEL = -7.25
"""What surrounds the rows of a ``Canary``; every 16-bit type holds it."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a case, made by ``make``, ``make_filled`` or ``make_unset``."""

    case: Case
    q: Tensor
    keys: PagedKV | tuple[Tensor, Tensor]
    block_table: Tensor | tuple[Tensor, Tensor] | PageTable | None
    seq_lens: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    q_start: Tensor | None
    global_tokens: int | Tensor
    q_scale: Tensor | None
    sink: Tensor | None
    ranges: Tensor | None = None

    @property
    def cache(self) -> PagedKV:
        """The keys of a paged case."""
        if not isinstance(self.keys, PagedKV):
            raise TypeError("a dense case has no cache")
        return self.keys

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """k and v of a dense case."""
        if isinstance(self.keys, PagedKV):
            raise TypeError("a paged case has no dense keys")
        return self.keys

    @property
    def op(self) -> str:
        """The public function that takes them."""
        return "attention" if self.case.dense else "paged_attention"

    @property
    def function(self) -> Callable[..., Any]:
        """That function."""
        return attention if self.case.dense else paged_attention

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of the public function."""
        if isinstance(self.keys, PagedKV):
            return self.q, self.keys, self.block_table, self.seq_lens
        return self.q, *self.keys, self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the public function, but for ``out``, ``return_lse`` and ``impl``."""
        case = self.case
        max_q_len, max_kv_len = self._bounds()
        leading = (self.global_tokens, case.causal, case.max_global_tokens)
        window = Window(case.size, *leading, bounds=self.ranges, max_visible=self._max_visible())
        options: dict[str, Any] = dict(
            max_q_len=max_q_len, max_kv_len=max_kv_len, window=window, scale=case.scale, softcap=case.softcap,
            sink=self.sink, gqa=case.gqa, q_start=self.q_start,
        )  # fmt: skip
        if not case.dense:
            options |= dict(cu_seqlens_q=self.cu_seqlens_q, q_scale=self.q_scale)
            options |= dict(compute=case.compute, split_size=case.split_size)
        return options

    def _bounds(self) -> tuple[int | None, int | None]:
        q_len, kv_len = max(self.case.row_counts, default=0), max(0, *self.case.kv_lens, 0)
        loose = (2 * q_len + 5, 3 * kv_len + 70)
        return {"none": (None, None), "tight": (q_len, kv_len), "loose": loose}[self.case.bounds]

    def _max_visible(self) -> int | None:
        if self.ranges is None or self.case.bounds == "none":
            return None
        kv_len = max(0, *self.case.kv_lens, 0)
        most = int(self.ranges.long().clamp(0, kv_len).diff(dim=-1).clamp(min=0).max()) if self.ranges.numel() else 0
        return most if self.case.bounds == "tight" else 2 * most + 70

    def why_not(self, impl: str) -> str | None:
        """The reason that ``impl`` cannot run this call, or None."""
        return explain(self.op, *self.args, **self.options, impl=impl).reasons[impl]

    def run(self, impl: str = "auto", **changes: Any) -> tuple[Tensor, Tensor]:
        """(out, lse) of the public function; ``changes`` replace keyword arguments."""
        out, lse = self.function(*self.args, **{**self.options, "return_lse": True, **changes}, impl=impl)
        return out, lse

    def truth(self, rows: Tensor | None = None) -> Truth:
        """The exact results, of all rows or of ``rows`` (indices into q's rows laid flat)."""
        case = self.case
        leading = [case.leading(b) for b in range(case.num_seqs)]
        options: dict[str, Any] = dict(
            q_start=self.q_start, size=case.size, global_tokens=leading, causal=case.causal, scale=case.score_scale,
            softcap=case.softcap, sink=self.sink, interleaved=case.gqa == "interleaved", rows=rows, ranges=self.ranges,
        )  # fmt: skip
        if case.dense:
            return oracle.dense(*self.args, **options)
        q, cache, table, seq_lens = self.args
        options |= dict(cu_seqlens_q=self.cu_seqlens_q, q_scale=self.q_scale)
        if isinstance(table, PageTable):
            options |= dict(table_rows=table.rows, unit=table.unit)
            table = table.entries if table.indptr is None else (table.entries, table.indptr)
        return oracle.paged(q, cache.k, cache.v, cache.k_scale, cache.v_scale, table, seq_lens, **options)

    def check(self, out: Tensor, lse: Tensor | None, truth: Truth | None = None) -> float:
        """``check_budget`` of results of this call: the share of the budget used, at most 1.

        Raises:
            AssertionError: with the worst element.
        """
        return budget.check_budget(out, lse, self.truth() if truth is None else truth, self.case.arithmetic)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with ``change`` of each of its tensors."""
        made = {each.name: mapped(getattr(self, each.name), change) for each in fields(self)}
        return replace(self, **made)

    def to(self, device: torch.device | str) -> Inputs:
        """The same call on a device: see ``mover``."""
        return self.mapped(mover(device))

    def canary(self) -> Canary:
        """A buffer for ``out=`` that shows every write outside the rows that sequences own."""
        return Canary.around(self.q, self.case.v_dim, self.case.out_dtype, sum(self.case.row_counts))


def mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` of a tensor, or of each tensor in a tuple, a cache or a table; anything else stays as it is."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple):
        return tuple(mapped(part, change) for part in x)
    if isinstance(x, PagedKV):
        return PagedKV(*mapped(x.tensors, change))
    if isinstance(x, PageTable):
        return replace(x, **{name: mapped(getattr(x, name), change) for name in ("entries", "indptr", "rows")})
    return x


def mover(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function that puts tensors on a device, as they lie in memory.

    Whole storages are copied, each once. So strides stay, addresses are as odd as they were, and what shared memory
    shares it there. Tensors that are on the device are not copied.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def there(x: Tensor) -> Tensor:
        if x.device.type == torch.device(device).type:
            return x
        here = x.untyped_storage()
        if here.data_ptr() not in storages:
            storages[here.data_ptr()] = x.new_empty(0, dtype=torch.uint8).set_(here).to(device).untyped_storage()
        place = x.storage_offset(), x.shape, x.stride()
        return torch.empty(0, dtype=x.dtype, device=device).set_(storages[here.data_ptr()], *place)

    return there


@dataclass(frozen=True, eq=False)
class Canary:
    """An ``out`` inside a larger buffer of sentinels, with padded strides."""

    buffer: Tensor
    out: Tensor
    writable: Tensor

    @classmethod
    def around(cls, q: Tensor, v_dim: int, dtype: torch.dtype, owned_rows: int) -> Canary:
        """An out for ``q``, of whose rows of ``v_dim`` (laid flat) the first ``owned_rows`` may be written."""
        outer = (*(n + 2 for n in q.shape[:-2]), q.shape[-2] + 1, v_dim + 16)
        inner = (*(slice(1, -1) for _ in q.shape[:-2]), slice(0, -1), slice(0, -16))
        buffer = torch.full(outer, SENTINEL, dtype=dtype, device=q.device)
        writable = torch.zeros(outer, dtype=torch.bool, device=q.device)
        owned = torch.arange(q.shape[:-2].numel(), device=q.device) < owned_rows
        writable[inner] = owned.view(*q.shape[:-2], 1, 1)
        return cls(buffer, buffer[inner], writable)

    def broken(self) -> int:
        """Elements changed that no call may write."""
        return int(((self.buffer != SENTINEL) & ~self.writable).sum())
