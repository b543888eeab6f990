"""The cpu schedule: blocks of query rows over spans of visible keys, in float32 torch operations.

The keys that the rows of a sequence can see are gathered and cast once, a span at a time; each block of rows then
multiplies with its own part of the span and takes the result into a running softmax. Time follows what is visible,
not the context; memory is one span, the scores of one block, and a few float32 copies of the query rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from swath.cache import KeySlice
from swath.problem import LOG2_E, Problem, SequenceRows
from swath.quant import fold_out, fold_p, fold_q, fold_scores, quantise, token_scale
from swath.window import Window

SPAN_BYTES = 4 << 20
"""Of the float32 keys and values of a span."""
SCORE_BYTES = 4 << 20
"""Of the scores of a block: small enough for a cache, large enough that starting threads costs little."""
MIN_ROWS, MAX_ROWS = 16, 256
"""Query tokens of a block; fewer make poor matrix products."""
MIN_SPAN = 256

LARGEST_INT8 = 127
EXACT_INT8_KEYS = 2**24 // (LARGEST_INT8 * 128)
"""So many products of p in 127ths with stored int8 add up exactly in float32, in any order."""

FLOOR, TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
"""The running maximum of a row that has seen no key: finite, so that no difference of it is NaN, and the least that a
score can be, so that none is below it. Whether a row has seen a key is said by its sum, not by its maximum."""


def why_not(problem: Problem) -> str | None:
    """The reason against a problem: tensors elsewhere than on the CPU."""
    device = problem.q.device.type
    return None if device == "cpu" else f"takes CPU tensors only, q is on {device}"


def plan(problem: Problem) -> str:
    """The launch in words."""
    rows, keys = block_rows(problem, problem.window, problem.max_kv_len), span_keys(problem)
    return f"torch, float32, blocks of {rows} query tokens over spans of up to {keys} visible keys"


def warm(problem: Problem) -> None:
    """Nothing to compile."""


def run(problem: Problem) -> None:
    """Write out and lse of every row of every sequence, in float32 also where torch would pick another type."""
    with torch.autocast("cpu", enabled=False):
        for rows in problem.sequences():
            if rows.q.shape[0]:
                _run_sequence(problem, rows)


def span_keys(problem: Problem) -> int:
    """Keys that are gathered and cast at once."""
    bytes_per_key = 4 * problem.keys.num_kv_heads * (problem.head_dim + problem.v_head_dim)
    keys = max(SPAN_BYTES // bytes_per_key, MIN_SPAN)
    return min(keys, EXACT_INT8_KEYS) if problem.compute == "int8" else keys


def block_rows(problem: Problem, window: Window, kv_len: int) -> int:
    """Query tokens of a block: as many as one of them sees keys, if the scores fit. More would score hidden keys."""
    visible = window.visible_guess if problem.split_size is None else window.visible_bound  # without a promise
    rows = min(max(visible(1, kv_len), MIN_ROWS), MAX_ROWS)
    keys = min(visible(rows, kv_len), span_keys(problem))
    return max(min(rows, SCORE_BYTES // (4 * problem.num_q_heads * max(keys, 1))), 1)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring keys ``start .. stop - 1`` that rows ``first .. end - 1`` see; ``clear`` ones are seen by all."""

    first: int
    end: int
    start: int
    stop: int
    clear: tuple[int, int]


def _stretches(problem: Problem, rows: SequenceRows) -> list[_Stretch]:
    """What each block of rows sees: leading keys and window."""
    found, n, keys = [], rows.q.shape[0], problem.keys
    size = 1 if n == 1 else block_rows(problem, rows.window, rows.kv_len)
    for first in range(0, n, size):
        end = min(first + size, n)
        lead, left, right = rows.visible(keys, first, end)
        window = rows.window.of_rows(first, end)
        if lead:  # a window begins after these keys, so that all rows are past them; bounds may end before
            found.append(_Stretch(first, end, 0, lead, (0, lead if window.bounds is None else 0)))
        if left < right:
            clear = window.interior(rows.start + first, rows.start + end - 1, left, right)
            found.append(_Stretch(first, end, left, right, clear))
    return found


def _spans(problem: Problem, rows: SequenceRows) -> Iterator[tuple[int, int]]:
    """All keys that the sequence's rows can see, cut to ``span_keys``."""
    lead, left, right = rows.visible(problem.keys, 0, rows.q.shape[0])
    step = span_keys(problem)
    for start, stop in ((0, lead), (left, right)):
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


def _run_sequence(problem: Problem, rows: SequenceRows) -> None:
    stretches, softmax = _stretches(problem, rows), _Softmax.start(problem, rows)
    queries, span, group = None, None, problem.group
    for start, stop in _spans(problem, rows):
        span = _in_float32(problem.keys.slice(rows.index, start, stop))  # fewer keys where cu_seqlens_k overruns k
        if queries is None:
            queries = _Queries.fold(problem, rows, span)
        for stretch in stretches:
            left, right = max(stretch.start, start), min(stretch.stop, start + span.k.shape[1])
            if left < right:
                keys = span.narrow(left - start, right - start)
                at = slice(stretch.first * group, stretch.end * group)
                softmax.step(at, queries.scores(at, keys), keys, _cuts(rows, stretch, left, keys))
    softmax.write(problem, rows, span)


