"""Machines without a GPU: float32 torch operations whose cost follows the window, not the context."""
