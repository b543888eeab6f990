"""What the benchmark asks of a serving engine, and what it sees of one call of attention inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from swath.bench.serving.models import Model
from swath.cache import PagedKV

Logprobs = list[dict[int, float]]
"""Of one answer: for each token, the chosen one first, the likeliest tokens and their log-probabilities."""


@dataclass(frozen=True)
class Job:
    """One line of results: a model with some layers, over one kind of cache, on one attention backend of the engine.

    ``compiled``: the engine compiles the model between calls of attention, as vLLM does unless it is told otherwise.
    """

    model: Model
    layers: int
    cache: str
    backend: str
    compiled: bool = False

    @property
    def case(self) -> str:
        """What several backends can be compared on."""
        return f"{self.model.name} {self.layers} layers {self.cache}{' compiled' * self.compiled}"


@dataclass(frozen=True)
class Load:
    """The traffic: prompts of random tokens.

    - prompts, prompt_len: of the prefill, one answer token each
    - sequences, context: of the decode, new_tokens each
    """

    prompts: int = 8
    prompt_len: int = 16_384
    sequences: int = 64
    context: int = 8192
    new_tokens: int = 96

    @property
    def longest(self) -> int:
        """Tokens of a sequence, its answer included, with room to spare."""
        return max(self.prompt_len, self.context) + max(self.new_tokens, 256)

    def __str__(self) -> str:
        decode = f"{self.sequences} x {self.new_tokens} tokens after {self.context}"
        return f"prefill {self.prompts} x {self.prompt_len}, decode {decode}"


@dataclass(frozen=True, eq=False)
class Call:
    """Attention of one layer in one step, after it ran.

    - q, out: [T, Hq, D]; q_scale: a scale that q is stored with, or None
    - cache: what the backend read, with whatever scales it has
    - block_table [B, pages], seq_lens [B], cu_seqlens_q [B + 1]
    - size: keys in the layer's window, the query's own included, or None
    - left_out: the oldest keys of the window that the backend is known not to see
    - scale, sink: as ``paged_attention`` takes them
    """

    q: Tensor
    out: Tensor
    cache: PagedKV
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    size: int | None
    scale: float
    sink: Tensor | None = None
    q_scale: Tensor | None = None
    left_out: int = 0


class Runner(Protocol):
    """How an engine is started: a module of this package."""

    FORKS: bool
    """Whether processes may be copied from one that has prepared."""

    def prepare(self) -> str:
        """Import the engine; it may be called again. Its name and release."""

    def served(self, _job: Job, /) -> Job:
        """The job as this engine serves it."""

    def start(self, _job: Job, _load: Load, /) -> Engine:
        """An engine for one job. The process is good for one."""


class Engine(Protocol):
    """An engine that has started with one job's model, and takes requests in this process."""

    version: str
    """Its name and release."""
    graphs: str
    """Which steps run as CUDA graphs."""

    @property
    def is_busy(self) -> bool:
        """Whether requests are unfinished."""

    def add(self, _prompt: Sequence[int], _new_tokens: int, /) -> None:
        """Take a prompt, to be answered by exactly ``_new_tokens`` greedy tokens."""

    def step(self) -> Mapping[str, int]:
        """Go on by one step; how many tokens came, by request."""

    def logprobs(self, _prompts: Sequence[Sequence[int]], _new_tokens: int, /) -> list[Logprobs]:
        """The greedy answers to prompts that run together, ``_new_tokens`` each."""

    def watched(self, _look: Callable[[Call], None], /) -> AbstractContextManager[None]:
        """Within it the function sees every call of attention that runs outside CUDA graphs."""