def _in_float32(keys: KeySlice) -> KeySlice:
    """Stored values cast, not scaled: scales fold into queries, scores, p and out."""
    return keys if keys.k.dtype == torch.float32 else replace(keys, k=_cast(keys.k), v=_cast(keys.v))


def _cast(x: Tensor) -> Tensor:
    if x.dtype != torch.float8_e4m3fn:
        return x.float()
    # torch casts this type element by element; a look-up takes a third of the time.
    return _e4m3_values().index_select(0, x.reshape(-1).view(torch.uint8).int()).view(x.shape)


@cache
def _e4m3_values() -> Tensor:
    """The 256 values in the order of their bytes, float32. An ordinary tensor, whatever the first call ran under."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, eq=False, slots=True)
class _Cut:
    """Keys ``first .. end - 1`` of a tile of scores that not every row sees: ``hidden`` [tokens or 1, keys]."""

    first: int
    end: int
    hidden: Tensor

    def of(self, s: Tensor) -> Tensor:
        """These keys' scores among ``s`` [Hkv, tokens * group, N], as [Hkv, tokens or 1, rows, keys]."""
        by_token: Tensor = s.unflatten(1, (self.hidden.shape[0], -1))
        return by_token[..., self.first : self.end]


def _cuts(rows: SequenceRows, stretch: _Stretch, first_key: int, keys: KeySlice) -> list[_Cut]:
    """What is hidden of the scores of a stretch with ``keys``: its rows do not see it, or it has no page."""
    cuts, num_keys = [], keys.live.shape[0]
    if not bool(keys.live.all()):
        cuts.append(_Cut(0, num_keys, ~keys.live[None]))
    (clear_from, clear_to), end_key = stretch.clear, first_key + num_keys
    for left, right in ((first_key, min(end_key, clear_from)), (max(first_key, clear_to), end_key)):
        if left < right:
            positions = torch.arange(left, right, device="cpu")
            visible = rows.mask(stretch.first, stretch.end, positions)
            cuts.append(_Cut(left - first_key, right - first_key, ~visible))
    return cuts


def _hide(s: Tensor, cuts: list[_Cut]) -> Tensor:
    """Make hidden scores -inf; the largest of each row [Hkv, rows, 1].

    By adding, which torch does ten times faster than a masked fill, but where a score is NaN or infinite.
    """
    for cut in cuts:
        bias = torch.zeros_like(cut.hidden, dtype=s.dtype).masked_fill_(cut.hidden, -torch.inf)
        cut.of(s).add_(bias[:, None])
    highest = s.amax(-1, keepdim=True)
    if cuts and bool(highest.isnan().any()):
        for cut in cuts:
            cut.of(s).masked_fill_(cut.hidden[:, None], -torch.inf)
        highest = s.amax(-1, keepdim=True)
    return highest


def _is_finite(keys: KeySlice) -> bool:
    """Whether no value or token scale of V is NaN or infinite, nor their sum, which is a pass that torch does fast."""
    total = keys.v.sum()
    if keys.quant.v_granularity == "token" and keys.v_scale is not None:
        total = total + keys.v_scale.float().sum()
    return bool(total.isfinite())


def _add_apart(acc: Tensor, p: Tensor, keys: KeySlice, cuts: list[_Cut]) -> None:
    """acc += p @ V where values are NaN or infinite: those that a row does not see add nothing to it, nor 0 x NaN."""
    seen = torch.ones_like(p)
    for cut in cuts:
        cut.of(seen).masked_fill_(cut.hidden[:, None], 0.0)
    v, scale, finite = keys.v, keys.v_scale, keys.v.isfinite()
    if keys.quant.v_granularity == "token" and scale is not None:
        v, finite = v * scale[..., None], finite & scale.isfinite()[..., None]
        scale = scale.where(scale.isfinite(), 0.0)
    acc.baddbmm_(fold_p(p, keys.quant.v_granularity, scale), keys.v.where(finite, 0.0))
    v = v.where(~finite, 0.0)
    for kind, of_kind in ((torch.nan, v.isnan()), (torch.inf, v.isposinf()), (-torch.inf, v.isneginf())):
        reached = torch.bmm(seen, of_kind.to(seen.dtype)) > 0
        acc.add_(torch.zeros_like(acc).masked_fill_(reached, kind))


