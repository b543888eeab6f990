"""Dense attention as the formula says: the truth, in float64."""

from swath.schedules.rows import plan, run, warm, why_not

__all__ = ["plan", "run", "warm", "why_not"]
