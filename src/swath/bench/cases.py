"""Benchmark cases as data: shapes of models that are served today, and the floor of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swath import KVQuant, PagedKV, Window


@dataclass(frozen=True)
class BenchCase:
    """One call. ``q_len`` query tokens at the end of ``kv_len`` keys in each of ``batch`` sequences.

    page_size 0: dense keys. storage: "bf16", or "int8"/"e4m3" with a granularity after a space.
    """

    name: str
    batch: int
    q_len: int
    kv_len: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    storage: str = "bf16"
    window: int | None = None
    leading: int = 0
    sink: bool = False

    @property
    def kind(self) -> str:
        """ "decode" (up to 16 query tokens) or "prefill"."""
        return "decode" if self.q_len <= 16 else "prefill"

    def visible_pairs(self) -> int:
        """(query, key) pairs that are not masked, over all sequences, for one query head."""
        window = Window(self.window, self.leading)
        pairs = 0
        for p in range(self.kv_len - self.q_len, self.kv_len):
            lead, left, right = window.key_ranges(p, p, self.kv_len)
            pairs += lead + right - left
        return self.batch * pairs

    def flops(self) -> int:
        """Of both matrix products."""
        return 4 * self.head_dim * self.heads * self.visible_pairs()

    def nbytes(self) -> int:
        """That must move: q and out once, and once every key, value and scale that some query sees."""
        window = Window(self.window, self.leading)
        lead, left, right = window.key_ranges(self.kv_len - self.q_len, self.kv_len - 1, self.kv_len)
        keys = self.batch * (lead + right - left)
        rows = self.batch * self.q_len * self.heads * self.head_dim
        return keys * self.quant().bytes_per_token(self.kv_heads, self.head_dim) + 2 * 2 * rows

    def quant(self) -> KVQuant:
        """How the cache stores."""
        stored, _, granularity = self.storage.partition(" ")
        dtypes = {"bf16": torch.bfloat16, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
        return KVQuant(dtypes[stored], granularity or "none")


def make_call(case: BenchCase, device: torch.device, seed: int = 0) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Random inputs: the operator's name, its positional arguments and its options. Pages are shuffled."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"window": Window(case.window, case.leading)}
    if case.sink:
        options["sink"] = torch.randn(case.heads, device=device)
    rows = case.batch * case.q_len
    if case.page_size == 0:
        cu = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        q, k, v = (
            torch.randn(n, heads, case.head_dim, dtype=torch.bfloat16, device=device)
            for n, heads in ((rows, case.heads), *((case.batch * case.kv_len, case.kv_heads),) * 2)
        )
        options |= {"max_q_len": case.q_len, "max_kv_len": case.kv_len}
        return "attention", (q, k, v, cu * case.q_len, cu * case.kv_len), options
    pages = -(-case.kv_len // case.page_size)
    table = torch.randperm(case.batch * pages, device=device).int().view(case.batch, pages)
    lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device)
    shape: tuple[int, ...] = (case.batch, case.q_len, case.heads, case.head_dim)
    if case.kind == "prefill":
        shape = (rows, *shape[2:])
        options["cu_seqlens_q"] = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.q_len
        options["max_q_len"] = case.q_len
    q = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return "paged_attention", (q, _random_cache(case, case.batch * pages, device), table, lens), options


def _random_cache(case: BenchCase, num_pages: int, device: torch.device) -> PagedKV:
    shape, quant = (num_pages, case.kv_heads, case.page_size, case.head_dim), case.quant()
    scale_shapes = {"tensor": (), "head": shape[1:2], "channel": (shape[1], shape[3]), "token": shape[:3]}
    k, v = (_random_values(shape, quant.dtype, device) for _ in range(2))
    if not quant.is_quantised:
        return PagedKV(k, v)
    spread = 73.0 if quant.dtype == torch.int8 else 50.0
    scales = [(torch.rand(scale_shapes[quant.k], device=device) + 0.5) / spread for _ in range(2)]
    return PagedKV(k, v, k_scale=scales[0], v_scale=scales[1])


def _random_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    x = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return x if dtype == torch.bfloat16 else (50 * x).to(dtype)


CASES = (
    BenchCase("decode 8 x 4k p32", 8, 1, 4096, page_size=32),
    BenchCase("decode 64 x 8k p16", 64, 1, 8192),
    BenchCase("decode 64 x 8k p64", 64, 1, 8192, page_size=64),
    BenchCase("decode 16 x 32k p1024", 16, 1, 32768, page_size=1024),
    BenchCase("decode 1 x 128k p16", 1, 1, 131072),
    BenchCase("decode 128 x 16k w1024", 128, 1, 16384, window=1024),
    BenchCase("decode 128 x 16k w1024+64", 128, 1, 16384, window=1024, leading=64),
    BenchCase("decode 128 x 16k w128 gpt-oss", 128, 1, 16384, heads=64, head_dim=64, window=128, sink=True),
    BenchCase("decode 64 x 8k int8 channel", 64, 1, 8192, storage="int8 channel"),
    BenchCase("decode 64 x 8k int8 token", 64, 1, 8192, storage="int8 token"),
    BenchCase("decode 64 x 8k e4m3", 64, 1, 8192, storage="e4m3 tensor"),
    BenchCase("decode 128 x 16k w1024 int8 channel", 128, 1, 16384, window=1024, storage="int8 channel"),
    BenchCase("4 steps 32 x 16k", 32, 4, 16384),
    BenchCase("4 steps 64 x 16k w4096", 64, 4, 16384, window=4096),
    BenchCase("4 steps 32 x 16k int8 channel", 32, 4, 16384, storage="int8 channel"),
    BenchCase("prefill 8k llama", 1, 8192, 8192, page_size=0),
    BenchCase("prefill 2 x 16k mistral w4096", 2, 16384, 16384, page_size=0, window=4096),
    BenchCase("prefill 2 x 16k gemma w1024", 2, 16384, 16384, kv_heads=16, page_size=0, window=1024),
    BenchCase("prefill 2 x 16k w1024+64", 2, 16384, 16384, page_size=0, window=1024, leading=64),
    BenchCase("prefill 2 x 16k gpt-oss w128", 2, 16384, 16384, 64, 8, 64, page_size=0, window=128, sink=True),
    BenchCase("prefill 2 x 8k gpt-oss full", 2, 8192, 8192, 64, 8, 64, page_size=0),
    BenchCase("chunk 4 x 2k of 16k", 4, 2048, 16384),
    BenchCase("chunk 4 x 2k of 16k w1024", 4, 2048, 16384, window=1024),
    BenchCase("chunk 4 x 2k of 16k int8 token", 4, 2048, 16384, storage="int8 token"),
    BenchCase("chunk 4 x 2k of 16k int8 channel", 4, 2048, 16384, storage="int8 channel"),
    BenchCase("chunk 4 x 2k of 16k int8 channel w1024", 4, 2048, 16384, window=1024, storage="int8 channel"),
)
"""The cases of ``swath bench gpu``."""