@dataclass(frozen=True, eq=False, slots=True)
class _Queries:
    """The query rows of a sequence, ready for the product with stored keys.

    q [Hkv, n * group, D]; factor: None, or [Hkv, n * group, 1] for q in int8 steps. Scores come in base 2, or in units
    of the soft cap where ``cap_log2`` is not 0.
    """

    q: Tensor
    factor: Tensor | None
    cap_log2: float

    @classmethod
    def fold(cls, problem: Problem, rows: SequenceRows, keys: KeySlice) -> _Queries:
        """Score scale and K's scales folded in, all but token scales; in int8 steps by row for ``compute="int8"``.

        Tensor and head scales would fit the scores as well, but these may be beyond float32 without them.
        """
        q = problem.by_kv_head(rows.dequantised_q(0, rows.q.shape[0], torch.float32)).flatten(1, 2)
        q = fold_q(q, keys.quant.k, keys.k_scale)
        if keys.quant.k != "token":
            q = fold_scores(q, keys.quant.k, keys.k_scale)
        cap_log2 = problem.softcap * LOG2_E
        unit = problem.score_unit
        if problem.compute != "int8":
            return cls(q * unit, None, cap_log2)
        step = token_scale(q, torch.int8)[..., None]
        return cls(quantise(q, step, torch.int8).float(), step * unit, cap_log2)

    def scores(self, at: slice, keys: KeySlice) -> Tensor:
        """Base-2 scores [Hkv, rows, N] of the rows ``at``. Sums of int8 products are exact in float32."""
        s = torch.bmm(self.q[:, at], keys.k.mT)
        if self.factor is not None:
            s.mul_(self.factor[:, at])
        if keys.quant.k == "token":
            s = fold_scores(s, keys.quant.k, keys.k_scale)
        return s.tanh_().mul_(self.cap_log2) if self.cap_log2 else s


@dataclass(frozen=True, eq=False, slots=True)
class _Softmax:
    """The running softmax of a sequence's rows: base-2 maximum m and sum l [Hkv, n * group, 1], acc [..., Dv]."""

    m: Tensor
    l: Tensor
    acc: Tensor
    p_steps: int

    @classmethod
    def start(cls, problem: Problem, rows: SequenceRows) -> _Softmax:
        """The state before any key."""
        shape = (problem.keys.num_kv_heads, rows.q.shape[0] * problem.group)
        acc = torch.zeros(*shape, problem.v_head_dim, dtype=torch.float32, device="cpu")
        l = acc.new_zeros(*shape, 1)
        return cls(torch.full_like(l, FLOOR), l, acc, LARGEST_INT8 if problem.compute == "int8" else 0)

    def step(self, at: slice, s: Tensor, keys: KeySlice, cuts: list[_Cut]) -> None:
        """Take in the scores ``s`` [Hkv, rows, N], which are consumed, and the values of the same keys."""
        m, l, acc = self.m[:, at], self.l[:, at], self.acc[:, at]
        m_new = torch.maximum(m, _hide(s, cuts))
        p = s.sub_(m_new).exp2_()
        alpha = torch.exp2(m - m_new)
        m.copy_(m_new)
        l.mul_(alpha).add_(p.sum(-1, keepdim=True))
        acc.mul_(alpha)
        if self.p_steps:
            acc.add_(torch.bmm(p.mul_(self.p_steps).round_(), keys.v), alpha=1 / self.p_steps)
        elif cuts and not _is_finite(keys):
            _add_apart(acc, p, keys, cuts)
        else:
            acc.baddbmm_(fold_p(p, keys.quant.v_granularity, keys.v_scale), keys.v)

    def take_sink(self, problem: Problem, sink: Tensor) -> Tensor:
        """Add the sink logits [Hq] to the denominator, and return the maxima in natural units.

        Last, so that p in steps is relative to the keys alone. The largest logits are beyond float32 in base 2, so a
        maximum that is the logit's comes as that.
        """
        heads, rows = self.l.shape[:2]
        sink = problem.by_kv_head(sink.float()[None])
        sink = sink.expand(heads, rows // problem.group, problem.group).reshape(self.l.shape)
        level = (sink * LOG2_E).clamp(FLOOR, -FLOOR)
        m_new = torch.maximum(self.m, level)
        alpha = torch.exp2(self.m - m_new)
        self.l.mul_(alpha).add_(torch.exp2(level - m_new).where(sink != -torch.inf, 0.0))
        self.acc.mul_(alpha)
        return sink.where(m_new == level, m_new / LOG2_E)

    def write(self, problem: Problem, rows: SequenceRows, keys: KeySlice | None) -> None:
        """Take the sink, normalise, fold V's static scale, round once.

        ``keys``: any of the sequence's, None where no row sees one.
        """
        shape = (rows.q.shape[0], problem.group)
        m = self.m / LOG2_E if problem.sink is None else self.take_sink(problem, problem.sink)
        out = self.acc / self.l.clamp(min=TINY)  # l is 0, beside an acc of 0, or at least about 1
        if keys is not None:
            out = fold_out(out, keys.quant.v_granularity, keys.v_scale)
        problem.by_kv_head(rows.out).copy_(out.unflatten(1, shape))
        if rows.lse is not None:
            lse = torch.where(self.m == torch.inf, torch.inf, m + self.l.log())
            problem.by_kv_head(rows.lse).copy_(lse.view(-1, *shape))
