"""The few names of vLLM that swath's adapter imports, for tests where vLLM is not installed.

``real_vllm.py`` holds them to the real ones: names, parameters, fields and values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum
from importlib.util import find_spec
from typing import Any, ClassVar, Generic, TypeVar

import torch
from stub_modules import module_of
from torch import Tensor

INSTALLED = find_spec("vllm") is not None

T = TypeVar("T")


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


@dataclass(frozen=True)
class MultipleOf:
    base: int


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class KVCacheLayout(Enum):
    LBHNC = (0, 1, 2, 3, 4)
    LBNHC = (0, 1, 3, 2, 4)
    LHBNC = (0, 2, 1, 3, 4)
    BLHNC = (1, 0, 2, 3, 4)
    BLNHC = (1, 0, 3, 2, 4)
    BHLNC = (1, 2, 0, 3, 4)


class KVQuantMode(IntEnum):
    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3

    @property
    def is_per_token_head(self) -> bool:
        return self in (KVQuantMode.INT8_PER_TOKEN_HEAD, KVQuantMode.FP8_PER_TOKEN_HEAD)


class AttentionBackend:
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.supported_dtypes

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def is_mla(cls) -> bool:
        return False

    @classmethod
    def is_sparse(cls) -> bool:
        return False


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None
    rswa_prefix_lens: Tensor | None = None


class AttentionMetadataBuilder(Generic[T]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return cls._cudagraph_support

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        raise NotImplementedError

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        raise NotImplementedError


class AttentionImpl(Generic[T]):
    can_return_lse_for_decode: bool = False
    supports_dcp: bool = False
    supports_mtp_with_cp_non_trivial_interleave_size: bool = False
    dcp_world_size: int
    dcp_rank: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self.dcp_world_size, self.dcp_rank = 1, 0
        return self

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    head_size_v: int = None  # type: ignore[assignment]
    kv_quant_mode: KVQuantMode = KVQuantMode.NONE
    state_content_bytes: int | None = None

    @property
    def state_content_size_bytes(self) -> int:
        return self.state_content_bytes or (self.head_size + self.head_size_v) * self.dtype.itemsize

    def __post_init__(self) -> None:
        if self.head_size_v is None:
            object.__setattr__(self, "head_size_v", self.head_size)


class AttentionBackendEnum(Enum):
    CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    CUSTOM = None

    def get_path(self) -> str:
        return OVERRIDES.get(self, self.value)


def get_dcp_group() -> Any:
    raise AssertionError("decode context model parallel group is not initialized")


class Platform:
    def is_cpu(self) -> bool:
        return True


current_platform = Platform()

OVERRIDES: dict[AttentionBackendEnum, str] = {}


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    OVERRIDES[backend] = class_path


KV_CACHE_DTYPES = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"]
HANDLERS: dict[str, Any] = {}


def register_kv_cache_dtype(name: str) -> Callable[[type], type]:
    def register(handler: type) -> type:
        KV_CACHE_DTYPES.append(name)
        HANDLERS[name] = handler()
        return handler

    return register


MODULES: dict[str, tuple[str, ...]] = {
    "vllm.v1.attention.backend": (
        "AttentionBackend", "AttentionCGSupport", "AttentionImpl", "AttentionMetadataBuilder", "AttentionType",
        "CommonAttentionMetadata", "MultipleOf",
    ),
    "vllm.distributed.parallel_state": ("get_dcp_group",),
    "vllm.platforms": ("current_platform",),
    "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
    "vllm.v1.kv_cache_interface": ("FullAttentionSpec", "KVCacheLayout", "KVQuantMode"),
    "vllm.config.cache": ("KV_CACHE_DTYPES", "register_kv_cache_dtype"),
}  # fmt: skip
"""What is where."""


@contextmanager
def installed() -> Iterator[None]:
    """``import vllm`` finds the stub, unless vLLM is installed; the adapter is imported for it, and forgotten."""
    if INSTALLED:
        yield
        return
    before = dict(sys.modules)
    for path, names in MODULES.items():
        for name in names:
            setattr(module_of(path), name, globals()[name])
    module_of("vllm.envs").VLLM_BATCH_INVARIANT = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in sys.modules.keys() - before.keys():
            if name.startswith(("vllm", "swath.engines.vllm")):
                del sys.modules[name]
