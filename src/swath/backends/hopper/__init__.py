"""Prefill, and decode where that is faster, on sm_90, in Gluon; everything else is handed to ``triton``."""
