"""``explain`` and ``warmup``: what a call would do, and compiling it before it must be fast."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch

from swath import dispatch
from swath.dispatch import Explanation
from swath.errors import bad_value
from swath.ops.append import APPEND_KV
from swath.ops.attention import ATTENTION
from swath.ops.merge import MERGE_STATES
from swath.ops.operator import Operator
from swath.ops.paged import PAGED_ATTENTION
from swath.ops.quantise import QUANTISE_Q

OPERATORS: dict[str, Operator[Any]] = {
    x.name: x for x in (ATTENTION, PAGED_ATTENTION, APPEND_KV, QUANTISE_Q, MERGE_STATES)
}
OPS = tuple(OPERATORS)
"""Names of the public functions that have backends."""
MOST_THREADS = 16
"""More of them wait for Python's lock, which the compiler's front end holds for nearly half of the time of a kernel."""


def explain(op: str | Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> Explanation:
    """Which backend and launch a call would take, and why not the others. Nothing runs.

    Args:
        op: "attention", "paged_attention", "append_kv", "quantise_q" or "merge_states", or the function itself.
        args, kwargs: the arguments of that function.

    Returns:
        An Explanation; print it.
    """
    operator = _resolve(op)
    return dispatch.explain_case(operator.name, operator.module, operator.prepare(*args, **kwargs), impl)


def prepare(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The checked call in the form that backends read, for callers that launch it in their own way.

    Args as for ``explain``.
    """
    return _resolve(op).prepare(*args, **kwargs)


def warmup(op: str | Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> None:
    """Compile all kernels that this call would launch, without running them: before a CUDA-graph capture, say.

    Args as for ``explain``. Lengths and window sizes are run-time values: one warm-up serves them all. A PageTable with
    ``rows`` is compiled for its number of rows.
    """
    operator = _resolve(op)
    case = operator.prepare(*args, **kwargs)
    dispatch.choose(operator.module, case, impl).warm(case)


@contextmanager
def in_threads(device: torch.device) -> Iterator[None]:
    """Within it ``warmup`` of calls on a GPU only begins to compile; at its end all kernels are compiled and loaded.

    What several calls need is compiled once. Errors of the compiler are raised at the end.
    """
    from triton import AsyncCompileMode

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS), initializer=begin) as pool:
        with AsyncCompileMode(pool, ignore_errors=True) as mode:  # they are raised below, where the mode is left
            yield
            compiling = list(mode.raw_futures)
        list(pool.map(_load, compiling))


def _load(compiling: Future[Any]) -> None:
    """Load a kernel, and build its launcher."""
    attrgetter("run")(compiling.result())


def _resolve(op: str | Callable[..., Any]) -> Operator[Any]:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise bad_value("op", f"one of {', '.join(map(repr, OPERATORS))}", repr(name))
    return OPERATORS[name]
