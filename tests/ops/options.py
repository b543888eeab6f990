"""The options of the attention operators as case fields: each alone, and a covering set of all pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from swath.quant import KVQuant
from swath.target import interpreting
from swath.testing import Case, pairwise

Fields = dict[str, Any]

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

STORAGE: list[Fields] = [
    {},
    {"dtype": F16},
    {"dtype": F32},
    {"quant": KVQuant(INT8, "tensor")},
    {"quant": KVQuant(INT8, "head"), "dtype": F16},
    {"quant": KVQuant(INT8, "channel"), "scale_dtype": B16},
    {"quant": KVQuant(INT8, "token")},
    {"quant": KVQuant(INT8, "token"), "dtype": F16, "scale_dtype": B16},
    {"quant": KVQuant(INT8, "channel", "token"), "dtype": F32},
    {"quant": KVQuant(INT8, "token", "channel")},
    {"quant": KVQuant(INT8, "head", "tensor"), "compute": "int8"},
    {"quant": KVQuant(INT8, "channel"), "compute": "int8", "dtype": F16},
    {"quant": KVQuant(INT8, "channel", "head"), "compute": "fast"},
    {"quant": KVQuant(E4M3)},
    {"quant": KVQuant(E4M3, "tensor", "head"), "dtype": F16},
    {"quant": KVQuant(E4M3, "token"), "dtype": F32},
    {"quant": KVQuant(E5M2, "none", "channel")},
    {"quant": KVQuant(E4M3, "tensor"), "dtype": E4M3, "q_scale": "tensor"},
    {"quant": KVQuant(E5M2, "token"), "dtype": E4M3, "q_scale": "token"},
    {"quant": KVQuant(INT8, "channel"), "dtype": E4M3},
]
"""Types of q and of the cache."""

LENGTHS: list[Fields] = [
    {},
    {"kv_lens": (0, 1, 64)},
    {"kv_lens": (15, 16, 17)},
    {"kv_lens": (-2, 193, 5)},
]

QUERIES: list[Fields] = [
    *({"q_lens": steps} for steps in range(1, 9)),
    {"q_lens": 20},
    {"q_lens": (5, 33, 60)},
    {"q_lens": (1, 0, 70), "tail": 3},
]
"""Decode, n-step decode, more steps than decode takes, ragged prefill, a mixed batch with rows of nobody at the end."""

WINDOWS: list[Fields] = [
    {},
    {"size": 1},
    {"size": 18},
    {"size": 64},
    {"size": 1000},
    {"size": 0},
    {"size": 0, "global_tokens": 5},
    {"size": 18, "global_tokens": 4},
    {"size": 18, "global_tokens": (0, 3, 40)},
    {"size": 18, "global_tokens": (1, 40, 17), "max_global_tokens": 40},
    {"causal": False},
    {"size": 9, "causal": False},
    {"size": 9, "global_tokens": 4, "causal": False},
    {"ranges": "random", "global_tokens": 4},
    {"ranges": "blocks in window"},
]

SHARED: dict[str, list[Fields]] = {
    "lengths": LENGTHS,
    "window": WINDOWS,
    "heads": [{"group": 2}, {"group": 1}, {"group": 3}, {"group": 5}, {"group": 7}, {"group": 8},
              {"group": 64, "num_kv_heads": 1}],
    "head_dim": [*({"head_dim": d} for d in (64, 80, 96, 128, 192, 256, 512)), {"head_dim": 192, "v_head_dim": 128}],
    "gqa": [{}, {"gqa": "interleaved"}],
    "softcap": [{}, {"softcap": 5.0}],
    "sink": [{}, {"sink": "fp32"}, {"sink": "q"}],
    "scale": [{}, {"scale": 0.03}, {"scale": 0.5}],
    "q_start": [{}, {"q_start": (0, -2, 100)}, {"q_start": (30, 40, 3)}],
    "bounds": [{}, {"bounds": "tight"}, {"bounds": "loose"}],
    "strided": [{}, {"strided": True}],
    "index_dtype": [{}, {"index_dtype": torch.int64}],
    "spiked": [{}, {"spiked": True}],
}  # fmt: skip

PAGED: dict[str, list[Fields]] = {
    "storage": STORAGE,
    "queries": QUERIES,
    **SHARED,
    "page_size": [{}, *({"page_size": p} for p in (1, 8, 48, 64))],
    "table": [{}, {"table": "flat"}, {"table": "rows"}],
    "unit": [{}, {"unit": "token"}],
    "layout": [{}, *({"layout": x} for x in ("nhd", "packed", "packed hnd", "padded", "apart"))],
    "split_size": [{}, {"split_size": 64}, {"split_size": 128}],
    "holes": [{}, {"holes": True}],
}

DENSE: dict[str, list[Fields]] = {
    "storage": [{}, {"dtype": F16}, {"dtype": F32}],
    "queries": [{"q_lens": (5, 33, 60)}, {"q_lens": (1, 0, 70), "tail": 3}, {"q_lens": (1, 1, 1)}],
    **SHARED,
}


def alone(options: Mapping[str, Sequence[Fields]], **base: Any) -> list[Case]:
    """Every option alone, on a spiked case, where a mistake of one key shows."""
    cases = [Case(**{"spiked": True, **base, **fields}) for values in options.values() for fields in values]
    return list(dict.fromkeys(cases))


FEW_TOKENS = {(5, 33, 60): (5, 17, 20), (1, 0, 70): (1, 0, 18)}
"""Prefill in one row tile of the interpreter's for each sequence."""


def in_pairs(options: Mapping[str, Sequence[Fields]], **base: Any) -> list[Case]:
    """A covering set: every two values of different options meet.

    The interpreter runs prefill of 64 heads in as many programs, a third of its time: there fewer heads and tokens
    stand for them, of which tiles are made alike. It has 64 heads in prefill alone, and in decode in all pairs.
    """
    cases = []
    for row in pairwise(options):
        fields = {**base, **{name: value for values in row.values() for name, value in values.items()}}
        if interpreting() and fields["group"] == 64 and isinstance(fields["q_lens"], tuple):
            fields |= {"group": 16, "q_lens": FEW_TOKENS.get(fields["q_lens"], fields["q_lens"])}
        cases.append(Case(**fields))
    return list(dict.fromkeys(cases))
