"""What a call of an attention operator must hold to besides its budget, at the price of a second run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.pages import PageTable
from swath.testing.fuzz.draw import Call
from swath.testing.fuzz.truth import exact, page_lists
from swath.testing.fuzz.twists import VECTORS, build
from swath.testing.fuzz.verdict import BrokenError, demand_within_budget, same_bits, taker
from swath.testing.inputs import Inputs
from swath.testing.oracle import Truth, inside, visible


class Ran(NamedTuple):
    """A call that ran: its inputs, the same on the backend's device, who ran it, what came and what is true.

    asked: what stood for ``impl``, which may be "auto". Everything is on the CPU but for ``sent``.
    """

    call: Call
    inputs: Inputs
    sent: Inputs
    asked: str
    impl: str
    out: Tensor
    lse: Tensor
    truth: Truth

    def again(self, inputs: Inputs, **changes: Any) -> tuple[Tensor, Tensor]:
        """(out, lse) of other inputs where the call ran."""
        out, lse = inputs.to(self.sent.q.device).run(self.impl, **changes)
        return out.cpu(), lse.cpu()


Check = Callable[[Ran], None]


@dataclass(frozen=True)
class Promise:
    """Raises ``BrokenError``; how often it is asked, and of which calls; extreme ones only if asked for."""

    check: Check
    share: float
    fits: Callable[[Call], bool]
    extreme: bool = False


PROMISES: dict[str, Promise] = {}
"""By name, in the order in which they are checked: the last ones change the inputs."""


def promise(
    share: float, fits: Callable[[Call], bool] = lambda call: True, *, extreme: bool = False
) -> Callable[[Check], Check]:
    """Register a promise under its function's name."""

    def register(check: Check) -> Check:
        PROMISES[check.__name__.replace("_", "-")] = Promise(check, share, fits, extreme)
        return check

    return register


def demand_same(what: str, ran: Ran, out: Tensor, lse: Tensor | None, rows: Tensor | None = None) -> None:
    """The same bits as before in those rows, all that sequences own if not given."""
    rows = ran.truth.rows if rows is None else rows
    for name, now, before in (("out", out, ran.out), ("lse", lse, ran.lse)):
        if now is None:
            continue
        shape = before.shape[-2:] if name == "out" else before.shape[-1:]
        flat = [x.reshape(-1, *shape)[rows] for x in (now, before)]
        if not same_bits(*flat):
            wrong = (flat[0] != flat[1]).flatten(1).any(1).nonzero().flatten().tolist()
            raise BrokenError(f"{what}: {name} has other bits in rows {rows[wrong].tolist()[:8]}, {len(wrong)} in all")


@promise(0.2)
def plain(ran: Ran) -> None:
    """Without ``out`` the results are the same, bit for bit.

    Without an LSE another kernel runs: a compiler may fuse other products and sums, so no bits are promised.
    """
    demand_same("without out", ran, *ran.again(ran.inputs))
    out = ran.sent.function(*ran.sent.args, **ran.sent.options, impl=ran.impl)
    demand_within_budget(ran.inputs, out.cpu(), None, ran.truth, "without an LSE: ")


@promise(0.15, lambda call: call.case.split_size is not None and not {"short-table", "far-lengths"} & {*call.twists})
def other_bounds(ran: Ran) -> None:
    """With ``split_size`` no bit depends on the host bounds, nor does it where other bounds choose another backend."""
    others = [bounds for bounds in ("none", "tight", "loose") if bounds != ran.inputs.case.bounds]
    for bounds in others:
        inputs = replace(ran.sent, case=replace(ran.inputs.case, bounds=bounds))
        if taker(inputs.op, inputs.args, inputs.options, ran.asked):
            out, lse = inputs.run(ran.asked)
            demand_same(f"split_size under {bounds} bounds", ran, out.cpu(), lse.cpu())


@promise(0.1)
def other_contents(ran: Ran) -> None:
    """A second call that looks the same, and so takes what was remembered of the first, has results of its own."""
    inputs = build(ran.call, contents=1)
    demand_within_budget(inputs, *ran.again(inputs), exact(inputs), "other contents: ")


@promise(0.05)
def huge_bounds(ran: Ran) -> None:
    """Any true bound will do."""
    out, lse = ran.again(ran.inputs, max_q_len=2**31 - 1, max_kv_len=2**31 - 1)
    demand_within_budget(ran.inputs, out, lse, ran.truth, "bounds of 2^31 - 1: ")


@promise(0.1)
def inputs_kept(ran: Ran) -> None:
    """No tensor but the results is written to."""
    for (name, now), (_, before) in zip(_tensors(ran.sent), _tensors(build(ran.call)), strict=True):
        if not same_bits(now.cpu(), before):
            raise BrokenError(f"the call has written to {name}")


def _tensors(inputs: Inputs) -> list[tuple[str, Tensor]]:
    keys, table = inputs.keys, inputs.block_table
    named: dict[str, object] = {"q": inputs.q} | {name: getattr(inputs, name) for name in VECTORS}
    tensors = keys.tensors if isinstance(keys, PagedKV) else keys
    named |= dict(zip(("k", "v", "k_scale", "v_scale"), tensors, strict=False))
    parts = (table.entries, table.indptr, table.rows) if isinstance(table, PageTable) else table
    named |= dict(zip(("block_table", "indptr", "rows"), parts if isinstance(parts, tuple) else (parts,), strict=False))
    return [(name, x) for name, x in named.items() if isinstance(x, Tensor)]


