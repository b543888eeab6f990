"""Serving benchmarks: a model of real shapes and random weights, served by a real engine on one attention backend."""
