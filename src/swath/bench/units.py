"""Times for people."""

from __future__ import annotations

MS = 1000.0


def in_words(us: float, digits: int = 4) -> str:
    """In the unit that suits: "481.8 us", "3.037 ms"."""
    scale, unit = unit_of(us)
    return f"{number(us / scale, digits)} {unit}"


def number(x: float, digits: int = 4) -> str:
    """With that many digits, or all that stand before the point."""
    return f"{x:.0f}" if x >= 10**digits else f"{x:.{digits}g}"


def unit_of(us: float) -> tuple[float, str]:
    """Microseconds of a unit, and its name: ms from a millisecond on."""
    return (MS, "ms") if us >= MS else (1.0, "us")
