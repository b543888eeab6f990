"""Paged attention on Hopper: prefill tiles that keep its tensor cores busy; the rest is the triton backend's."""

from swath.schedules.hopper import plan, run, warm, why_not

__all__ = ["plan", "run", "warm", "why_not"]
