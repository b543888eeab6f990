"""The environment in which vLLM runs in tests and in the servers that they start, set before vLLM is imported."""

from __future__ import annotations

import os

os.environ |= {
    "SWATH_VLLM_CPU": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip
