"""The attention of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import envs
from vllm.distributed.parallel_state import get_dcp_group
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from swath.cache import PagedKV
from swath.engines.common import BATCH_INVARIANT_SPLIT, Layer, Step
from swath.engines.shards import attend_shared, rehearse
from swath.engines.vllm.storage import STORAGE
from swath.engines.vllm.versions import STATIC_INT8
from swath.errors import bad_value
from swath.ops.arguments import MAX_HEAD_DIM


def takes_head_size(head_size: int) -> bool:
    """Whether swath takes heads of ``head_size`` elements."""
    return head_size % 8 == 0 and 0 < head_size <= MAX_HEAD_DIM


class SwathImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of one layer.

    Decode context parallel: ranks are asked for no LSE, but exchange what they find by themselves (``engines.shards``).
    """

    supports_dcp = True
    can_return_lse_for_decode = True  # vLLM refuses others
    supports_mtp_with_cp_non_trivial_interleave_size = True

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        if alibi_slopes is not None:
            raise bad_value("alibi_slopes", "None: swath adds no bias to scores", f"{len(alibi_slopes)} slopes")
        # vLLM's platform for CPUs asks none of the backend's questions.
        if attn_type != AttentionType.DECODER:
            raise bad_value("attn_type", f"{AttentionType.DECODER.value!r}", repr(attn_type))
        if not takes_head_size(head_size):
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
            self._cache = seen, self.storage.view(kv, self.head_size, *seen[1:])
        return self._cache[1]

    def check_scales(self, layer: Any) -> None:
        """An int8 cache needs calibrated scales: with vLLM's default, 1, it would hold whole numbers.

        Raises:
            ValueError: a scale is 1.
        """
        if self.storage == STORAGE[STATIC_INT8] and 1.0 in (layer._k_scale_float, layer._v_scale_float):
            raise bad_value("kv_cache_dtype", "calibrated k_scale and v_scale in the checkpoint for int8", "none")

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
            if self.dcp_world_size > 1:
                rehearse(query, self.num_kv_heads, get_dcp_group().device_group)
            return output.fill_(0)
        cache = self.cache(layer, kv_cache)
        if attn_metadata.shard is None:
            attn_metadata.attend(self.layer, query, cache, output)
        else:
            attend_shared(attn_metadata, self.layer, query, cache, output, get_dcp_group().device_group)
        return output
