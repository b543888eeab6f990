"""What a provider is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from swath.bench.case import BenchCase, stored_name
from swath.bench.inputs import Inputs
from swath.bench.machine import version_of


@dataclass(frozen=True)
class Provider:
    """Someone who computes cases.

    Args:
        name: in results.
        why_not: the reason it cannot do a case, or None; what it needs installed is not asked there.
        prepare: makes the call that is timed, everything that a server does once made before: plans, layouts, masks.
            The call returns out with rows as q's, [..., Hq, Dv].
        module: what must be importable. package: whose version is printed; both None for torch and swath.
        devices: whose tensors it takes. launch: of swath's own, the launch of a call in words.
        p_e4m3: whether it rounds p to e4m3 before the product with V: its error budget is then that of e4m3 products.
        builds: whether it compiles for many seconds before its first call: ``--quick`` leaves it out unless named.
    """

    name: str
    why_not: Callable[[BenchCase], str | None]
    prepare: Callable[[Inputs], Callable[[], Tensor]]
    module: str | None = None
    package: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    launch: Callable[[Inputs], str] | None = None
    builds: bool = False
    p_e4m3: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it can do nothing on this machine, or None."""
        if self.module is not None and not _has(self.module):
            return f"{self.package or self.module} is not installed"
        return None if device.type in self.devices else f"takes {' or '.join(self.devices)} tensors only"

    @cached_property
    def version(self) -> str | None:
        """Of its package."""
        return None if self.package is None else version_of(self.package)


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def first_of(*reasons: tuple[bool, str]) -> str | None:
    """The text of the first reason that holds."""
    return next((text for holds, text in reasons if holds), None)


def features(
    case: BenchCase, *, sink: bool = False, stored: tuple[str, ...] = (), head_dim: int = 256, narrow: bool = False,
    ranges: type | tuple[type, ...] = (), fp8_q: bool = False, computes: tuple[str, ...] = ("float",),
) -> str | None:  # fmt: skip
    """The reason that most peers share.

    No leading tokens, no sinks unless said, no 8-bit cache unless ``stored``, no heads beyond ``head_dim``, no values
    narrower than keys unless ``narrow``, no bounds of rows but by rules of the types ``ranges``, no fp8 queries
    unless ``fp8_q``, and no ``compute`` but ``computes``.
    """
    name = stored_name(case.storage)
    return first_of(
        (case.dtype == torch.float8_e4m3fn and not fp8_q, "has no fp8 queries"),
        (case.head_dim > head_dim, f"has heads of up to {head_dim}"),
        (case.v_dim != case.head_dim and not narrow, "has values as wide as keys only"),
        (case.global_tokens != 0, "has no leading tokens"),
        (bool(case.ranges) and not isinstance(case.ranges, ranges), f"has no {case.ranges}"),
        (case.has_sink and not sink, "has no sinks"),
        (case.compute not in computes, f"has no compute={case.compute!r}"),
        (case.storage.is_quantised and name not in stored, f"has no cache of {name}"),
    )
