"""torch's scaled_dot_product_attention: its fused kernels on causal cases, and with a mask, a sequence at a time.

The fused kernels have no windows and want the queries to be all keys of the batch. ``torch`` takes a boolean mask of
(query, key) pairs, so any window can be written down; masks, gathered keys and repeated heads are made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from swath.bench.case import BenchCase, Groups
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider, features, first_of
from swath.window import Window

FUSED = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
MAX_PREPARED_BYTES = 24 << 30


def _why_not_fused(case: BenchCase) -> str | None:
    groups = case.draw.groups if isinstance(case.draw, Groups) else ()
    square = len(groups) == 1 and groups[0][1] == groups[0][2]
    return features(case) or first_of(
        (not case.dense, "has no paged keys"),
        (case.size is not None, "has no window"),
        (not square, "its causal mask wants as many queries as keys, in every sequence"),
    )


def _prepare_fused(backend: SDPBackend, inputs: Inputs) -> Callable[[], Tensor]:
    batch = inputs.case.num_seqs
    q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (inputs.q, *inputs.dense))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def _why_not_masked(case: BenchCase) -> str | None:
    return first_of(
        (case.dtype == torch.float8_e4m3fn, "has no fp8 queries"),
        (case.has_sink, "has no sinks"),
        (case.compute != "float", f"has no compute={case.compute!r}"),
    )


def _prepare_masked(inputs: Inputs) -> Callable[[], Tensor]:
    case = inputs.case
    needed = 2 * sum(case.kv_lens) * case.num_q_heads * case.head_dim * inputs.q.element_size()
    needed += sum(q * kv for q, kv in zip(case.row_counts, case.kv_lens, strict=True))
    if needed > MAX_PREPARED_BYTES:
        raise NotImplementedError(f"its masks and repeated keys would take {needed / 2**30:.0f} GiB")
    calls = [_one_sequence(inputs, b) for b in range(inputs.case.num_seqs)]
    return lambda: torch.cat([call() for call in calls])


def _one_sequence(inputs: Inputs, b: int) -> Callable[[], Tensor]:
    q, k, v = inputs.of_sequence(b)
    keys, values = (x.repeat_interleave(inputs.case.group, 1).transpose(0, 1)[None].contiguous() for x in (k, v))
    q_len, kv_len = inputs.case.row_counts[b], inputs.case.kv_lens[b]
    positions = torch.arange(kv_len, device=q.device)
    window, ranges = inputs.case.window, inputs.call.ranges
    if ranges is not None:
        window = Window(bounds=ranges.flatten(0, -2)[inputs.cu_q[b] : inputs.cu_q[b + 1]])
    mask = window.mask(positions[kv_len - q_len :], positions)
    rows = q.transpose(0, 1)[None]
    return lambda: scaled_dot_product_attention(rows, keys, values, attn_mask=mask)[0].transpose(0, 1)


PROVIDERS = (
    *(Provider(name, _why_not_fused, partial(_prepare_fused, backend)) for name, backend in FUSED.items()),
    Provider("torch", _why_not_masked, _prepare_masked, devices=("cuda", "cpu")),
)
