"""Calls made up for ``swath explain`` and ``swath doctor``: tensors of the right shape, their contents unset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.pages import page_count
from swath.quant import KVQuant, calibrate
from swath.window import Window

MAX_POOL_BYTES = 64 << 20
"""Nothing runs, so sequences may share pages: however large the case, its pool stays small."""
MAX_STEPS = 8
"""Up to so many query tokens are n-step decode, q [B, S, Hq, D]; more are a chunked prefill, q [T, Hq, D]."""


@dataclass(frozen=True)
class Case:
    """A call in numbers. ``quant`` is how the cache stores keys and values; ``compute`` as ``paged_attention``'s."""

    batch: int = 1
    q_len: int = 1
    kv_len: int = 256
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    quant: KVQuant = field(default_factory=lambda: KVQuant(torch.bfloat16))
    window: Window = field(default_factory=Window)
    softcap: float = 0.0
    sink: bool = False
    compute: str = "float"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def form(self) -> str:
        """How ``paged_attention`` takes these queries."""
        return "decode" if self.q_len == 1 else "n-step decode" if self.q_len <= MAX_STEPS else "chunked prefill"

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the public function ``op``, one of ``explain.OPS``."""
        build = {
            "attention": self._attention,
            "paged_attention": self._paged_attention,
            "append_kv": self._append_kv,
            "merge_states": self._merge_states,
        }
        return build[op]()

    def _attention(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q = self._empty(self.batch * self.q_len, self.q_heads)
        k, v = (self._empty(self.batch * self.kv_len, self.kv_heads) for _ in range(2))
        return (q, k, v, self._bounds(self.q_len), self._bounds(self.kv_len)), self._options()

    def _paged_attention(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        options = self._options() | {"compute": self.compute}
        if self.q_len == 1:
            q = self._empty(self.batch, self.q_heads)
        elif self.q_len <= MAX_STEPS:
            q = self._empty(self.batch, self.q_len, self.q_heads)
        else:
            q = self._empty(self.batch * self.q_len, self.q_heads)
            options["cu_seqlens_q"] = self._bounds(self.q_len)
        cache, pages = self._cache()
        table = torch.zeros(self.batch, pages, dtype=torch.int32, device=self.device)
        return (q, cache, table, self._int32([self.kv_len] * self.batch)), options

    def _append_kv(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = self.batch * self.q_len
        k, v = (self._empty(tokens, self.kv_heads) for _ in range(2))
        return (self._cache()[0], k, v, torch.zeros(tokens, dtype=torch.int64, device=self.device)), {}

    def _merge_states(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        out = self._empty(self.batch * self.q_len, self.q_heads)
        lse = torch.empty(out.shape[:-1], dtype=torch.float32, device=self.device)
        return (out, lse, out, lse), {}

    def _options(self) -> dict[str, Any]:
        sink = torch.zeros(self.q_heads, device=self.device) if self.sink else None
        bounds = {"max_q_len": self.q_len, "max_kv_len": self.kv_len}
        return bounds | {"window": self.window, "softcap": self.softcap, "sink": sink}

    def _cache(self) -> tuple[PagedKV, int]:
        """A cache of the case's layout, and how many pages each sequence has."""
        pages = page_count(self.kv_len, self.page_size)
        page_bytes = self.page_size * self.quant.bytes_per_token(self.kv_heads, self.head_dim)
        pool = max(min(self.batch * pages, MAX_POOL_BYTES // max(page_bytes, 1)), 1)
        sample = torch.ones(1, self.kv_heads, self.head_dim, device=self.device)
        scales = [
            None if granularity in ("none", "token") else calibrate(sample, self.quant.dtype, granularity)
            for granularity in (self.quant.k, self.quant.v_granularity)
        ]
        layout = (pool, self.kv_heads, self.page_size, self.head_dim)
        return PagedKV.empty(self.quant, *layout, k_scale=scales[0], v_scale=scales[1], device=self.device), pages

    def _empty(self, *leading: int) -> Tensor:
        return torch.empty(*leading, self.head_dim, dtype=self.dtype, device=self.device)

    def _bounds(self, length: int) -> Tensor:
        return self._int32([b * length for b in range(self.batch + 1)])

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
