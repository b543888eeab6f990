"""torch's flex_attention, compiled, over dense keys: windows, leading tokens and bounds are a mask function of ours.

The block mask, which a server would keep for as long as its lengths hold, is made beforehand. Sequences of different
lengths lie end to end with a document mask in front of the window's rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider, features, first_of


def _why_not(case: BenchCase) -> str | None:
    without_leading = features(case, ranges=object) if not case.global_tokens else None
    return without_leading or first_of(
        (not case.dense, "has no paged keys of its own: tables are the caller's"),
        (case.has_sink, "has no sinks"),
    )


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, case = inputs.q.device, inputs.case
    q_doc, q_pos = _owners(case.row_counts, case.kv_lens, device)
    k_doc, k_pos = _owners(case.kv_lens, case.kv_lens, device)
    size, leading, ranges = case.size, case.global_tokens, inputs.call.ranges

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p, k = q_pos[i], k_pos[j]
        same = q_doc[i] == k_doc[j]
        if ranges is not None:
            return same & (ranges[i, 0] <= k) & (k < ranges[i, 1])
        seen = same & (k <= p)
        return seen if size is None else seen & ((p - k < size) | (k < leading))

    total_q, total_k = inputs.q.shape[0], inputs.dense[0].shape[0]
    blocks = create_block_mask(visible, None, None, total_q, total_k, device=str(device), _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, *inputs.dense))
    return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=case.group > 1)[0].transpose(0, 1)


def _owners(counts: tuple[int, ...], kv_lens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The sequence and the position of each token; a sequence's tokens are its last ``counts`` ones."""
    docs = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pos = torch.cat([torch.arange(n - c, n) for c, n in zip(counts, kv_lens, strict=True)])
    return docs.int().to(device), pos.int().to(device)


PROVIDERS = (Provider("flex", _why_not, _prepare, builds=True),)
