"""``append_kv``: write new tokens into a paged cache, quantising on the way."""

from __future__ import annotations

from torch import Tensor

from swath import library
from swath.cache import PagedKV
from swath.ops.append import call


def append_kv(cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor, *, impl: str = "auto") -> None:
    """Write new tokens into their slots, in place.

    Token scales are computed (max|x| / 127 for int8, / 448 or / 57344 for fp8; 1 for a zero row) and written
    beside the values; other granularities use the cache's static scale. Rounding is half to even, saturated.

    Args:
        cache: the cache to write to.
        k, v: [T, Hkv, D], bf16, fp16 or fp32; any strides with the last one 1.
        slot_mapping: int64 [T], ``page * page_size + offset`` (see ``slots``). A slot outside the cache, -1 among
            them, is skipped. No slot may occur twice.
        impl: "auto" or the backend to use.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    if library.must_dispatch(cache, k, v):
        library.append_kv(cache, k, v, slot_mapping, impl)
        return
    call.execute(call.prepare(cache, k, v, slot_mapping), impl)
