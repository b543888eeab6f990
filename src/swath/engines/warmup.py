"""Compiling what a served model will need while its engine starts, so that no request waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.engines.common import Layer, Step
from swath.ops.append import append_kv
from swath.ops.explain import in_threads, warmup
from swath.ops.merge import merge_states
from swath.ops.paged import paged_attention
from swath.ops.signature import cache_look

LONGEST_CHUNK = 4096
"""Query tokens from which a longer prompt needs no other kernel."""
CONTEXTS = (64, 256, 1024)
"""Keys of short contexts, for which decode has kernels of its own."""
FEW_TOKENS = (1, 4, 8, 16)
"""Query tokens of sequences that are decoded, or nearly so."""


@dataclass(frozen=True)
class Traffic:
    """What an engine may send in a step, at most: sequences, tokens in all, and keys of a sequence.

    steps: query tokens of a sequence in decode: 1, and with speculation those that are verified at once.
    """

    max_seqs: int
    max_tokens: int
    max_kv_len: int
    steps: tuple[int, ...] = (1,)

    def shapes(self) -> Iterator[tuple[int, int, int, int]]:
        """Steps that need different kernels, more or less: ``(num_seqs, num_tokens, max_q_len, max_kv_len)``.

        Few tokens for ever more sequences, over short contexts and long ones; prompts, alone and in chunks of a long
        one; and both in one batch: beside the longest chunk ever more sequences, which fill the GPU uncut or do not.
        """
        longest_chunk = min(self.max_tokens, LONGEST_CHUNK)
        contexts = sorted({min(n, self.max_kv_len) for n in (*CONTEXTS, self.max_kv_len)})
        for kv_len in contexts:
            for num_seqs in rising(self.max_seqs):
                for steps in sorted({*self.steps, *FEW_TOKENS}):
                    if num_seqs * steps <= self.max_tokens:
                        yield num_seqs, num_seqs * steps, steps, kv_len
            for tokens in rising(longest_chunk):
                batches = rising(self.max_seqs) if tokens == longest_chunk else (1, 8, self.max_seqs)
                for num_seqs in sorted({min(n, self.max_seqs, tokens) for n in batches}):
                    longest = tokens - num_seqs + 1
                    yield num_seqs, tokens, longest, max(kv_len, longest)


def rising(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on, and ``most``."""
    n = 1
    while n < most:
        yield n
        if n > 1 and n + n // 2 < most:
            yield n + n // 2
        n *= 2
    yield most


def warm(
    layers: Iterable[tuple[Layer, PagedKV, int]], dtype: torch.dtype, traffic: Traffic,
    steps_of: Callable[[int, int, int, int], Sequence[Step]],
) -> int:  # fmt: skip
    """Compile the kernels of layers. Nothing runs, and nothing is compiled twice for layers that are alike.

    Args:
        layers: each with a cache laid out as the engine's, of any number of pages, and its number of query heads.
        dtype: of queries.
        traffic: what the engine may send.
        steps_of: the steps that the engine may make of these sequences, tokens, longest query and longest context,
            their tensors as the engine's, also in how addresses are aligned.

    Returns:
        The calls that were compiled.
    """
    calls = 0
    for layer, cache, num_q_heads in layers:
        sink = None if layer.sink is None else layer.sink.dtype
        with torch.no_grad():
            few = steps_of(1, 2, 2, 2)
            spanned, shard = any(step.spans is not None for step in few), few[0].shard
            kind = (layer.numbers, layer.impl, sink, cache_look(cache), num_q_heads, dtype, traffic, spanned, shard)
        if kind in _warmed:
            continue
        _warmed.add(kind)
        with in_threads(cache.k.device):
            for step in (step for sizes in traffic.shapes() for step in steps_of(*sizes)):
                q = torch.empty(step.num_tokens, num_q_heads, cache.head_dim, dtype=dtype, device=cache.k.device)
                arguments, options = step.call(layer, q, cache, q.new_empty(*q.shape[:-1], cache.v_head_dim))
                options["return_lse"] = shard is not None
                warmup(paged_attention, *arguments, **options, impl=layer.impl)
                calls += 1
            warmup(append_kv, cache, *new_tokens(cache, dtype))
            if shard is not None:
                warm_merge(shard.world_size, num_q_heads // shard.world_size, cache, dtype)
    return calls


_warmed: set[object] = set()
"""Kinds of layers that this process has compiled for: engines make their metadata builders more than once."""


def warm_merge(ranks: int, num_heads: int, cache: PagedKV, dtype: torch.dtype) -> None:
    """Compile the merge of what ranks found for the heads of one."""
    for tokens in (1, 2, 4):  # how a state is aligned goes by its tokens
        outs = torch.empty(ranks, tokens, num_heads, cache.v_head_dim, dtype=dtype, device=cache.k.device)
        warmup(merge_states, outs, outs[..., 0].float(), dtype=torch.float32)


def new_tokens(cache: PagedKV, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and slots of one token."""
    k = torch.empty(1, cache.num_kv_heads, cache.head_dim, dtype=dtype, device=cache.k.device)
    v = k.new_empty(1, cache.num_kv_heads, cache.v_head_dim)
    return k, v, torch.empty(1, dtype=torch.int64, device=cache.k.device)
