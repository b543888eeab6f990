"""What one launch is for: a call on a target, or a share of its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from swath.backends.triton.features import Features, features_of
from swath.problem import Problem
from swath.target import Target


@dataclass(frozen=True)
class Copied:
    """Features of tiles over a copy of 8-bit keys: granularities of scales that it lacks, and products in 8 bits."""

    k_fold: str
    v_fold: str
    dots: str
    v_e4m3: bool


@dataclass(frozen=True)
class Work:
    """A call as a launch sees it, with a positive scale, on a target.

    claimed: sequences of up to this many query tokens are another launch's.
    sources: operands that parameters of the kernel take by other names, such as keys that were copied first, and a
        ``claimed`` that the device finds out.
    copied: where the keys are a copy of 8-bit ones, what is different from keys stored so.
    """

    problem: Problem
    target: Target
    claimed: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    copied: Copied | None = None

    @cached_property
    def features(self) -> Features:
        """What its kernel is compiled for."""
        features = features_of(self.problem, self.target)
        return features if self.copied is None else replace(features, **vars(self.copied))
