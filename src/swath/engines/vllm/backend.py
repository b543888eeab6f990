"""What swath answers when vLLM chooses a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

try:
    from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
    from vllm.v1.kv_cache_interface import KVCacheLayout
except ImportError as error:
    raise ImportError("swath needs vLLM 0.32 or newer, whose caches have a layout by name") from error

from swath.engines.common import SCALE_DTYPE
from swath.engines.vllm.builder import SwathBuilder
from swath.engines.vllm.impl import SwathImpl, takes_head_size
from swath.engines.vllm.storage import STORAGE, WIDE
from swath.errors import bad_value

PREFERRED_PAGE = 64
"""Tokens. Hopper loads keys in boxes of up to 64 rows, and a box never spans two pages."""


class SwathBackend(AttentionBackend):  # type: ignore[misc]  # vLLM ships no types
    """What it cannot do is refused here, or by a layer's constructor, while the engine starts."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(STORAGE)

    @staticmethod
    def get_name() -> str:
        """The name that the registry has for it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """The attention of a layer."""
        return SwathImpl

    @staticmethod
    def get_builder_cls() -> type:
        """The maker of metadata."""
        return SwathBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens in a page."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens in a page, where the user does not say."""
        return max(default_block_size, PREFERRED_PAGE)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Layouts that keep the bytes of a page together."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages of per-token-head caches have room for a float32 scale of each row of K and of V."""
        if spec.head_size_v > spec.head_size or not takes_head_size(spec.head_size_v):
            raise bad_value("head_size_v", f"a multiple of 8, at most {spec.head_size}, as keys have", spec.head_size_v)
        if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_per_token_head:
            return spec
        return replace(spec, state_content_bytes=spec.head_size + spec.head_size_v + 2 * SCALE_DTYPE.itemsize)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Elements of a head."""
        return takes_head_size(head_size)

    @classmethod
    def supports_sink(cls) -> bool:
        """Logits that join the softmax's denominator (gpt-oss)."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows."""
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        """Windows with leading tokens that stay visible, a count for each request."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images in a prompt whose tokens see one another both ways (Gemma 3)."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Attention to later keys too, with a window to both sides if there is one."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """The same bits in any batch."""
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """A static scale for each kv head."""
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only: other kinds have no paged cache."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **named: Any
    ) -> str | None:
        """An unquantised cache has the dtype of the model."""
        if kv_cache_dtype in WIDE and WIDE[kv_cache_dtype] != dtype:
            return f"swath: a {kv_cache_dtype} cache needs {kv_cache_dtype} queries, not {dtype}"
        return None
