"""Two result files side by side: what became faster, what slower, what is gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swath.bench.judge import is_ours, tie_of
from swath.bench.results import Row, measured


@dataclass(frozen=True)
class Change:
    """One case and provider in both files. ratio: the second time over the first; None where it has none any more."""

    case: str
    provider: str
    op: str
    before_us: float
    after_us: float | None

    @property
    def ratio(self) -> float | None:
        """Below 1: faster."""
        return None if self.after_us is None else self.after_us / self.before_us

    @property
    def verdict(self) -> str:
        """In a word, a difference within the tie of the case's op being none."""
        if self.ratio is None:
            return "gone"
        tie = tie_of(self.op)
        return "same" if abs(self.ratio - 1) <= tie else "slower" if self.ratio > 1 else "faster"

    def loses(self, threshold: float) -> bool:
        """Whether a backend of ours lost more than this share of its time, or its result."""
        return is_ours(self.provider) and (self.ratio is None or self.ratio > 1 + threshold)


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Of every row measured before whose case the second file knows; the order is the first file's.

    A row that the second file tried and gave no time counts as gone; cases that it never tried are left out.
    """
    first, later = measured(before), list(after)
    second = measured(later)
    tried = {(row.case, row.provider) for row in later}
    return [
        Change(*key, row.op, row.us, second[key].us if key in second else None)
        for key, row in first.items()
        if key in tried
    ]
