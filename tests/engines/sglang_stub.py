"""The few names of SGLang that swath's adapter imports, for tests where SGLang is not installed.

``real_sglang.py`` holds them to the real ones: names, parameters, attributes and values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum, auto
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from stub_modules import module_of
from torch import Tensor, nn

INSTALLED = find_spec("sglang") is not None


class ForwardMode(IntEnum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND_V2 = auto()
    PREBUILT = auto()
    SPLIT_PREFILL = auto()
    DLLM_EXTEND = auto()

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_decode_or_idle(self) -> bool:
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)

    def is_target_verify(self) -> bool:
        return self == ForwardMode.TARGET_VERIFY

    def is_draft_extend_v2(self) -> bool:
        return self == ForwardMode.DRAFT_EXTEND_V2

    def is_dllm_extend(self) -> bool:
        return self == ForwardMode.DLLM_EXTEND


class SharedReadEnds(Enum):
    PRE_REPLAY = 1
    IN_REPLAY = 2
    POST_REPLAY = 3
    UNKNOWN = 4


class AttentionBackend:
    needs_cpu_seq_lens: bool = True

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None: ...

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise NotImplementedError

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        raise NotImplementedError

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        return SharedReadEnds.IN_REPLAY if fm.is_decode() or fm.is_target_verify() else SharedReadEnds.UNKNOWN

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class RadixAttention(nn.Module):
    def __init__(
        self, num_heads: int, head_dim: int, scaling: float, num_kv_heads: int, layer_id: int, logit_cap: float = 0.0,
        v_head_dim: int = -1, sliding_window_size: int = -1, is_cross_attention: bool = False,
        pos_encoding_mode: str = "NONE", logit_capping_method: str = "tanh", quant_config: Any = None,
        attn_type: AttentionType = AttentionType.DECODER, use_irope: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num, self.tp_v_head_num = num_heads, num_kv_heads, num_kv_heads
        self.head_dim = self.qk_head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim == -1 else v_head_dim
        self.scaling, self.layer_id, self.logit_cap = scaling, layer_id, logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention, self.use_irope = is_cross_attention, use_irope
        self.k_scale = self.v_scale = None
        self.attn_type, self.pos_encoding_mode = attn_type, pos_encoding_mode
        self.logit_capping_method, self.xai_temperature_len = logit_capping_method, -1


class MHATokenToKVPool:
    def __init__(
        self, size: int, page_size: int, dtype: torch.dtype, head_num: int, head_dim: int, layer_num: int, device: str,
        enable_memory_saver: bool, v_head_dim: int | None = None,
    ) -> None:  # fmt: skip
        self.size, self.page_size, self.dtype = size, page_size, dtype
        self.store_dtype = torch.uint8 if dtype.itemsize == 1 else dtype
        self.kv_cache_layout, self.is_quantized_kv_cache = "nhd", False
        slots = layer_num, size + page_size, head_num
        self.k_buffer, self.v_buffer = (
            list(torch.zeros(*slots, width, dtype=self.store_dtype, device=device).unbind())
            for width in (head_dim, v_head_dim or head_dim)
        )

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k_buffer[layer_id].view(self.dtype)

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.v_buffer[layer_id].view(self.dtype)


class SWAKVPool:
    def __init__(
        self, size: int, size_swa: int, page_size: int, dtype: torch.dtype, head_num: int, head_dim: int,
        swa_attention_layer_ids: list[int], full_attention_layer_ids: list[int], device: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.page_size, self.swa_layer_nums = page_size, len(swa_attention_layer_ids)
        of_window, of_all = swa_attention_layer_ids, full_attention_layer_ids
        self.full_kv_pool, self.swa_kv_pool = (
            MHATokenToKVPool(slots, page_size, dtype, head_num, head_dim, len(layers), device, **kwargs)
            for slots, layers in ((size, of_all), (size_swa, of_window))
        )
        self.layers_mapping = {
            layer: (i, layers is of_window) for layers in (of_all, of_window) for i, layer in enumerate(layers)
        }
        self.full_to_swa_index_mapping: Tensor | None = None

    def register_mapping(self, full_to_swa_index_mapping: Tensor) -> None:
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def translate_loc_from_full_to_swa(self, kv_indices: Tensor) -> Tensor:
        assert self.full_to_swa_index_mapping is not None
        return self.full_to_swa_index_mapping[kv_indices]

    def _pool_of(self, layer_id: int) -> tuple[MHATokenToKVPool, int]:
        index, windowed = self.layers_mapping[layer_id]
        return (self.swa_kv_pool if windowed else self.full_kv_pool), index

    def get_key_buffer(self, layer_id: int) -> Tensor:
        pool, index = self._pool_of(layer_id)
        return pool.get_key_buffer(index)

    def get_value_buffer(self, layer_id: int) -> Tensor:
        pool, index = self._pool_of(layer_id)
        return pool.get_value_buffer(index)


ATTENTION_BACKENDS: dict[str, Callable[[Any], Any]] = {}
ATTENTION_BACKEND_CHOICES = ["triton", "fa3"]
DETERMINISTIC_ATTENTION_BACKEND_CHOICES = ["fa3"]
RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND = ["fa3"]


def register_attention_backend(name: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        ATTENTION_BACKENDS[name] = make
        return make

    return register


SERVER = SimpleNamespace(
    enable_deterministic_inference=False,
    speculative_algorithm=None,
    speculative_eagle_topk=None,
    speculative_num_draft_tokens=None,
)


def get_exec() -> Any:
    return SimpleNamespace(deterministic=SERVER)


def get_spec() -> Any:
    return SERVER


CHOICES = (
    "ATTENTION_BACKEND_CHOICES", "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
    "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
)  # fmt: skip
MODULES: dict[str, tuple[str, ...]] = {
    "sglang.srt.layers.attention.base_attn_backend": ("AttentionBackend", "SharedReadEnds"),
    "sglang.srt.layers.attention.attention_registry": ("ATTENTION_BACKENDS", "register_attention_backend"),
    "sglang.srt.layers.radix_attention": ("AttentionType", "RadixAttention"),
    "sglang.srt.mem_cache.memory_pool": ("MHATokenToKVPool",),
    "sglang.srt.mem_cache.swa_memory_pool": ("SWAKVPool",),
    "sglang.srt.model_executor.forward_batch_info": ("ForwardMode",),
    "sglang.srt.arg_groups.choices": CHOICES,
    "sglang.srt.runtime_context": ("get_exec", "get_spec"),
}
"""What is where in 0.5.23."""
OLD_MODULES = {k: v for k, v in MODULES.items() if not k.endswith(("choices", "runtime_context"))}
OLD_MODULES |= {"sglang.srt.server_args": CHOICES}
"""And in 0.5.15, as far as the adapter cares."""


def model_config(
    dtype: torch.dtype, *, is_encoder_decoder: bool = False, model_type: str = "llama", **text: Any
) -> SimpleNamespace:
    """What the adapter reads of a model's configuration, in a ``ModelConfig`` that is made by hand."""
    text_config = SimpleNamespace(model_type=model_type, **text)
    return SimpleNamespace(is_encoder_decoder=is_encoder_decoder, dtype=dtype, hf_text_config=text_config)


@contextmanager
def installed(modules: dict[str, tuple[str, ...]] = MODULES) -> Iterator[None]:
    """``import sglang`` finds the stub, unless SGLang is installed; the adapter is imported for it, and forgotten."""
    if INSTALLED:
        yield
        return
    before = dict(sys.modules)
    for path, names in modules.items():
        for name in names:
            setattr(module_of(path), name, globals()[name])
    try:
        yield
    finally:
        for name in sys.modules.keys() - before.keys():
            if name.startswith(("sglang", "swath.engines.sglang.")):
                del sys.modules[name]
                package, _, own = name.rpartition(".")
                vars(sys.modules.get(package, SimpleNamespace())).pop(
                    own, None
                )  # ``from package import own`` finds it there
