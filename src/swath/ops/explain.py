"""``explain`` and ``warmup``: what a call would do, and compiling it before it must be fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swath import dispatch
from swath.dispatch import Explanation
from swath.errors import bad_value
from swath.ops.append import APPEND_KV
from swath.ops.attention import ATTENTION
from swath.ops.merge import MERGE_STATES
from swath.ops.operator import Operator
from swath.ops.paged import PAGED_ATTENTION

OPERATORS: dict[str, Operator[Any]] = {x.name: x for x in (ATTENTION, PAGED_ATTENTION, APPEND_KV, MERGE_STATES)}
OPS = tuple(OPERATORS)
"""Names of the public functions that have backends."""


def explain(op: str | Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> Explanation:
    """Which backend and launch a call would take, and why not the others. Nothing runs.

    Args:
        op: "attention", "paged_attention", "append_kv" or "merge_states", or the function itself.
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


def _resolve(op: str | Callable[..., Any]) -> Operator[Any]:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise bad_value("op", f"one of {', '.join(map(repr, OPERATORS))}", repr(name))
    return OPERATORS[name]
