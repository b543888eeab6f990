"""Traffic for an engine: prompts of random tokens, and the clock of each step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from swath.bench.serving.engine import Engine
from swath.bench.serving.models import VOCABULARY

FIRST_TOKEN = 3
"""Smaller ones are special."""


@dataclass(frozen=True)
class Step:
    """A step of the engine.

    - seconds: since the requests came
    - tokens: new ones
    - has_all: every request has its first token by now
    """

    seconds: float
    tokens: int
    has_all: bool


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens, other ones for each prompt and seed."""
    generator = torch.Generator().manual_seed(seed)
    made: list[list[int]] = torch.randint(FIRST_TOKEN, VOCABULARY, (count, length), generator=generator).tolist()
    return made


def steps(engine: Engine, texts: list[list[int]], new_tokens: int) -> Iterator[Step]:
    """All requests at once, a step at a time until they are answered."""
    begin = time.perf_counter()
    for text in texts:
        engine.add(text, new_tokens)
    answered: set[str] = set()
    while engine.is_busy:
        came = engine.step()
        answered |= {request for request, tokens in came.items() if tokens}
        yield Step(time.perf_counter() - begin, sum(came.values()), len(answered) == len(texts))


def seconds(engine: Engine, texts: list[list[int]], new_tokens: int) -> float:
    """From the requests to the last token."""
    return [step.seconds for step in steps(engine, texts, new_tokens)][-1]
