"""FlashAttention-4 (CuTe DSL).

``window_size=(left, right)`` excludes the query's own key: a window of W visible keys is ``(W - 1, 0)``, none is
``(None, None)``. Queries are the last keys. Sinks are logits, ``learnable_sink``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider, features


def _why_not(case: BenchCase) -> str | None:
    return features(case, sink=True)


def _prepare(inputs: Inputs) -> Callable[[], Tensor]:
    from flash_attn.cute.interface import flash_attn_varlen_func

    window = inputs.case.size
    options: dict[str, Any] = {
        "causal": True,
        "window_size": (None, None) if window is None else (window - 1, 0),
        "learnable_sink": inputs.sink,
        "cu_seqlens_q": inputs.cu_q,
        "max_seqlen_q": inputs.max_q,
        "max_seqlen_k": inputs.max_kv,
        "num_splits": 0 if inputs.case.is_decode else 1,  # 0: its own choice
    }
    if inputs.case.dense:
        keys, options["cu_seqlens_k"] = inputs.dense, inputs.cu_k
    else:
        keys, options["seqused_k"], options["page_table"] = inputs.nhd, inputs.seq_lens, inputs.pages
    return lambda: flash_attn_varlen_func(inputs.q, *keys, **options)[0]


PROVIDERS = (Provider("fa4", _why_not, _prepare, module="flash_attn.cute", package="flash-attn-4"),)
