"""A simpler call that fails in the same way: fewer twists, sequences and options, shorter lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from swath.testing.cases import Case
from swath.testing.fuzz.draw import Call, Fields

DEFAULTS: Fields = {f.name: f.default for f in fields(Case)}

SHAPE = ("kv_lens", "q_lens", "dense", "num_kv_heads", "group")
"""Fields that are made smaller, not put back."""

TOGETHER: tuple[tuple[str, ...], ...] = (
    ("global_tokens", "max_global_tokens"),
    ("quant", "scale_dtype", "q_scale", "compute", "dtype"),
    *((name,) for name in DEFAULTS if name not in SHAPE),
)
"""Fields that go back to their defaults, those of a line together."""


def shrunk(call: Call, fails: Callable[[Call], bool], tries: int) -> Call:
    """The simplest call found by at most ``tries`` calls of ``fails``."""
    seen = {call}
    while True:
        for simpler in candidates(call):
            if simpler in seen:
                continue
            if tries == 0:
                return call
            tries -= 1
            seen.add(simpler)
            if fails(simpler):
                call = simpler
                break
        else:
            return call


def candidates(call: Call) -> Iterator[Call]:
    """Calls one step simpler, the largest steps first."""
    for name in call.twists:
        yield replace(call, twists=tuple(t for t in call.twists if t != name))
    for case in cases(call.case):
        yield replace(call, case=case)


def cases(case: Case) -> Iterator[Case]:
    """Cases one step simpler."""
    count = case.num_seqs
    if count > 1:
        for kept in (range(count // 2), range(count // 2, count), *([b] for b in range(count))):
            yield of_sequences(case, list(kept))
    for names in TOGETHER:
        if any(getattr(case, name) != DEFAULTS[name] for name in names):
            yield replace(case, **{name: DEFAULTS[name] for name in names})
    if case.num_kv_heads > 1:
        yield replace(case, num_kv_heads=1)
    if case.group > 1:
        yield replace(case, group=1)
    for b, n in enumerate(case.kv_lens):
        for shorter in {n // 2, n - 1}:
            if n > 0:
                yield replace(case, kv_lens=_with(case.kv_lens, b, shorter))
    if isinstance(case.q_lens, int):
        if case.q_lens > 1:
            yield from (replace(case, q_lens=steps) for steps in {1, case.q_lens // 2, case.q_lens - 1})
        return
    for b, n in enumerate(case.q_lens):
        for fewer in {n // 2, n - 1}:
            if n > 0:
                yield replace(case, q_lens=_with(case.q_lens, b, fewer))


def of_sequences(case: Case, kept: list[int]) -> Case:
    """The case with some of its sequences."""
    made: Fields = {}
    for name in ("kv_lens", "q_lens", "q_start", "global_tokens"):
        value = getattr(case, name)
        if isinstance(value, tuple):
            made[name] = tuple(value[b] for b in kept)
    return replace(case, **made)


def _with(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])
