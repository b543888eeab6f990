"""A batch as vLLM hands it to an attention backend, made by hand: its cache, its metadata, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from swath import PagedKV
from swath.pages import page_count
from swath.testing import Arithmetic, check_budget, oracle

PAGE, HEADS, KV_HEADS, DIM = 16, 4, 2, 64
POISON = 0xFF
"""In every byte: NaN in float16, bfloat16, float32, e4m3 and e5m2; an int8 value whose token scale is NaN."""
INT8_POISON = 0x80
"""In every byte of an int8 cache without token scales, which can hold no NaN: the value furthest from 0."""
NULL_PAGE = 0
"""Where vLLM's tables point for pages that were freed, and for requests that pad a captured graph."""


@dataclass(frozen=True)
class Batch:
    """One step of a served model.

    q_lens, kv_lens: of each request, its new tokens counted. window, softcap, sink, causal: of the layer.
    rswa, leading: R-SWA's window, and the prompt length of each request. kv_cache_dtype, layout: of the cache.
    spans: of each request, the first and last positions of images. clamped: their rows stay within the window.
    v_dim: elements of a value row.
    padded: requests and tokens, two of each, that a captured graph has more than the batch.
    """

    q_lens: tuple[int, ...] = (1, 1, 1)
    kv_lens: tuple[int, ...] = (70, 33, 129)
    window: int | None = None
    softcap: float = 0.0
    sink: bool = False
    causal: bool = True
    rswa: int | None = None
    leading: tuple[int, ...] = ()
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    clamped: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: str = "auto"
    layout: str = "LBNHC"
    v_dim: int = DIM
    padded: bool = False

    @property
    def size(self) -> int | None:
        """Keys in the window."""
        return self.window if self.rswa is None else self.rswa

    @property
    def slots(self) -> list[Tensor]:
        """Where each request's tokens are, int64 [kv_len]."""
        pages = [page_count(n, PAGE) for n in self.kv_lens]
        ids = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(3)) + 1  # page 0 belongs to no request
        own = ids.split(pages)
        return [
            (page[:, None] * PAGE + torch.arange(PAGE)).flatten()[:n] for page, n in zip(own, self.kv_lens, strict=True)
        ]

    def visible(self, b: int) -> Tensor:
        """Which keys of request b any of its new tokens sees, bool [kv_len]."""
        kv_len, leading = self.kv_lens[b], self.leading[b] if self.leading else 0
        if self.spans:
            return oracle.inside(torch.tensor(self.ranges(b)), torch.arange(kv_len), leading).any(0)
        rows = torch.arange(kv_len - self.q_lens[b], kv_len)
        return oracle.visible(rows, torch.arange(kv_len), self.size, leading, self.causal).any(0)

    def ranges(self, b: int) -> list[tuple[int, int]]:
        """The keys [lo, hi) that each new token of request b sees, where it has images."""
        seen = []
        for p in range(self.kv_lens[b] - self.q_lens[b], self.kv_lens[b]):
            low, high = 0 if self.size is None else max(p - self.size + 1, 0), p + 1
            for first, last in self.spans[b]:
                if first <= p <= last:
                    low, high = low if self.clamped else min(low, first), last + 1
            seen.append((low, high))
        return seen

    def table(self) -> Tensor:
        """[B, max_pages]: the pages that a new token sees or is written to, the null page where others were freed."""
        table = torch.full((len(self.kv_lens), max(page_count(n, PAGE) for n in self.kv_lens) + 1), NULL_PAGE)
        for b, slots in enumerate(self.slots):
            needed = self.visible(b)
            needed[self.kv_lens[b] - self.q_lens[b] :] = True
            for page, seen in enumerate(needed.split(PAGE)):
                if seen.any():
                    table[b, page] = slots[page * PAGE] // PAGE
        return table.int()


