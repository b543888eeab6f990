"""What an engine computes is checked before it is timed.

Every kind of layer in every kind of step is looked at: rows of its output are held to the float64 oracle of
``swath.testing`` over the engine's own cache. Decode in CUDA graphs, where nothing can look, must answer as decode
outside them does.
"""

from __future__ import annotations

from collections import Counter

import torch

from swath.bench.serving.engine import Call, Engine, Job, Logprobs
from swath.bench.serving.traffic import prompts
from swath.testing import Arithmetic, budget_used, oracle

CALLS = 16
"""Calls that are looked at, of a kind of layer in a kind of step."""
EVERY = 2
"""Only every second call is looked at, so that those are of more steps."""
LENGTHS = (5, 33, 150, 1000, 9000, 14_000)
"""Together more than the tokens of a step, so that one prompt comes in chunks."""
SHORT = 7
NEW_TOKENS = 8
COARSE = 0.1
"""The largest relative error of another backend: it may round more coarsely than our budget allows."""
NEAR = 0.5
"""The largest difference of log-probabilities between graphs and no graphs, for models without routing."""


class Checker:
    """Looks at calls of attention. ``error`` is relative to a row's norm, ``budget_used`` of its worst element.

    ``where`` says in which kind of call the error was largest.
    """

    def __init__(self) -> None:
        self.error = self.budget_used = 0.0
        self.where = ""
        self.seen: Counter[tuple[int | None, bool]] = Counter()
        self.looked = 0
        self._generator = torch.Generator().manual_seed(1)

    def look(self, call: Call) -> None:
        """Judge the last row of the longest sequence and a random row, if it is this call's turn."""
        bounds, kv_lens = call.cu_seqlens_q.tolist(), call.seq_lens.tolist()
        owners = [b for b, n in enumerate(kv_lens) if n and bounds[b + 1] > bounds[b]]
        if not owners:
            return
        kind = (call.size, all(bounds[b + 1] - bounds[b] == 1 for b in owners))
        self.seen[kind] += 1
        if self.seen[kind] % EVERY or self.seen[kind] > CALLS * EVERY:
            return
        self.looked += 1
        longest = max(owners, key=lambda b: kv_lens[b])
        chance = owners[self._below(len(owners))]
        before = self.error
        self._judge(call, longest, bounds[longest + 1] - 1, kv_lens[longest] - 1)
        row = bounds[chance] + self._below(bounds[chance + 1] - bounds[chance])
        self._judge(call, chance, row, kv_lens[chance] - (bounds[chance + 1] - row))
        if self.error > before:
            window = f"window {call.size}" if call.size else "no window"
            self.where = f"{'decode' if kind[1] else 'prefill'}, {window}"

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._generator))

    def _judge(self, call: Call, b: int, row: int, position: int) -> None:
        """The row of sequence ``b`` whose query stands at ``position``."""
        cache, out = call.cache, call.out[row : row + 1]
        whole = torch.tensor([0, 1])
        truth = oracle.paged(
            call.q[row : row + 1], cache.k, cache.v, cache.k_scale, cache.v_scale, call.block_table[b : b + 1],
            call.seq_lens[b : b + 1], cu_seqlens_q=whole, q_start=whole[:1] + position,
            size=None if call.size is None else call.size - call.left_out,
            scale=call.scale, sink=call.sink, q_scale=call.q_scale,
        )  # fmt: skip
        off = (out.double() - truth.out).norm(dim=-1) / truth.out.norm(dim=-1).clamp(min=1e-30)
        self.error = max(self.error, float(off.nan_to_num(nan=torch.inf).max()))
        self.budget_used = max(self.budget_used, budget_used(out, None, truth, Arithmetic(cache.quant)))


def check(engine: Engine, job: Job, most_graphed: int) -> tuple[Checker, float, str | None]:
    """The checker, how far answers with and without graphs differ, and what is wrong with them, if anything is.

    ``most_graphed``: requests of one step up to which decode runs in graphs.
    """
    texts = [text for i, n in enumerate(LENGTHS) for text in prompts(1, n, 1000 + i)]
    more = prompts(most_graphed + 1 - len(texts), SHORT, 2000)
    checker = Checker()
    with engine.watched(checker.look):
        plain = engine.logprobs([*texts, *more], NEW_TOKENS)[: len(texts)]
    graphed = engine.logprobs(texts, NEW_TOKENS)
    apart = max(map(difference, plain, graphed))
    return checker, apart, fault(checker, apart, job)


def fault(checker: Checker, apart: float, job: Job) -> str | None:
    """Why the engine's results may not be timed."""
    if checker.seen.keys() != {(size, is_decode) for size, _ in checker.seen for is_decode in (True, False)}:
        return f"the checks did not see decode and prefill of every kind of layer: {sorted(checker.seen)}"
    if job.backend == "swath" and not checker.budget_used <= 1:
        used = f"{checker.budget_used:.3g} of its error budget (error {checker.error:.1e}; {checker.where})"
        return f"a sampled row of attention uses {used}"
    if not checker.error <= COARSE:
        return f"a sampled row of attention has an error of {checker.error:.1e} ({checker.where})"
    if job.model.is_dense and not apart <= NEAR:
        return f"log-probabilities with and without CUDA graphs are {apart:.2g} apart"
    return None


def difference(one: Logprobs, other: Logprobs) -> float:
    """The largest difference of the log-probability of a token that both have, up to where answers part."""
    worst = 0.0
    for first, second in zip(one, other, strict=True):
        both = first.keys() & second.keys()
        worst = max([worst, *(abs(first[token] - second[token]) for token in both)])
        if next(iter(first)) != next(iter(second)):
            return worst if both else float("inf")
    return worst
