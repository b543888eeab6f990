"""Benchmarks: each states what it is measured against and what ratio it should reach."""
