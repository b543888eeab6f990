"""What the kernel is compiled for, as one constexpr."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from swath.backends.hopper.heuristics import HopperLaunch
from swath.backends.triton.features import Features


@dataclass(frozen=True)
class Config(HopperLaunch):
    """A launch and the features of its call: ``C`` in the kernel's helpers.

    F: the features as a constexpr, which helpers that are shared with Triton's kernels take.
    """

    F: Any = field(kw_only=True)


@gluon.constexpr_function
def config_of(features: Features, launch: HopperLaunch) -> Config:
    """Both in one."""
    return Config(**vars(launch), F=gl.constexpr(features))
