"""Faults that the fuzzer must find, each a patch of the cpu and reference backends by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import swath.backends.cpu.attention as cpu
import swath.backends.reference.append as append
import swath.backends.reference.merge as merge
from swath import KVQuant, cache
from swath.ops import slots
from swath.pages import PageTable
from swath.problem import Problem, SequenceRows
from swath.quant import fold_out
from swath.window import Window

Patch = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Patch] = {}


def fault(seed: Patch) -> Patch:
    FAULTS[seed.__name__.replace("_", " ")] = seed
    return seed


def with_windows(monkeypatch: pytest.MonkeyPatch, change: Callable[[Window], Window]) -> None:
    of_sequence = Window.for_sequence
    monkeypatch.setattr(Window, "for_sequence", lambda self, b, rows: change(of_sequence(self, b, rows)))


def with_problems(monkeypatch: pytest.MonkeyPatch, change: Callable[[Problem], Problem]) -> None:
    run = cpu.run
    monkeypatch.setattr(cpu, "run", lambda problem: run(change(problem)))


def with_sequences(monkeypatch: pytest.MonkeyPatch, change: Callable[[SequenceRows], SequenceRows]) -> None:
    sequences = Problem.sequences
    monkeypatch.setattr(Problem, "sequences", lambda self: map(change, sequences(self)))


@fault
def a_window_one_too_long(patch: pytest.MonkeyPatch) -> None:
    with_windows(patch, lambda w: replace(w, size=w.size + 1) if w.size else w)


@fault
def a_window_one_too_short(patch: pytest.MonkeyPatch) -> None:
    with_windows(patch, lambda w: replace(w, size=w.size - 1) if w.size else w)


@fault
def a_range_one_too_long(patch: pytest.MonkeyPatch) -> None:
    one = torch.tensor([0, 1])
    with_windows(patch, lambda w: w if w.bounds is None else replace(w, bounds=(w.bounds.long() + one)))


@fault
def a_range_begun_too_late(patch: pytest.MonkeyPatch) -> None:
    one = torch.tensor([1, 0])
    with_windows(patch, lambda w: w if w.bounds is None else replace(w, bounds=(w.bounds.long() + one)))


@fault
def a_leading_token_lost(patch: pytest.MonkeyPatch) -> None:
    with_windows(patch, lambda w: replace(w, global_tokens=max(w.global_tokens - 1, 0)))


@fault
def queries_one_further(patch: pytest.MonkeyPatch) -> None:
    with_sequences(patch, lambda rows: replace(rows, start=rows.start + 1))


@fault
def a_sink_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu._Softmax, "take_sink", lambda self, *_: self.m / cpu.LOG2_E)


@fault
def a_key_lost_where_a_page_begins(patch: pytest.MonkeyPatch) -> None:
    taken = cache.PagedKeys.slice

    def take(self: cache.PagedKeys, b: int, start: int, stop: int) -> cache.KeySlice:
        found, size = taken(self, b, start, stop), self.cache.page_size
        at = torch.arange(start, start + len(found.live))
        return replace(found, live=found.live & ((at % size != 0) | (at == 0)))

    patch.setattr(cache.PagedKeys, "slice", take)


@fault
def a_key_lost_at_a_split(patch: pytest.MonkeyPatch) -> None:
    spans = cpu._spans

    def cut(problem: Problem, rows: SequenceRows) -> Iterator[tuple[int, int]]:
        for start, stop in spans(problem, rows):
            yield start + (start > 0 and start % 64 == 0), stop

    patch.setattr(cpu, "span_keys", lambda _: 64)
    patch.setattr(cpu, "_spans", cut)


@fault
def a_dead_page_read(patch: pytest.MonkeyPatch) -> None:
    """Its keys count as visible."""
    taken = cache.PagedKeys.slice

    def take(self: cache.PagedKeys, b: int, start: int, stop: int) -> cache.KeySlice:
        found = taken(self, b, start, stop)
        return replace(found, live=torch.ones_like(found.live))

    patch.setattr(cache.PagedKeys, "slice", take)


@fault
def a_soft_cap_forgotten(patch: pytest.MonkeyPatch) -> None:
    with_problems(patch, lambda problem: replace(problem, softcap=0.0))


@fault
def the_other_gqa_layout(patch: pytest.MonkeyPatch) -> None:
    with_problems(patch, lambda problem: replace(problem, gqa="grouped"))


@fault
def a_q_scale_forgotten(patch: pytest.MonkeyPatch) -> None:
    with_problems(patch, lambda problem: replace(problem, q_scale=None))


@fault
def compute_in_int8_unasked(patch: pytest.MonkeyPatch) -> None:
    def coarser(problem: Problem) -> Problem:
        quant = problem.keys.cache.quant if isinstance(problem.keys, cache.PagedKeys) else KVQuant(torch.bfloat16)
        coarse = quant.dtype == torch.int8 and "token" not in (quant.k, quant.v)
        return replace(problem, compute="int8") if coarse else problem

    with_problems(patch, coarser)


@fault
def scales_of_another_head(patch: pytest.MonkeyPatch) -> None:
    def fold(out: torch.Tensor, granularity: str, scale: torch.Tensor | None) -> torch.Tensor:
        return fold_out(out, granularity, scale.roll(1) if granularity == "head" and scale is not None else scale)

    patch.setattr(cpu, "fold_out", fold)


@fault
def an_lse_to_base_2(patch: pytest.MonkeyPatch) -> None:
    def in_bits(problem: Problem) -> None:
        run(problem)
        if problem.lse is not None:
            problem.lse.mul_(1.4427)

    run = cpu.run
    patch.setattr(cpu, "run", in_bits)


@fault
def rows_written_that_no_sequence_owns(patch: pytest.MonkeyPatch) -> None:
    def all_rows(problem: Problem) -> None:
        if problem.cu_seqlens_q is not None:
            problem.out.zero_()
        run(problem)

    run = cpu.run
    patch.setattr(cpu, "run", all_rows)


@fault
def a_cache_written_to(patch: pytest.MonkeyPatch) -> None:
    def mark(problem: Problem) -> None:
        run(problem)
        if isinstance(problem.keys, cache.PagedKeys):
            problem.keys.cache.k[-1, 0, 0, 0] = 1

    run = cpu.run
    patch.setattr(cpu, "run", mark)


@fault
def bits_that_follow_the_bounds(patch: pytest.MonkeyPatch) -> None:
    with_problems(
        patch, lambda problem: replace(problem, scale=problem.scale * (1 + 1e-6 * (problem.max_kv_len // 64 % 2)))
    )


@fault
def results_remembered(patch: pytest.MonkeyPatch) -> None:
    """A second call of a signature gets what the first one had."""

    def recalled(problem: Problem) -> None:
        run(problem)
        memo = {} if problem.memo is None else problem.memo
        problem.out.copy_(memo.setdefault("result", problem.out.clone()))

    run = cpu.run
    patch.setattr(cpu, "run", recalled)


@fault
def a_nan_that_spreads(patch: pytest.MonkeyPatch) -> None:
    def spread(problem: Problem) -> None:
        run(problem)
        if problem.out.isnan().any():
            problem.out.fill_(torch.nan)

    run = cpu.run
    patch.setattr(cpu, "run", spread)


@fault
def halves_rounded_up(patch: pytest.MonkeyPatch) -> None:
    def quantise(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        unit = 1.0 if scale is None else scale.float()
        stored = (x.float() / unit).clamp(-127, 127)
        return (stored + 1e-3).round().to(dtype) if dtype == torch.int8 else stored.to(dtype)

    patch.setattr(append, "quantise", quantise)


@fault
def tokens_written_to_slots_outside(patch: pytest.MonkeyPatch) -> None:
    run = append.run
    patch.setattr(append, "run", lambda case: run(replace(case, slot_mapping=case.slot_mapping.clamp(min=0))))


@fault
def junk_merged(patch: pytest.MonkeyPatch) -> None:
    def plain(case: Any) -> None:
        case.lse.copy_(torch.logaddexp(case.lse_a, case.lse_b))
        share_a, share_b = (torch.exp(part - case.lse)[..., None] for part in (case.lse_a, case.lse_b))
        case.out.copy_(share_a * case.out_a.float() + share_b * case.out_b.float())

    patch.setattr(merge, "run", plain)


@fault
def slots_one_further(patch: pytest.MonkeyPatch) -> None:
    locate = slots.locate_slots

    def one_further(table: PageTable, seq_lens: torch.Tensor, *rest: Any) -> torch.Tensor:
        return locate(table, seq_lens + 1, *rest)

    patch.setattr(slots, "locate_slots", one_further)