def cache_tensor(spec: Any, num_pages: int, layout: str, device: str, poison: int = POISON) -> Tensor:
    """The tensor of one layer, [pages, kv heads, tokens, content], its bytes all poison; "B..." lie among others."""
    content = spec.state_content_size_bytes
    sizes = {"L": 2 if layout[0] == "B" else 1, "B": num_pages, "H": spec.num_kv_heads, "N": spec.block_size}
    sizes["C"] = content
    pool = torch.full([sizes[axis] for axis in layout], poison, dtype=torch.uint8, device=device)
    one = pool.permute([layout.index(axis) for axis in "LBHNC"])[-1]
    return one.view(spec.dtype)


def run(batch: Batch, vllm: SimpleNamespace, impl: str, device: str, *, graph: bool = False) -> Tensor:
    """Write a batch's keys, those of earlier steps first, attend, and hold the result to float64.

    ``vllm``: the names of the engine and of the adapter. ``graph``: the metadata is the one of a capture, and holds
    for the batch by the contents of its tensors alone.
    """
    torch.manual_seed(0)
    spec = vllm.backend.SwathBackend.customize_spec(spec_of(vllm, batch.kv_cache_dtype, batch.dtype, batch.v_dim))
    sink = torch.randn(HEADS, device=device).to(batch.dtype) if batch.sink else None
    attention = vllm.backend.SwathImpl(
        HEADS, DIM, DIM**-0.5, KV_HEADS, None, batch.window,
        batch.kv_cache_dtype, batch.softcap or None, vllm.AttentionType.DECODER, None, sinks=sink,
    )  # fmt: skip
    attention.layer = replace(attention.layer, impl=impl)
    scales = {name: torch.tensor(scale, device=device) for name, scale in SCALES.items()}
    layer = SimpleNamespace(**scales)
    last_page = max(int(slots.max()) for slots in batch.slots) // PAGE
    poison = INT8_POISON if batch.kv_cache_dtype == "int8" else POISON
    kv = cache_tensor(spec, last_page + 1, batch.layout, device, poison)
    write(batch, attention, layer, kv)
    metadata = metadata_of(batch, vllm, spec, device, graph)
    rows = metadata.num_actual_tokens if graph else sum(batch.q_lens)
    q = torch.full((rows + 3, HEADS, DIM), torch.nan, dtype=batch.dtype, device=device)
    q[: sum(batch.q_lens)] = torch.randn(sum(batch.q_lens), *q.shape[1:], device=device)
    out = torch.full_like(q[..., : batch.v_dim], 7.0)
    floats = {f"{name}_float": scale for name, scale in SCALES.items()}
    one = SimpleNamespace(impl=attention, mm_prefix_clamp_sliding_window=batch.clamped, **scales, **floats)
    config = config_of(rswa_window=batch.rswa, is_mm_prefix_lm=bool(batch.spans), dtype=batch.dtype, one=one)
    builder = vllm.backend.SwathBuilder(spec, ["one"], config, torch.device(device))
    step = builder.build_for_cudagraph_capture(metadata) if graph else builder.build(0, metadata)
    if graph:
        metadata.seq_lens[: len(batch.kv_lens)] = torch.tensor(batch.kv_lens, device=device)
    made = attention.forward(layer, q, None, None, kv, step, out)
    assert made is out
    check(batch, q, out, attention.cache(layer, kv), sink)
    return out


def spec_of(vllm: SimpleNamespace, kv_cache_dtype: str, dtype: torch.dtype = torch.bfloat16, v_dim: int = DIM) -> Any:
    """vLLM's description of a layer's cache, before the backend customises it."""
    mode, stored = STORED.get(kv_cache_dtype, ("NONE", dtype))
    return vllm.FullAttentionSpec(
        block_size=PAGE,
        num_kv_heads=KV_HEADS,
        head_size=DIM,
        dtype=stored,
        head_size_v=v_dim,
        kv_quant_mode=vllm.KVQuantMode[mode],
    )


