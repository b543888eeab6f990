"""From the arguments of ``append_kv`` to a checked case, and to a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swath import checks, dispatch
from swath.cache import PagedKV
from swath.errors import bad_type, bad_value

OP = "append"


@dataclass(frozen=True, eq=False, slots=True)
class AppendCase:
    """New tokens k, v [T, Hkv, D] and their slots int64 [T] in ``cache``."""

    cache: PagedKV
    k: Tensor
    v: Tensor
    slot_mapping: Tensor


def prepare(cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor) -> AppendCase:
    """Check the arguments of ``append_kv`` (see there)."""
    if not isinstance(cache, PagedKV):
        raise bad_type("cache", "a PagedKV", type(cache).__name__)
    device = cache.k.device
    for name, x in (("k", k), ("v", v)):
        checks.check_tensor(name, x, 3, device)
        if x.dtype not in checks.Q_DTYPES:
            raise bad_type(name, "bfloat16, float16 or float32", x.dtype)
        if tuple(x.shape[1:]) != (cache.num_kv_heads, cache.head_dim):
            raise bad_value(name, f"shape [tokens, {cache.num_kv_heads}, {cache.head_dim}]", tuple(x.shape))
        checks.check_rows(name, x)
    checks.check_alike("v", v, "k", k)
    checks.check_tensor("slot_mapping", slot_mapping, 1, device)
    if slot_mapping.dtype != torch.int64:
        raise bad_type("slot_mapping", "int64", slot_mapping.dtype)
    if slot_mapping.shape[0] != k.shape[0]:
        raise bad_value("slot_mapping", f"shape [{k.shape[0]}], as k's tokens", tuple(slot_mapping.shape))
    checks.check_no_grad(k=k, v=v)
    return AppendCase(cache, k, v, slot_mapping)


def execute(case: AppendCase, impl: str) -> None:
    """Write the tokens."""
    dispatch.choose(OP, case, impl).run(case)
