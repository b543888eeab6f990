"""Dense attention in Triton: every option, on every GPU that Triton has."""

from swath.schedules.gpu import plan, run, warm, why_not

__all__ = ["plan", "run", "warm", "why_not"]
