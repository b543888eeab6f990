"""Which backend runs a call: the first whose ``why_not`` is None, or the one that ``impl=`` names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, cast

from swath.errors import bad_value

BACKENDS = ("hopper", "triton", "cpu", "reference")
"""In the order that ``impl="auto"`` asks them: fastest first."""


class Backend(Protocol):
    """What a backend offers for an operator: the module swath/backends/<backend>/<operator>.py."""

    def why_not(self, case: Any) -> str | None:
        """The reason this backend cannot run the case, or None."""

    def run(self, case: Any) -> None:
        """Run the case; results go where the case says."""

    def plan(self, case: Any) -> str:
        """The launch in words, for ``explain``."""

    def warm(self, case: Any) -> None:
        """Compile what ``run`` would launch, without running it."""


@cache
def backends(op: str) -> dict[str, Backend]:
    """The backends that exist for an op, fastest first."""
    names = [n for n in BACKENDS if find_spec(f"{__package__}.backends.{n}.{op}") is not None]
    return {n: cast(Backend, importlib.import_module(f"{__package__}.backends.{n}.{op}")) for n in names}


def check_impl(op: str, impl: object) -> dict[str, Backend]:
    """The backends of an op, of which ``impl`` must be one, or "auto".

    Raises:
        ValueError: naming ``impl``.
    """
    found = backends(op)
    if not isinstance(impl, str) or impl not in ("auto", *found):
        raise bad_value("impl", f"'auto' or one of {', '.join(map(repr, found))}", repr(impl))
    return found


def choose(op: str, case: Any, impl: str) -> Backend:
    """The backend that runs ``case``.

    Raises:
        ValueError: ``impl`` is no backend of this op, cannot run the case (its reason is the message), or "auto"
            found none.
    """
    found = check_impl(op, impl)
    if impl == "auto":
        for backend in found.values():
            if backend.why_not(case) is None:
                return backend
        raise bad_value("impl", "a backend that can run this call", reasons(op, case))
    reason = found[impl].why_not(case)
    if reason is not None:
        raise bad_value("impl", f"a backend that can run this call; {impl!r} cannot", reason)
    return found[impl]


def ready(backend: Backend, case: Any, arguments: tuple[Any, ...]) -> Callable[[Sequence[Any]], bool] | None:
    """How a backend launches further calls like ``case``, which ran, from their arguments alone: True where it did.

    None for a backend that has no module function ``ready``, or where that is not possible.

    arguments: those of the public function in their order, and behind them the outputs.
    """
    make = getattr(backend, "ready", None)
    return None if make is None else make(case, arguments)


def reasons(op: str, case: Any) -> dict[str, str | None]:
    """Every backend of the op with its reason against the case (None: it can run it)."""
    return {name: backend.why_not(case) for name, backend in backends(op).items()}


@dataclass(frozen=True)
class Explanation:
    """What a call would do: the backend chosen, its launch in words, and why not the others."""

    op: str
    impl: str
    backend: str | None
    launch: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        none = "no backend can run this call" if self.impl == "auto" else f"{self.impl} cannot run this call"
        lines = [f"{self.op}: {self.backend or none}"]
        if self.launch:
            lines.append(f"  launch     {self.launch}")
        for name, reason in self.reasons.items():
            lines.append(f"  {name:<10} {'can run it' if reason is None else reason}")
        return "\n".join(lines)


def explain_case(name: str, op: str, case: Any, impl: str) -> Explanation:
    """Explain a call of the public function ``name`` without raising for a backend that cannot run the case.

    Raises:
        ValueError: ``impl`` is no backend of this op.
    """
    check_impl(op, impl)
    why = reasons(op, case)
    able = [backend for backend, reason in why.items() if reason is None and impl in ("auto", backend)]
    launch = backends(op)[able[0]].plan(case) if able else ""
    return Explanation(name, impl, able[0] if able else None, launch, why)
