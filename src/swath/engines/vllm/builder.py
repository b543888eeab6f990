"""The metadata of a step, made once for all layers of a group; and compiling for them while the engine starts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

import swath
from swath.engines.common import Step
from swath.engines.shards import Shard
from swath.engines.vllm import logger
from swath.engines.warmup import Traffic, warm
from swath.errors import bad_value
from swath.pages import page_count


class SwathBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Makes the ``Step`` that all layers of a KV cache group share.

    It reads no device tensor, so a captured graph holds for every batch of its shape. It is made while the engine
    starts, and has everything compiled that its layers will need.
    """

    supports_update_block_table = True

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """``ALWAYS``; for models with image spans ``UNIFORM_BATCH``, as a graph is captured without spans and holds for
        decode alone; with decode context parallel ``NEVER``, as exchanges between ranks were not tried in graphs.
        """
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            return AttentionCGSupport.NEVER
        return (
            AttentionCGSupport.UNIFORM_BATCH if vllm_config.model_config.is_mm_prefix_lm else AttentionCGSupport.ALWAYS
        )

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rswa_window: int | None = vllm_config.model_config.rswa_window
        # Where captured graphs read the leading tokens of each request.
        most = vllm_config.scheduler_config.max_num_seqs if self.rswa_window else 0
        self.leading = torch.zeros(most, dtype=torch.int32, device=device)
        context = vllm_config.compilation_config.static_forward_context
        self.layers = [context[name] for name in layer_names]
        for layer in self.layers:
            layer.impl.check_scales(layer)
        self.shard = self.shard_here()
        if self.layers:
            logger.info(self.said())
        if device.type == "cuda":
            begin = time.perf_counter()
            calls = self.warm()
            logger.info("swath compiled %d calls for %s in %.1f s", calls, layer_names[0], time.perf_counter() - begin)

    def shard_here(self) -> Shard | None:
        """Which keys this rank holds, with decode context parallel. Layers of a group are alike in that.

        Raises:
            ValueError: ranks that share a context have different kv heads, or a layer's requests are cut into chunks.
        """
        impl = self.layers[0].impl if self.layers else None
        if impl is None or impl.dcp_world_size == 1:
            return None
        ranks, parallel = impl.dcp_world_size, self.vllm_config.parallel_config
        copies = max(parallel.tensor_parallel_size // self.vllm_config.model_config.get_total_num_kv_heads(), 1)
        if copies % ranks:
            wanted = f"a divisor of {copies}, the ranks that have the same kv head"
            raise bad_value("decode_context_parallel_size", wanted, ranks)
        if any(getattr(layer, "attention_chunk_size", None) for layer in self.layers):
            raise bad_value("decode_context_parallel_size", "1 for layers that attend within chunks", ranks)
        return Shard(impl.dcp_rank, ranks, parallel.cp_kv_cache_interleave_size)

    def said(self) -> str:
        """For the log: which layers swath serves, and how."""
        impls = [layer.impl for layer in self.layers]
        windows = dict.fromkeys(str(self.rswa_window or impl.sliding_window) for impl in impls)
        kinds = dict.fromkeys(impl.kv_cache_dtype for impl in impls)
        return (
            f"swath {swath.__version__} serves {len(impls)} layers from {self.layer_names[0]} on: "
            f"window {', '.join(windows)}; KV cache {', '.join(kinds)}; on {self.device.type}"
        )

    def warm(self) -> int:
        """Compile the kernels of the layers, over a small cache laid out as theirs will be."""
        config, spec = self.vllm_config, self.kv_cache_spec
        content = spec.state_content_size_bytes // spec.dtype.itemsize
        kv = torch.zeros(2, spec.block_size, spec.num_kv_heads, content, dtype=spec.dtype, device=self.device)
        kv = kv.transpose(1, 2)
        kinds = {}
        for layer in self.layers:
            impl, own = layer.impl, layer.impl.layer
            if self.shard is not None:
                own = own.without_sink
            num_heads = impl.num_heads * impl.dcp_world_size
            kind = num_heads, own.size, own.softcap, own.sink is None
            kinds[kind] = own, impl.storage.view(kv, impl.head_size, layer._k_scale, layer._v_scale), num_heads
        scheduler, speculation = config.scheduler_config, config.speculative_config
        steps = (1,) if speculation is None else (1, 1 + (speculation.num_speculative_tokens or 0))
        most = scheduler.max_num_seqs, scheduler.max_num_batched_tokens, config.model_config.max_model_len
        return warm(kinds.values(), config.model_config.dtype, Traffic(*most, steps), self.steps_of)

    def steps_of(self, num_seqs: int, num_tokens: int, max_q_len: int, max_kv_len: int) -> list[Step]:
        """The steps of this shape: one, and for models with images one of a batch that has an image."""
        step = self.step_of(num_seqs, num_tokens, max_q_len, max_kv_len)
        may_span = self.vllm_config.model_config.is_mm_prefix_lm and max_q_len > 1
        return [step, self.with_spans(step, {0: [(0, 1)]})] if may_span else [step]

    def step_of(self, num_seqs: int, num_tokens: int, max_q_len: int, max_kv_len: int) -> Step:
        """A step of this shape, with tensors as vLLM's."""
        width = page_count(self.vllm_config.model_config.max_model_len, self.kv_cache_spec.block_size)
        ints = torch.zeros(num_seqs + 1, dtype=torch.int32, device=self.device)
        step = Step(
            block_table=ints.new_empty(num_seqs, width), seq_lens=ints.new_empty(num_seqs),
            slots=ints.new_empty(num_tokens, dtype=torch.int64), num_tokens=num_tokens, max_q_len=max_q_len,
            max_kv_len=max_kv_len, cu_seqlens_q=ints, shard=self.shard,
        )  # fmt: skip
        return step if self.rswa_window is None else self.with_leading(step)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """The step, from tensors and host bounds of the batch."""
        m = common_attn_metadata
        if not isinstance(m.causal, bool):
            raise bad_value("causal", "True or False for the whole batch", f"a tensor {tuple(m.causal.shape)}")
        step = Step(
            block_table=m.block_table_tensor, seq_lens=m.seq_lens, slots=m.slot_mapping, causal=m.causal,
            num_tokens=m.num_actual_tokens, max_q_len=m.max_query_len, max_kv_len=m.max_seq_len,
            cu_seqlens_q=m.query_start_loc, shard=self.shard,
        )  # fmt: skip
        if self.rswa_window is not None and m.rswa_prefix_lens is not None:
            num_seqs = m.seq_lens.shape[0]
            self.leading[:num_seqs].copy_(m.rswa_prefix_lens[:num_seqs], non_blocking=True)
            step = self.with_leading(step)
        spanned = m.mm_req_doc_ranges and m.max_query_len > 1
        return self.with_spans(step, m.mm_req_doc_ranges) if spanned else step

    def with_spans(self, step: Step, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> Step:
        """The step with the spans of images in prompts: first and last position of each, by request.

        A step of single tokens needs none: they are past their prompt, or the last of it, and vLLM cuts no span in two.
        """
        by_request = [ranges.get(b, ()) for b in range(step.seq_lens.shape[0])]
        most = max(map(len, by_request))
        if most == 0:
            return step
        filled = [[(first, last + 1) for first, last in own] + [(0, 0)] * (most - len(own)) for own in by_request]
        spans = torch.tensor(filled, dtype=torch.int32).to(self.device, non_blocking=True)
        clamped = any(getattr(layer, "mm_prefix_clamp_sliding_window", False) for layer in self.layers)
        return replace(step, spans=spans, whole_spans=not clamped)

    def with_leading(self, step: Step) -> Step:
        """The step with R-SWA's window in place of the layers'."""
        return replace(step, size=self.rswa_window, global_tokens=self.leading[: step.seq_lens.shape[0]])

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Step:
        """A step to capture with: lengths of 1 make its runs short. Replays have lengths of their own."""
        step = self.build(0, common_attn_metadata)
        step.seq_lens.fill_(1)
        return step

    def update_block_table(self, metadata: Step, blk_table: Tensor, slot_mapping: Tensor) -> Step:
        """The same step over the pages of another group."""
        return metadata.over(blk_table, slot_mapping)
