"""Names of Gluon that differ between the releases of Triton: 3.6 has the older ones, 3.9 the newer ones only."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Ask for a box: (descriptor, coordinates, barrier that counts its bytes, destination)."""

store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
"""Write a box: (descriptor, coordinates, source), which ``tma.store_wait`` waits for to have been read."""

_Shared = gl.shared_memory_descriptor
reinterpret = _Shared.reinterpret if hasattr(_Shared, "reinterpret") else _Shared._reinterpret
"""The same shared memory under another (descriptor, dtype, shape, layout)."""
