"""What is compiled while an engine starts is what its traffic needs, on an H200 that need not be here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_variants import tiles_of

from conftest import plan_for
from swath import KVQuant, PagedKV, target
from swath.backends.triton.arguments import operands_of
from swath.engines import warmup
from swath.engines.common import Layer, Step
from swath.engines.warmup import Traffic
from swath.ops import explain
from swath.problem import Problem
from swath.target import Target

pytestmark = pytest.mark.skipif(not target.has_triton(), reason="Triton is not installed")

PAGE, WIDTH = 16, 2048
INT8 = KVQuant(torch.int8, "token")
BF16 = KVQuant(torch.bfloat16)
SINK = torch.empty(8, device="meta")
MODELS = {
    "mistral": (BF16, 4, 2, 128, [Layer(4096)]),
    "mistral int8": (INT8, 4, 2, 128, [Layer(4096)]),
    "gpt-oss": (
        BF16,
        8,
        1,
        64,
        [Layer(128, sink=SINK), Layer(sink=SINK)],
    ),
    "gemma": (BF16, 2, 1, 256, [Layer(1024), Layer()]),
    "invariant": (BF16, 4, 2, 128, [Layer(4096, split_size=256)]),
}
"""Storage, query heads, kv heads, head_dim, and the layers that differ."""
TRAFFIC = Traffic(max_seqs=128, max_tokens=8192, max_kv_len=PAGE * WIDTH, steps=(1, 4))


def step_of(num_seqs: int, num_tokens: int, max_q_len: int, max_kv_len: int) -> Step:
    ints = torch.empty(num_seqs + 1, dtype=torch.int32, device="meta")
    table = torch.empty(num_seqs, WIDTH, dtype=torch.int32, device="meta")
    slots = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    return Step(table, ints[1:], slots, num_tokens, max_q_len, max_kv_len, ints)


def steps_of(*sizes: int) -> list[Step]:
    return [step_of(*sizes)]


def kernels(problem: Problem) -> Iterator[tuple[Any, ...]]:
    """What Triton compiles for a call on an H200: kernels, constants, options, and which tensors there are."""
    backend = tiles_of(problem, "sm_90")[-1]
    plan = plan_for(backend, problem, Target("sm_90", 132))
    operands = operands_of(problem) | plan.scratch.tensors("meta")
    for call in plan.calls:
        arguments = call.arguments(operands).items()
        compiled_for = (x if p.isupper() else getattr(x, "dtype", x is None) for p, x in arguments)
        yield (call.kernel.fn.__name__, *map(str, call.options.items()), *map(str, compiled_for))


def random_steps(number: int) -> Iterator[Step]:
    """Decode, prompts, chunks and mixtures of any size."""
    draw = random.Random(0)
    for _ in range(number):
        num_seqs = draw.randint(1, TRAFFIC.max_seqs)
        steps = draw.choice(TRAFFIC.steps)
        if draw.random() < 0.5:
            yield step_of(num_seqs, num_seqs * steps, steps, draw.randint(1, TRAFFIC.max_kv_len))
            continue
        longest = int(2 ** draw.uniform(1, 13))
        tokens = min(TRAFFIC.max_tokens, longest + draw.randint(0, num_seqs - 1) * draw.choice((1, 4, 40)))
        num_seqs = min(num_seqs, tokens - longest + 1)
        yield step_of(num_seqs, tokens, longest, draw.randint(longest, TRAFFIC.max_kv_len))


@pytest.mark.parametrize("model", MODELS)
def test_traffic_finds_its_kernels_compiled(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quant, num_q_heads, num_kv_heads, head_dim, layers = MODELS[model]
    cache = PagedKV.empty(quant, 2, num_kv_heads, PAGE, head_dim, device="meta")
    compiled: set[tuple[Any, ...]] = set()

    def compiling(op: Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        if op.__name__ == "paged_attention":
            compiled.update(kernels(explain.prepare(op, *args, **kwargs)))

    monkeypatch.setattr(warmup, "warmup", compiling)
    monkeypatch.setattr(warmup, "_warmed", set())
    warmup.warm([(layer, cache, num_q_heads) for layer in layers], torch.bfloat16, TRAFFIC, steps_of)
    assert warmup.warm([(layer, cache, num_q_heads) for layer in layers], torch.bfloat16, TRAFFIC, steps_of) == 0
    missing = set()
    for step in random_steps(150):
        for layer in layers:
            q = torch.empty(step.num_tokens, num_q_heads, head_dim, dtype=torch.bfloat16, device="meta")
            arguments, options = step.call(layer, q, cache, None)
            needed = set(kernels(explain.prepare("paged_attention", *arguments, **options)))
            missing |= needed - compiled
    assert not missing


def test_a_warm_plan_has_its_kernels_loaded() -> None:
    """Triton builds launchers and loads kernels when ``run`` is asked for, which the first call would wait for."""
    from swath.backends.triton.runtime import KernelCall, Plan

    loaded: list[str] = []

    class Compiled:
        @property
        def run(self) -> None:
            loaded.append("run")

    kernels = [SimpleNamespace(arg_names=[], warmup=lambda made=made, **_: made) for made in (Compiled(), None)]
    Plan([KernelCall(kernel, 1, {}, {}) for kernel in kernels]).load({})
    assert loaded == ["run"]
