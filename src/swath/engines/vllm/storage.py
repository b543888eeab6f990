"""vLLM's KV cache dtypes: what the tensor of a layer holds, and how swath reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.engines import common
from swath.engines.vllm.versions import STATIC_INT8


class Storage(NamedTuple):
    """What a KV cache dtype stores: the dtype, None for the model's, and "none", "static" or "token" scales."""

    dtype: torch.dtype | None
    scales: str

    def view(self, kv: Tensor, head_size: int, k_scale: Tensor, v_scale: Tensor) -> PagedKV:
        """A layer's tensor [pages, Hkv, page_size, content] as a cache.

        ``k_scale``, ``v_scale``: the layer's static scales, one or [Hkv]. Token scales lie in the pages.
        """
        dtype = self.dtype or kv.dtype
        if self.scales == "token":
            return common.planar_cache(kv, head_size, dtype)
        v_head_dim = kv.shape[3] - head_size
        if self.scales == "none":
            return common.rows_cache(kv, dtype, v_head_dim=v_head_dim)
        k_scale, v_scale = (x.reshape(()) if x.numel() == 1 else x for x in (k_scale, v_scale))
        return common.rows_cache(kv, dtype, v_head_dim=v_head_dim, k_scale=k_scale, v_scale=v_scale)


STORAGE: Mapping[str, Storage] = {
    **dict.fromkeys(("auto", "float16", "bfloat16"), Storage(None, "none")),
    **dict.fromkeys(("fp8", "fp8_e4m3"), Storage(torch.float8_e4m3fn, "static")),
    "fp8_e5m2": Storage(torch.float8_e5m2, "static"),
    "fp8_per_token_head": Storage(torch.float8_e4m3fn, "token"),
    "int8_per_token_head": Storage(torch.int8, "token"),
    STATIC_INT8: Storage(torch.int8, "static"),
}
WIDE = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes that must be the model's."""
