"""The baseline ``scalar``: a kernel of one program for each query token and head (see scalar_kernel.py).

Windows count the visible keys, the query's own included; -1 is no window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swath.backends.triton.features import FUSED
from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider, first_of
from swath.target import interpreting

BLOCK_N, WARPS = 32, 4


def _why_not(case: BenchCase) -> str | None:
    return first_of(
        (case.dtype == torch.float8_e4m3fn, "has no fp8 queries"),
        (case.dense, "takes paged keys only"),
        (case.compute != "float", f"has no compute={case.compute!r}"),
        (case.v_dim != case.head_dim, "has values as wide as keys only"),
        (bool(case.ranges), "has no bounds of rows"),
    )


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    from swath.bench.scalar_kernel import scalar_kernel

    case, cache, q = inputs.case, inputs.cache, inputs.q
    owners = torch.repeat_interleave(torch.arange(case.num_seqs), torch.tensor(case.row_counts))
    positions = [torch.arange(kv - n, kv) for n, kv in zip(case.row_counts, case.kv_lens, strict=True)]
    row_seq, row_pos = (x.int().to(q.device) for x in (owners, torch.cat(positions)))
    kind, scale = cache.quant.k, cache.k_scale
    strides = {"token": () if scale is None else scale.stride(), "channel": (0, case.head_dim, 0)}.get(kind, (0, 0, 0))
    out = torch.empty_like(q)

    def run() -> Tensor:
        scalar_kernel[(q.shape[0], case.num_q_heads)](
            q, cache.k, cache.v, out, inputs.sink, scale, cache.v_scale, inputs.pages, row_seq, row_pos,
            case.head_dim**-0.5, -1 if case.size is None else case.size, case.global_tokens,
            case.group, *cache.k.stride()[:3], *strides, inputs.pages.stride(0),
            HEADS=case.num_q_heads, DIM=case.head_dim, PADDED_DIM=1 << (case.head_dim - 1).bit_length(),
            PAGE=case.page_size, KIND=kind, HAS_SINK=inputs.sink is not None, BLOCK_N=BLOCK_N, num_warps=WARPS, **FUSED,
        )  # fmt: skip
        return out

    return run


PROVIDERS = (
    Provider("scalar", _why_not, _prepare, module="triton", devices=("cuda", "cpu") if interpreting() else ("cuda",)),
)
