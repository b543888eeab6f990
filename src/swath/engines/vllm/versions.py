"""What differs between the releases of vLLM that swath supports, in one place."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import cache as cache_config

STATIC_INT8 = "int8"
"""The KV cache dtype that swath adds: one static scale a layer."""


def register_int8() -> None:
    """Let ``--kv-cache-dtype int8`` be asked for, where vLLM takes dtypes of others (0.33 and later)."""
    register: Any = getattr(cache_config, "register_kv_cache_dtype", None)
    if register is None or STATIC_INT8 in cache_config.KV_CACHE_DTYPES:
        return
    from vllm.v1.kv_cache_interface import KVQuantMode

    class StaticInt8:
        """A value a byte and a scale a layer, as fp8 has them. (CUSTOM is no mode of its own in 0.33: it has the number
        of OCTAVE_K3V4.)"""

        name = STATIC_INT8

        def torch_dtype(self) -> torch.dtype:
            """What the cache holds."""
            return torch.int8

        def quant_mode(self) -> Any:
            """What vLLM's own code takes it for."""
            return KVQuantMode.FP8_PER_TENSOR

    register(STATIC_INT8)(StaticInt8)