def config_of(
    rswa_window: int | None = None, is_mm_prefix_lm: bool = False, dtype: torch.dtype = torch.bfloat16, **layers: Any
) -> SimpleNamespace:
    """vLLM's configuration, as far as a builder reads it."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            rswa_window=rswa_window, max_model_len=512, dtype=dtype, is_mm_prefix_lm=is_mm_prefix_lm
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=128),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        speculative_config=SimpleNamespace(num_speculative_tokens=3),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, cp_kv_cache_interleave_size=1),
    )


SCALES = {"_k_scale": 0.04, "_v_scale": 0.03}
"""Static scales of a layer, by vLLM's names; it keeps each as a tensor and as a float."""
STORED = {
    **dict.fromkeys(("fp8", "fp8_e4m3"), ("FP8_PER_TENSOR", torch.uint8)),
    "fp8_e5m2": ("FP8_PER_TENSOR", torch.uint8),
    "int8": ("FP8_PER_TENSOR", torch.int8),
    "int8_per_token_head": ("INT8_PER_TOKEN_HEAD", torch.int8),
    "fp8_per_token_head": ("FP8_PER_TOKEN_HEAD", torch.uint8),
}
"""vLLM's mode and torch dtype of a KV cache dtype."""


def write(batch: Batch, attention: Any, layer: Any, kv: Tensor) -> None:
    """All keys and values: those of earlier steps first, but for the ones that no new token sees."""
    device = kv.device
    for new in (False, True):
        slots = []
        for b, own in enumerate(batch.slots):
            first = batch.kv_lens[b] - batch.q_lens[b]
            slots.append(own[first:] if new else own[:first].where(batch.visible(b)[:first], -1))
        mapping = torch.cat(slots).to(device)
        k, v = torch.randn(2, len(mapping) + 2, KV_HEADS, DIM, device=device).to(batch.dtype)
        k[-2:] = v[-2:] = torch.nan  # padding: vLLM may pass more rows than slots
        k[:-2][mapping < 0] = torch.nan
        attention.do_kv_cache_update(layer, k, v[..., : batch.v_dim], kv, mapping)


def metadata_of(batch: Batch, vllm: SimpleNamespace, spec: Any, device: str, graph: bool) -> Any:
    """The common metadata, padded by two requests where the batch says so."""
    spare = 2 if batch.padded else 0
    bounds = [0, *accumulate(batch.q_lens)]
    cu = torch.tensor([*bounds, *[bounds[-1]] * spare], dtype=torch.int32)
    seq_lens = torch.tensor([*batch.kv_lens, *[0] * spare], dtype=torch.int32, device=device)
    table = torch.nn.functional.pad(batch.table(), (0, 0, 0, spare), value=NULL_PAGE).to(device)
    return vllm.CommonAttentionMetadata(
        query_start_loc=cu.to(device), query_start_loc_cpu=cu, seq_lens=seq_lens, num_reqs=len(seq_lens),
        num_actual_tokens=bounds[-1] + spare, max_query_len=max(batch.q_lens),
        max_seq_len=4096 if graph else max(batch.kv_lens), block_table_tensor=table,
        slot_mapping=torch.empty(0, dtype=torch.int64, device=device), causal=batch.causal,
        mm_req_doc_ranges={b: list(own) for b, own in enumerate(batch.spans)} if batch.spans else None,
        rswa_prefix_lens=torch.tensor([*batch.leading, *[0] * spare], dtype=torch.int32) if batch.leading else None,
    )  # fmt: skip


def check(batch: Batch, q: Tensor, out: Tensor, cache: PagedKV, sink: Tensor | None) -> None:
    """Every row within its error budget, and no row of padding written but by zeros."""
    rows = sum(batch.q_lens)
    bounds = torch.tensor([0, *accumulate(batch.q_lens)])
    ranges = torch.tensor([x for b in range(len(batch.kv_lens)) for x in batch.ranges(b)]) if batch.spans else None
    table, kv_lens = batch.table().to(q.device), torch.tensor(batch.kv_lens, device=q.device)
    if ranges is not None:
        ranges = ranges.to(q.device)
    truth = oracle.paged(
        q[:rows], cache.k, cache.v, cache.k_scale, cache.v_scale, table, kv_lens, cu_seqlens_q=bounds.to(q.device),
        size=batch.size, global_tokens=list(batch.leading) or 0, causal=batch.causal, scale=DIM**-0.5,
        softcap=batch.softcap, sink=sink, ranges=ranges,
    )  # fmt: skip
    check_budget(out[:rows], None, truth, Arithmetic(cache.quant))
    assert (out[rows:] == 7.0).all()
