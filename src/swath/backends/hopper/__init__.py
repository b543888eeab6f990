"""Prefill, and decode where that is faster, on sm_90, in Gluon; everything else is handed to ``triton``.

A GPU with tiles of its own is a folder like this one, and its name stands in ``dispatch.BACKENDS``:

- ``heuristics.py``: launch rows of its tiles, and an instance of a class that extends ``Heuristics``
  (backends/triton/heuristics) by the function that chooses one for a ``Work``. Other rules of ``Heuristics`` may be
  replaced there, such as which sequences are left to splits.
- ``kernel.py`` and what belongs to it. What Gluon kernels of all GPUs share is in backends/gluon.
- ``plan.py``: the function that makes a ``KernelCall`` of the kernel from a work, its scratch and the heuristics. The
  planner (backends/triton/plan.py) calls it for what has 16-bit keys; splits, their reduce, the copy of 8-bit pages and
  Triton's tiles come from there.
- ``attention.py``: ``why_not``, and a ``Runner`` (backends/triton/attention.py) that has the name, the heuristics and
  that function, for ``plan``, ``warm`` and ``run``. Neither this file nor ``heuristics.py`` imports Triton.

``swath bench tune`` searches its rows once bench/tune.py names its runner, its kernel and what to vary.
"""