ALIASES = {"one-q-head", "one-kv-head", "one-pool", "shared-pages"}
"""Twists after which a NaN of one sequence or head is another's too."""


def stands_alone(call: Call) -> bool:
    """Whether the sequences and heads of a call share no memory."""
    return call.case.num_seqs > 0 and not ALIASES & {*call.twists}


@promise(0.12, lambda call: stands_alone(call) and call.case.num_seqs > 1)
def nan_elsewhere(ran: Ran) -> None:
    """A NaN in one sequence leaves the others' results as they are, bit for bit."""
    inputs, truth = ran.inputs, ran.truth
    r = ran.call.random("nan-elsewhere")
    b = r.randrange(inputs.case.num_seqs)
    kind, rows = r.choice(("q", "k", "v")), rows_owned(inputs, b)
    if kind == "q" or not put_nan(inputs, b, kind, slice(None)):
        kind = "q"
        inputs.q[b if inputs.cu_seqlens_q is None else slice(rows.start, rows.stop)] = torch.nan
    out, lse = ran.again(inputs)
    others = (truth.rows < rows.start) | (truth.rows >= rows.stop)
    demand_same(f"NaN in {kind} of sequence {b}", ran, out, lse, truth.rows[others])


@promise(0.3, stands_alone, extreme=True)
def nan_key(ran: Ran) -> None:
    """A NaN in one key reaches no row that does not see it, nor does one in a value, but in kernels.

    Those multiply a tile of rows at once, and 0 x NaN is NaN. The inputs are made anew: other promises change them.
    """
    inputs, truth = build(ran.call), ran.truth
    r = ran.call.random("nan-key")
    b = r.randrange(inputs.case.num_seqs)
    seen, rows = seen_by(inputs, b), rows_owned(inputs, b)
    wanted = (seen.any(0) & ~seen.all(0)).nonzero().flatten().tolist() or seen.any(0).nonzero().flatten().tolist()
    if not wanted:
        return
    at, kind = r.choice(wanted), r.choice(("k", "v") if ran.impl in ("cpu", "reference") else ("k",))
    if put_nan(inputs, b, kind, slice(at, at + 1)):
        kept = torch.ones(len(truth.rows), dtype=torch.bool, device=truth.rows.device)
        kept[(truth.rows >= rows.start) & (truth.rows < rows.stop)] = ~seen[:, at]
        kept_truth = Truth(*(x[kept] for x in truth))
        what = f"NaN in {kind} at position {at} of sequence {b}: "
        demand_within_budget(inputs, *ran.again(inputs), kept_truth, what)


def rows_owned(inputs: Inputs, b: int) -> range:
    """Rows of q, laid flat, that belong to sequence ``b``."""
    if inputs.cu_seqlens_q is None:
        steps = inputs.case.row_counts[b]
        return range(b * steps, (b + 1) * steps)
    return range(*inputs.cu_seqlens_q[b : b + 2].tolist())


def held_by(inputs: Inputs, b: int) -> int:
    """Positions of sequence ``b`` that have a place in memory, dead pages counted."""
    if inputs.cu_seqlens_k is not None:
        first, end = inputs.cu_seqlens_k[b : b + 2].tolist()
        return int(end - first)
    kv_len = 0 if inputs.seq_lens is None else max(int(inputs.seq_lens[b]), 0)
    return min(kv_len, page_lists(inputs.block_table, inputs.cache.page_size)[b].shape[0] * inputs.cache.page_size)


def seen_by(inputs: Inputs, b: int) -> Tensor:
    """Which positions the rows of sequence ``b`` see, bool [rows, positions]."""
    case, rows, keys = inputs.case, rows_owned(inputs, b), held_by(inputs, b)
    kv_len = keys if inputs.seq_lens is None else max(int(inputs.seq_lens[b]), 0)
    first = kv_len - len(rows) if inputs.q_start is None else int(inputs.q_start[b])
    leading = inputs.global_tokens if isinstance(inputs.global_tokens, int) else int(inputs.global_tokens[b])
    p, k = (torch.arange(n, device=inputs.q.device) for n in (len(rows), keys))
    if inputs.ranges is not None:
        return inside(inputs.ranges.reshape(-1, 2)[rows.start : rows.stop], k, leading)
    return visible(first + p, k, case.size, leading, case.causal)


def put_nan(inputs: Inputs, b: int, kind: str, at: slice) -> bool:
    """NaN in keys or values of sequence ``b`` at these positions; false where their type has none."""
    positions = torch.arange(held_by(inputs, b), device=inputs.q.device)[at]
    if inputs.cu_seqlens_k is not None:
        inputs.dense[kind == "v"][int(inputs.cu_seqlens_k[b]) + positions] = torch.nan
        return True
    cache = inputs.cache
    x, scale = (cache.k, cache.k_scale) if kind == "k" else (cache.v, cache.v_scale)
    if x.dtype == torch.int8:
        if scale is None or scale.dim() < 3:
            return False
        x = scale
    entries = page_lists(inputs.block_table, cache.page_size)[b][positions // cache.page_size]
    exists = (entries >= 0) & (entries < cache.num_pages)
    nan: float = torch.nan
    if x.element_size() == 1:
        x, nan = x.view(torch.uint8), 0x7F  # NaN in both kinds of fp8
    x[entries[exists], :, (positions % cache.page_size)[exists]] = nan
    return True
