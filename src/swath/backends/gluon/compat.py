"""Functions of Gluon whose names differ between releases of Triton: 3.6 has the older names, 3.9 only the newer."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Start to load a TMA box: (descriptor, coordinates, mbarrier that counts its bytes, destination)."""

tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
"""Start to store a TMA box: (descriptor, coordinates, source). ``tma.store_wait`` waits until the source was read."""

_Shared = gl.shared_memory_descriptor
reinterpret = _Shared.reinterpret if hasattr(_Shared, "reinterpret") else _Shared._reinterpret
"""The same shared memory with another dtype, shape and layout: (descriptor, dtype, shape, layout)."""
