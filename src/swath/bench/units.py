"""Times for people."""

from __future__ import annotations

MS = 1000.0


def in_words(us: float) -> str:
    """Four digits in the unit that suits: "481.8 us", "3.037 ms"."""
    scale, unit = unit_of(us)
    return f"{us / scale:.4g} {unit}"


def unit_of(us: float) -> tuple[float, str]:
    """Microseconds of a unit, and its name: ms from a millisecond on."""
    return (MS, "ms") if us >= MS else (1.0, "us")
