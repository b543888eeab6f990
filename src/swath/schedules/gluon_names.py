"""Names of Gluon that differ between the releases of Triton: 3.6 has the older ones, 3.9 the newer ones only."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Ask for a box: (descriptor, coordinates, barrier that counts its bytes, destination)."""

_Shared = gl.shared_memory_descriptor
reinterpret = _Shared.reinterpret if hasattr(_Shared, "reinterpret") else _Shared._reinterpret
"""The same shared memory under another (descriptor, dtype, shape, layout)."""
