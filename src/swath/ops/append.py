"""``append_kv``: write new tokens into a paged cache, quantising on the way."""

from __future__ import annotations

from torch import Tensor

from swath import checks
from swath.cache import PagedKV
from swath.errors import bad_type, bad_value
from swath.ops import arguments
from swath.ops.operator import Operands, Operator, Options, Stages
from swath.problem import Accepted, AppendCase, Outputs


def append_kv(cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor, *, impl: str = "auto") -> None:
    """Write new tokens into their slots, in place.

    Token scales are computed (max|x| / 127 for int8, / 448 or / 57344 for fp8; 1 for a zero row) and written
    with the values; other granularities use the cache's static scale. Rounding is half to even, saturated.

    Args:
        cache: the cache to write to.
        k: [T, Hkv, D], v: [T, Hkv, Dv], bf16, fp16 or fp32; any strides with the last one 1.
        slot_mapping: int64 or int32 [T], ``page * page_size + offset`` (see ``slots``). A slot outside the cache, -1
            among them, is skipped. No slot may occur twice.
        impl: "auto" or the backend to use.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    APPEND_KV((cache, k, v, slot_mapping), {}, impl)


def _outputs(_accepted: Accepted, _operands: Operands, _options: Options) -> Outputs:
    return None, None


def _case(accepted: Accepted, operands: Operands, _options: Options, _outputs: Outputs) -> AppendCase:
    cache, k, v, slot_mapping = operands
    return AppendCase(cache, k, v, slot_mapping, accepted.memo)


def prepare(cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor) -> AppendCase:
    """Check the arguments of ``append_kv`` (see there)."""
    return STAGES.prepare((cache, k, v, slot_mapping), {})


def _check(cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor) -> Accepted:
    """Every check of a call whose signature was not met before."""
    if not isinstance(cache, PagedKV):
        raise bad_type("cache", "a PagedKV", type(cache).__name__)
    device = cache.k.device
    for name, x, width in (("k", k, cache.head_dim), ("v", v, cache.v_head_dim)):
        checks.check_tensor(name, x, 3, device)
        if x.dtype not in arguments.Q_DTYPES:
            raise bad_type(name, "bfloat16, float16 or float32", x.dtype)
        if tuple(x.shape[1:]) != (cache.num_kv_heads, width):
            raise bad_value(name, f"shape [tokens, {cache.num_kv_heads}, {width}]", tuple(x.shape))
        checks.check_rows(name, x)
    checks.check_values(v, k)
    checks.check_ints("slot_mapping", slot_mapping, k.shape[0], device)
    checks.check_no_grad(k=k, v=v)
    cache.check_writable()
    return Accepted({}, cache.v_head_dim)


STAGES = Stages(_check, _outputs, _case)
ARGUMENTS = {"cache": PagedKV, "k": Tensor, "v": Tensor, "slot_mapping": Tensor}
APPEND_KV = Operator("append_kv", "append", prepare, lambda case: case.result, ARGUMENTS, {}, "()", ("cache",), STAGES)
