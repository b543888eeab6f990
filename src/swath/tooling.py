"""``explain`` and ``warmup``: what a call would do, and compiling it before it must be fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swath import dispatch
from swath.dispatch import Explanation
from swath.errors import bad_value
from swath.ops.append import call as append_call
from swath.ops.attention import call as attention_call
from swath.ops.merge import call as merge_call
from swath.ops.paged import call as paged_call

_CALLS: dict[str, Any] = {
    "attention": attention_call,
    "paged_attention": paged_call,
    "append_kv": append_call,
    "merge_states": merge_call,
}
OPS = tuple(_CALLS)
"""Names of the public functions that have backends."""


def explain(op: str | Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> Explanation:
    """Which backend and launch a call would take, and why not the others. Nothing runs.

    Args:
        op: "attention", "paged_attention", "append_kv" or "merge_states", or the function itself.
        args, kwargs: the arguments of that function.

    Returns:
        An Explanation; print it.
    """
    case_of = _resolve(op)
    return dispatch.explain_case(case_of.OP, case_of.prepare(*args, **kwargs), impl)


def prepare(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The checked call in the form that backends read, for who launches it otherwise than they would.

    Args as for ``explain``.
    """
    return _resolve(op).prepare(*args, **kwargs)


def warmup(op: str | Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> None:
    """Compile all kernels that this call would launch, without running them: before a CUDA-graph capture, say.

    Args as for ``explain``. Lengths and window sizes are run-time values: one warm-up serves them all.
    """
    case_of = _resolve(op)
    case = case_of.prepare(*args, **kwargs)
    dispatch.choose(case_of.OP, case, impl).warm(case)


def _resolve(op: str | Callable[..., Any]) -> Any:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _CALLS:
        raise bad_value("op", f"one of {', '.join(map(repr, _CALLS))}", repr(name))
    return _CALLS[name]
