"""Where the GPU's time goes in a step: attention, writing the cache, and the rest, by the names of kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

OURS = {
    "split_kernel": "attention",
    "reduce_kernel": "attention",
    "tile_kernel": "attention",
    "hopper_tile_kernel": "attention",
    "dequantise_kernel": "attention",
    "merge_kernel": "attention",
    "append_kernel": "append",
}
"""swath's kernels, by their whole names: others have these within theirs."""
PARTS = {
    "append": ("reshape_and_cache", "reshape_cache_per_token_head", "kv_cache_update", "store_kvcache"),
    "attention": (
        "flash",
        "unified_attention",
        "reduce_segments",
        "varlen_num_blocks",
        "scaled_fp8_quant",
        "_fwd_kernel",
        "_fwd_grouped_kernel",
        "num_kv_splits",
    ),
}
"""What the kernels of engines have within their names; the first that fits counts. (vLLM's reshape_and_cache_flash is
no attention.) Queries that are quantised for attention count with it."""


class Kernel(NamedTuple):
    """A run of a kernel: its name and its begin and end in microseconds."""

    name: str
    begin: float
    end: float


class Spent(NamedTuple):
    """Microseconds in which at least one kernel of a kind ran."""

    gpu_us: float
    attention_us: float
    append_us: float

    def each(self, n: int) -> Spent:
        """Of one step among ``n``."""
        return Spent(*(us / n for us in self))


def kind_of(name: str) -> str:
    """What a kernel is for."""
    lower = name.lower()
    found = OURS.get(name)
    return found or next((kind for kind, parts in PARTS.items() if any(part in lower for part in parts)), "rest")


def spent(kernels: Iterable[Kernel]) -> Spent:
    """The time of each kind. Kernels that overlap are not counted twice."""
    runs = list(kernels)
    attention, append = ([run for run in runs if kind_of(run.name) == kind] for kind in ("attention", "append"))
    return Spent(*map(_union, (runs, attention, append)))


def _union(runs: list[Kernel]) -> float:
    total, last = 0.0, float("-inf")
    for run in sorted(runs, key=lambda run: run.begin):
        total += max(run.end - max(run.begin, last), 0.0)
        last = max(last, run.end)
    return total


@contextmanager
def profiled(found: list[Kernel]) -> Iterator[None]:
    """Add the kernels that run within it to ``found``."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield
        torch.cuda.synchronize()
    found += [kernel for event in profiler.events() or () if (kernel := _kernel(event)) is not None]


def _kernel(event: Any) -> Kernel | None:
    if not str(event.device_type).endswith("CUDA") or event.name.startswith(("Memcpy", "Memset")):
        return None
    return Kernel(event.name, event.time_range.start, event.time_range.end)
