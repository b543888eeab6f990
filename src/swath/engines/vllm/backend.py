"""The attention backend: what it can do, the metadata of a step, and a layer's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm import envs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from swath.cache import PagedKV
from swath.engines import common
from swath.engines.common import Layer, Step
from swath.engines.vllm.versions import STATIC_INT8
from swath.errors import bad_value
from swath.ops.arguments import MAX_HEAD_DIM

BATCH_INVARIANT_SPLIT = 256
"""Keys between two cuts of a sequence where a result may not depend on the batch."""


class Storage(NamedTuple):
    """What a KV cache dtype of vLLM stores: the dtype, None for the model's; and "none", "static" or "token" scales."""

    dtype: torch.dtype | None
    scales: str


STORAGE: Mapping[str, Storage] = {
    **dict.fromkeys(("auto", "float16", "bfloat16"), Storage(None, "none")),
    **dict.fromkeys(("fp8", "fp8_e4m3"), Storage(torch.float8_e4m3fn, "static")),
    "fp8_e5m2": Storage(torch.float8_e5m2, "static"),
    "fp8_per_token_head": Storage(torch.float8_e4m3fn, "token"),
    "int8_per_token_head": Storage(torch.int8, "token"),
    STATIC_INT8: Storage(torch.int8, "static"),
}
WIDE = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class SwathBackend(AttentionBackend):  # type: ignore[misc]  # vLLM ships no types
    """What swath answers when vLLM chooses a backend. What it cannot do is refused here or in the layer's constructor,
    while the engine starts."""

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
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Layouts that keep the bytes of a page together."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages of per-token-head caches have room for a float32 scale of each row of K and of V."""
        if spec.head_size_v != spec.head_size:
            raise bad_value("head_size_v", f"{spec.head_size}, as keys have", spec.head_size_v)
        if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_per_token_head:
            return spec
        return replace(spec, state_content_bytes=2 * (spec.head_size + common.SCALE_DTYPE.itemsize))

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Elements of a head."""
        return head_size % 8 == 0 and 0 < head_size <= MAX_HEAD_DIM

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


class SwathBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Makes the ``Step`` that all layers of a KV cache group share.

    It reads no device tensor and launches nothing, so a captured graph holds for every batch of its shape.
    """

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rswa_window: int | None = vllm_config.model_config.rswa_window
        # Where captured graphs read the leading tokens of each request.
        most = vllm_config.scheduler_config.max_num_seqs if self.rswa_window else 0
        self.leading = torch.zeros(most, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """The step, from tensors and host bounds of the batch."""
        m = common_attn_metadata
        if not isinstance(m.causal, bool):
            raise bad_value("causal", "True or False for the whole batch", f"a tensor {tuple(m.causal.shape)}")
        step = Step(
            block_table=m.block_table_tensor, seq_lens=m.seq_lens, slots=m.slot_mapping, causal=m.causal,
            num_tokens=m.num_actual_tokens, max_q_len=m.max_query_len, max_kv_len=m.max_seq_len,
            cu_seqlens_q=m.query_start_loc,
        )  # fmt: skip
        if self.rswa_window is None or m.rswa_prefix_lens is None:
            return step
        leading = self.leading[: m.seq_lens.shape[0]]
        leading.copy_(m.rswa_prefix_lens[: leading.shape[0]], non_blocking=True)
        return replace(step, size=self.rswa_window, global_tokens=leading)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Step:
        """A step to capture with: lengths of 1 make its runs short. Replays have lengths of their own."""
        step = self.build(0, common_attn_metadata)
        step.seq_lens.fill_(1)
        return step

    def update_block_table(self, metadata: Step, blk_table: Tensor, slot_mapping: Tensor) -> Step:
        """The same step over the pages of another group."""
        return replace(metadata, block_table=blk_table, slots=slot_mapping)


class SwathImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of one layer."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        if alibi_slopes is not None:
            raise bad_value("alibi_slopes", "None: swath adds no bias to scores", f"{len(alibi_slopes)} slopes")
        # vLLM's platform for CPUs asks none of the backend's questions.
        if not SwathBackend.supports_attn_type(attn_type):
            raise bad_value("attn_type", f"{AttentionType.DECODER!r}", repr(attn_type))
        if not SwathBackend.supports_head_size(head_size):
            raise bad_value("head_size", f"a multiple of 8, at most {MAX_HEAD_DIM}", head_size)
        if kv_cache_dtype not in STORAGE:
            raise bad_value("kv_cache_dtype", f"one of {', '.join(STORAGE)}", kv_cache_dtype)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.storage = kv_cache_dtype, STORAGE[kv_cache_dtype]
        self.sliding_window, self.attn_type = sliding_window, attn_type
        self.kv_sharing_target_layer_name, self.sinks = kv_sharing_target_layer_name, sinks
        split_size = BATCH_INVARIANT_SPLIT if envs.VLLM_BATCH_INVARIANT else None
        self.layer = Layer(sliding_window, float(scale), float(logits_soft_cap or 0.0), sinks, split_size)
        self._cache: tuple[tuple[Any, ...], PagedKV] | None = None

    def cache(self, layer: Any, kv: Tensor) -> PagedKV:
        """The cache tensor [pages, Hkv, page_size, content] as a PagedKV, made once."""
        seen = kv, layer._k_scale, layer._v_scale
        if self._cache is None or any(a is not b for a, b in zip(self._cache[0], seen, strict=True)):
            self._cache = seen, self.view(*seen)
        return self._cache[1]

    def view(self, kv: Tensor, k_scale: Tensor, v_scale: Tensor) -> PagedKV:
        """A new PagedKV over a cache tensor of this layer, with its static scales, [] or [Hkv], if it has any."""
        dtype = self.storage.dtype or kv.dtype
        if self.storage.scales == "token":
            return common.planar_cache(kv, self.head_size, dtype)
        if self.storage.scales == "none":
            return common.rows_cache(kv, dtype)
        k_scale, v_scale = (x.reshape(()) if x.numel() == 1 else x for x in (k_scale, v_scale))
        return common.rows_cache(kv, dtype, k_scale=k_scale, v_scale=v_scale)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:  # fmt: skip
        """Write new keys and values [T or more, Hkv, D]; slots int64 [T], -1 for padding."""
        self.layer.append(self.cache(layer, kv_cache), key, value, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Step | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of query [T or more, Hq, D] into ``output``, whose padding is left as it was."""
        if output_scale is not None or output_block_scale is not None:
            raise bad_value("output_scale", "None: fused_output_quant_supported says so", "a tensor")
        if attn_metadata is None:  # a profiling run, before there is a cache
            return output.fill_(0)
        attn_metadata.attend(self.layer, query, self.cache(layer, kv_cache), output)
        return output
