"""vLLM runs on swath: ``vllm serve MODEL --attention-backend CUSTOM``.

vLLM calls ``register`` in each of its processes, by the entry point that is installed with swath. Nothing of vLLM is
imported before that, and nothing of swath's kernels before a layer takes the backend.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm.swath")
"""Below vLLM's own, whose handlers and level it takes."""

BACKEND = "swath.engines.vllm.backend.SwathBackend"
ON_CPU = "SWATH_VLLM_CPU"
"""Set to 1: swath takes the place of CPU_ATTN too. vLLM's platform for CPUs has no other choice of a backend."""


def register() -> None:
    """Make swath the backend CUSTOM; it may be called any number of times."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from swath.engines.vllm.versions import register_int8

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if os.environ.get(ON_CPU) == "1":
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
    elif current_platform.is_cpu():
        logger.info("swath serves no layer: on a CPU vLLM ignores --attention-backend; set %s=1", ON_CPU)
    register_int8()
