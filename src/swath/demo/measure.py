"""Perplexity of a text, peak cache bytes and decode speed, all through swath's paged cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swath import KVQuant, Window, hf
from swath.demo.settings import Budget
from swath.testing.cases import NAMES

ATTENTION = "swath-demo"
PAGE_SIZE = 16


@dataclass(frozen=True)
class Case:
    """What one row of the table measures: a model whose layers see ``window`` (None: what its config says).

    kv is "none" (the model's dtype), "int8" or "fp8"; ``attention`` is the row's name. ``before`` tokens of other text
    are read first, and ``leading_positions`` says where leading tokens stand then (see ``PagedCache``).
    """

    attention: str
    model: Any
    window: Window | None
    kv: str
    before: int = 0
    leading_positions: str = "text"


@dataclass(frozen=True)
class Row:
    """A row of the table; bytes are those of K, V and their scales over all layers."""

    attention: str
    kv: str
    perplexity: float
    peak_cache_bytes: int
    full_bf16_cache_bytes: int
    decode_tokens_per_s: float
    tokens_before: int = 0


def open_cache(case: Case) -> Any:
    """Make the model attend through swath under the case's window, and give it an empty paged cache."""
    hf.register(ATTENTION, window=case.window)
    case.model.set_attn_implementation(ATTENTION)
    quant = None if case.kv == "none" else case.kv
    options: dict[str, Any] = dict(page_size=PAGE_SIZE, leading_positions=case.leading_positions)
    return hf.PagedCache(case.model.config, quant=quant, **options)


def stored(case: Case) -> str:
    """What the case's cache holds: "fp32", "bf16", "int8", "fp8"."""
    return NAMES[case.model.dtype] if case.kv == "none" else case.kv


def full_bf16_bytes(config: Any, tokens: int) -> int:
    """Bytes of a 16-bit cache that keeps every token in every layer."""
    c = config.get_text_config(decoder=True)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    per_layer = KVQuant(torch.bfloat16).bytes_per_token(c.num_key_value_heads, head_dim)
    return int(c.num_hidden_layers * tokens * per_layer)


@torch.no_grad()
def measure(case: Case, ids: Tensor, budget: Budget, advance: Callable[[int], None]) -> Row:
    """Measure one case on ``ids`` [case.before + tokens]; ``advance(n)`` is told of every n tokens done."""
    cache = open_cache(case)
    ids = ids.to(case.model.device)
    perplexity = score(case.model, cache, ids, budget, advance)
    peak = int(cache.nbytes_peak)
    seconds = []
    for step in decode_seconds(case.model, cache, ids[-1], budget.decode_steps):
        seconds.append(step)
        advance(1)
    full = full_bf16_bytes(case.model.config, len(ids))
    return Row(case.attention, stored(case), perplexity, peak, full, 1 / statistics.median(seconds), case.before)


def score(model: Any, cache: Any, ids: Tensor, budget: Budget, advance: Callable[[int], None]) -> float:
    """Perplexity of the last ``budget.scored`` tokens of ``ids``, read in chunks as a server prefills."""
    first = len(ids) - budget.scored - 1  # The logits at a position predict the token after it.
    loss = 0.0
    for start in range(0, len(ids), budget.chunk):
        end = min(start + budget.chunk, len(ids))
        keep = max(end - max(start, first), 1)
        logits = model(
            input_ids=ids[None, start:end], past_key_values=cache, use_cache=True, logits_to_keep=keep
        ).logits[0]
        if end > first:
            targets = ids[max(start, first) + 1 : end + 1]
            loss += F.cross_entropy(logits[: len(targets)].float(), targets, reduction="sum").item()
        advance(end - start)
    return math.exp(loss / budget.scored)


def decode_seconds(model: Any, cache: Any, token: Tensor, steps: int) -> Iterator[float]:
    """Seconds of each greedy decode step after ``token``; one first step, which may compile kernels, is not told."""
    for step in range(steps + 1):
        start = time.perf_counter()
        token = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1].argmax()
        token.item()  # Waits for the device.
        if step:
            yield time.perf_counter() - start
