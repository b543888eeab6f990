"""The attention backend: a forward pass as all layers see it, and the attention of a layer."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

from swath.cache import PagedKV
from swath.engines import common
from swath.engines.common import Layer, Step
from swath.engines.sglang import versions
from swath.engines.sglang.refusals import chain_length, check_drafts, check_layer, check_model, check_pool
from swath.engines.warmup import LONGEST_CHUNK, Traffic, warm
from swath.errors import bad_value
from swath.pages import PageTable

logger = logging.getLogger(__name__)


class Steps(NamedTuple):
    """A forward pass, as layers see it that keep all keys, and those whose pool keeps no more than their window."""

    full: Step
    window: Step | None
    padded: bool  # rows of q that belong to no sequence may follow


class Kept(NamedTuple):
    """A layer's constants and its cache, and what they were made of."""

    layer: Layer
    cache: PagedKV
    windowed: bool
    pool: tuple[int, int]
    given: tuple[Any, ...]


class SwathBackend(AttentionBackend):  # type: ignore[misc]  # SGLang ships no types
    """Attention of one model, by its ``ModelRunner``. What swath cannot do is refused here, while the engine starts.

    Two tables serve all layers. The one of all keys is SGLang's table of requests, read in place. Layers whose window
    has a pool of its own get a table of the pages that their rows can see, in that pool's numbers.
    """

    needs_cpu_seq_lens = False
    impl = "auto"  # of swath's own backends

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.token_to_kv_pool = self.pool = runner.token_to_kv_pool
        self.requests: Tensor = runner.req_to_token_pool.req_to_token  # int32 [requests, context]: a slot a token
        self.page_size: int = self.pool.page_size
        self.dtype: torch.dtype = runner.model_config.dtype
        self.window: int | None = None  # keys that the window's pool keeps of a sequence
        self.settings = versions.settings(runner)
        self.mistaken_type = versions.mistaken_type(runner)
        self.split_size = common.BATCH_INVARIANT_SPLIT if self.settings.deterministic else None
        self.forward_metadata: Steps | None = None
        self._kept: dict[Any, Kept] = {}
        self._captured: dict[tuple[Any, ...], Steps] = {}
        check_model(runner)
        check_drafts(self.settings)
        two = type(self.pool) is SWAKVPool
        for pool in (self.pool.full_kv_pool, self.pool.swa_kv_pool) if two else (self.pool,):
            check_pool(pool)
        if two and self.pool.swa_layer_nums:
            self.window = common.window_size(runner.sliding_window_size)
        for layer in runner.model.modules():
            if isinstance(layer, RadixAttention):
                self._check_layer(layer)

    # ---- a forward pass ---------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare an eager forward pass."""
        self.forward_metadata = self._steps(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: the tensors of a captured pass are made at its capture, and stay."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of requests that pad a captured batch."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare a pass that is captured, or replayed: the same pass over tensors that stay where they are.

        Nothing is left to ``init_forward_metadata_in_graph``: 0.5.15 lets go of the window's pages before a replay.
        """
        new = self._steps(forward_batch, graph=True)
        key = forward_batch.forward_mode, forward_batch.batch_size, new.full.num_tokens
        if in_capture and key not in self._captured:
            self._captured[key] = Steps(_owning(new.full), new.window and _owning(new.window), new.padded)
        mine = self._captured[key]
        _refill(mine.full, new.full)
        if mine.window is not None and new.window is not None:
            _refill(mine.window, new.window)
        self.forward_metadata = mine

    def shared_read_ends(self, fm: Any) -> Any:
        """Where SGLang's scheduler may write to the table of requests again."""
        return versions.read_to_the_end()

    def _steps(self, batch: Any, graph: bool = False) -> Steps:
        """A pass over copies of SGLang's lengths; for graphs, with bounds that hold for every batch of its shape."""
        mode, num_seqs, num_tokens = batch.forward_mode, batch.batch_size, batch.input_ids.shape[0]
        seq_lens, rows = batch.seq_lens[:num_seqs].int(), batch.req_pool_indices[:num_seqs].int()
        cu_seqlens_q, padded, drafts = None, False, 0
        if mode.is_dllm_extend():
            raise bad_value("forward_mode", "a mode of causal attention", mode.name)
        if mode.is_target_verify():
            max_q_len = drafts = chain_length(batch.spec_info)
            seq_lens = seq_lens + drafts  # SGLang counts the tokens that were accepted
        elif mode.is_decode_or_idle():
            max_q_len = 1
        elif mode.is_draft_extend_v2() and graph:
            max_q_len = batch.out_cache_loc.shape[0] // num_seqs
        else:
            cu_seqlens_q = torch.zeros(num_seqs + 1, dtype=torch.int32, device=seq_lens.device)
            torch.cumsum(batch.extend_seq_lens[:num_seqs], 0, dtype=torch.int32, out=cu_seqlens_q[1:])
            known = None if graph else batch.extend_seq_lens_cpu
            padded = known is None or sum(known) != num_tokens
            max_q_len = max(known or [num_tokens])
        if cu_seqlens_q is None:
            num_tokens = num_seqs * max_q_len
        known = None if graph else batch.seq_lens_cpu
        max_kv_len = self.requests.shape[1] if known is None or not known.numel() else int(known.max()) + drafts
        return self._both(rows, seq_lens, batch.out_cache_loc, num_tokens, max_q_len, max_kv_len, cu_seqlens_q, padded)

    def _both(
        self, rows: Tensor, seq_lens: Tensor, slots: Tensor, num_tokens: int, max_q_len: int, max_kv_len: int,
        cu_seqlens_q: Tensor | None, padded: bool,
    ) -> Steps:  # fmt: skip
        """The pass of these sequences, by rows of the table of requests."""
        table = PageTable(self.requests, rows=rows, unit="token")
        full = Step(table, seq_lens, slots[:num_tokens], num_tokens, max_q_len, max_kv_len, cu_seqlens_q)
        return Steps(full, None if self.window is None else self._window_step(full, rows, self.window), padded)

    def _window_step(self, full: Step, rows: Tensor, size: int) -> Step:
        """The same pass over the pages of the window's pool.

        Its table and lengths begin at the page of the first key that a sequence's first query can see. So they are as
        long as the window, whatever the context; SGLang has freed what comes before.
        """
        q_len = full.max_q_len if full.cu_seqlens_q is None else full.cu_seqlens_q.diff()
        unit = math.lcm(self.page_size, self.split_size or 1)  # cuts of the keys stay where they are
        first = (full.seq_lens - q_len - (size - 1)).clamp_(min=0)
        first -= first % unit
        longest = min(size - 1 + full.max_q_len + unit - 1, full.max_kv_len)
        starts = torch.arange(0, longest, self.page_size, dtype=torch.int32, device=first.device)
        at = (first[:, None] + starts).clamp_(max=self.requests.shape[1] - 1)
        to_window = self.pool.translate_loc_from_full_to_swa
        pages = to_window(self.requests[rows[:, None], at]).div(self.page_size, rounding_mode="floor").int()
        return replace(
            full, block_table=pages, seq_lens=full.seq_lens - first, slots=to_window(full.slots), max_kv_len=longest
        )

    # ---- a layer ----------------------------------------------------------------------------------------------------

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, sinks: Tensor | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of q, one token a sequence, after its k and v are written."""
        return self._attend(q, k, v, layer, save_kv_cache, sinks, others)

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,
        save_kv_cache: bool = True, sinks: Tensor | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of q in prefill, mixed batches, and over drafts, after its k and v are written."""
        return self._attend(q, k, v, layer, save_kv_cache, sinks, others)

    def _attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, save: bool, sinks: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """q [T, Hq * D], k [T, Hkv, D] and v [T, Hkv, Dv] or flat; the result is [T, Hq * Dv]."""
        for name, value in others.items():
            if value is not None:
                raise bad_value(name, "None: swath has no such option", type(value).__name__)
        kept, steps = self._kept_of(layer, sinks), self.forward_metadata
        if steps is None:
            raise bad_value("forward_metadata", "init_forward_metadata before attention", None)
        step = steps.window if kept.windowed and steps.window is not None else steps.full
        if save and k is not None and v is not None:
            k = k.reshape(-1, layer.tp_k_head_num, layer.head_dim)
            v = v.reshape(-1, layer.tp_k_head_num, layer.v_head_dim)
            kept.layer.append(kept.cache, k, v, step.slots[: k.shape[0]])
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        padded = steps.padded or q.shape[0] > step.num_tokens
        out = (q.new_zeros if padded else q.new_empty)(*q.shape[:2], layer.v_head_dim)
        step.attend(kept.layer, q, kept.cache, out)
        return out.flatten(1)

    def _kept_of(self, layer: Any, sinks: Tensor | None) -> Kept:
        """A layer's constants and cache, made when it is first met, or its pool was laid anew."""
        k = self.pool.get_key_buffer(layer.layer_id)  # waits for keys that come from the host
        kept = self._kept.get(layer)
        pool, given = (k.data_ptr(), k.shape[0]), (layer.k_scale, layer.v_scale, sinks)
        if kept is None or kept.pool != pool or any(a is not b for a, b in zip(kept.given, given, strict=True)):
            self._check_layer(layer)
            size = common.window_size(layer.sliding_window_size)
            constants = Layer(size, layer.scaling, layer.logit_cap, sinks, self.split_size, self.impl)
            kept = self._kept[layer] = Kept(constants, self._cache(layer, k), self._windowed(layer), pool, given)
            self._warm(layer, kept)
        return kept

    def _warm(self, layer: Any, kept: Kept) -> None:
        """Compile what a layer will need. SGLang runs every layer once before it takes requests."""
        if not kept.cache.k.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        begin = time.perf_counter()
        if calls := self._warm_for(layer, kept):
            took = time.perf_counter() - begin
            logger.info("swath compiled %d calls for layers as %d in %.1f s", calls, layer.layer_id, took)

    def _warm_for(self, layer: Any, kept: Kept) -> int:
        """Compile what a layer will need: the calls that were compiled."""
        traffic = Traffic(self.requests.shape[0] - 1, LONGEST_CHUNK, self.requests.shape[1], self._uniform)
        of_layer = [(kept.layer, kept.cache, layer.tp_q_head_num)]
        return warm(of_layer, self.dtype, traffic, partial(self._steps_like, kept.windowed))

    @property
    def _uniform(self) -> tuple[int, ...]:
        """Tokens of each sequence, in passes where all have as many."""
        return (1,) if not self.settings.drafts else (1, self.settings.drafts)

    def _steps_like(
        self, windowed: bool, num_seqs: int, num_tokens: int, max_q_len: int, max_kv_len: int
    ) -> list[Step]:  # fmt: skip
        """The steps of this shape, their tensors as those of a pass: kernels are compiled for how these are aligned.

        Sequences of one token each are decode or prompts of which the cache has all the rest; those of several are
        drafts that are verified, or prompts.
        """
        rows, seq_lens, cu_seqlens_q = (
            torch.zeros(n, dtype=torch.int32, device=self.requests.device) for n in (num_seqs, num_seqs, num_seqs + 1)
        )
        slots = torch.zeros(num_tokens, dtype=torch.int64, device=self.requests.device)
        uniform = max_q_len in self._uniform and num_tokens == num_seqs * max_q_len
        passes = [
            self._both(rows, seq_lens, slots, num_tokens, max_q_len, max_kv_len, cu, False)
            for cu in ((None, cu_seqlens_q) if uniform else (cu_seqlens_q,))
        ]
        return [x.window if windowed and x.window is not None else x.full for x in passes]

    def _windowed(self, layer: Any) -> bool:
        """Whether its keys are in the window's pool."""
        return self.window is not None and self.pool.layers_mapping[layer.layer_id][1]

    def _cache(self, layer: Any, k: Tensor) -> PagedKV:
        """The pools of a layer, [slots, Hkv, D], as pages, with static scales if they are of one byte."""
        slots = k.shape[0] // self.page_size * self.page_size  # what is left over is no page
        v = self.pool.get_value_buffer(layer.layer_id)
        scales = (layer.k_scale, layer.v_scale) if k.dtype.itemsize == 1 else (None, None)
        k_scale, v_scale = (None if x is None else x.detach().reshape(()) for x in scales)
        return common.nhd_cache(k[:slots], v[:slots], self.page_size, k.dtype, k_scale=k_scale, v_scale=v_scale)

    def _check_layer(self, layer: Any) -> None:
        """Refuse what swath does not compute, and a window larger than its pool keeps."""
        check_layer(layer, self.mistaken_type)
        size = common.window_size(layer.sliding_window_size)
        if self.window is not None and self._windowed(layer) and not (size and size <= self.window):
            raise bad_value("RadixAttention.sliding_window_size", f"at most {self.window - 1}, as its pool keeps", size)


def _numbers(step: Step) -> list[Tensor]:
    """What changes from batch to batch, but slots: the rows of a table, or the table, and lengths."""
    table = step.block_table.rows if isinstance(step.block_table, PageTable) else step.block_table
    return [x for x in (table, step.seq_lens, step.cu_seqlens_q) if isinstance(x, Tensor)]


def _owning(step: Step) -> Step:
    """A step over tensors of its own, for a graph that reads them at every replay."""
    index, seq_lens, *cu_seqlens_q = (x.clone() for x in _numbers(step))
    table = replace(step.block_table, rows=index) if isinstance(step.block_table, PageTable) else index
    cu = cu_seqlens_q[0] if cu_seqlens_q else None
    return replace(step, block_table=table, seq_lens=seq_lens, slots=step.slots.clone(), cu_seqlens_q=cu)


def _refill(mine: Step, new: Step) -> None:
    """Write a batch's numbers into a captured step. SGLang may give fewer slots than were captured: -1 is none."""
    for a, b in zip(_numbers(mine), _numbers(new), strict=True):
        a.copy_(b)
    used = new.slots.shape[0]
    mine.slots[:used].copy_(new.slots)
    mine.slots[used:].fill_(-1)
