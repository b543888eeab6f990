"""Machines without a GPU: float32 torch operations whose cost follows the window, not the context."""

from swath.schedules.blocks import plan, run, warm, why_not

__all__ = ["plan", "run", "warm", "why_not"]
