"""How work is cut: rows (reference), blocks (cpu), tiles, splits and reduce (Triton)."""
