"""Quantised caches: what a scale's rank means, quantise and dequantise in torch, and where scales fold.

value = stored x scale, symmetric. The granularity is the rank of the scale:

==== =========== ============================== ============================ =============================
rank granularity shape                          K folds into                 V folds into
==== =========== ============================== ============================ =============================
0    "tensor"    []                             the score scale              the output
1    "head"      [Hkv]                          the score scale              the output
2    "channel"   [Hkv, D], V's [Hkv, Dv]        q, before the dot            the output
3    "token"     [num_pages, Hkv, page_size]    the score columns            p, before the dot
==== =========== ============================== ============================ =============================

This table is the folding rule; ``fold_q``, ``score_scale``, ``fold_scores``, ``fold_p`` and ``fold_out`` below
apply it on the host and device/quant.py applies it in kernels. An unquantised cache is granularity "none".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swath.errors import bad_type, bad_value

GRANULARITIES = ("tensor", "head", "channel", "token")
"""Granularity by the rank of its scale."""

WIDE = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of values that are stored as they are."""

LARGEST: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The largest magnitude stored by each quantised dtype; int8 stays symmetric, so -128 is not used."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest token scale. A smaller one would lose bits, or be 0, and rows are divided by it."""

SCALE_DTYPES = (torch.float32, torch.bfloat16)

E4M3_KEYS = 1280
"""Keys at most over which ``compute="fast"`` may multiply p and V in e4m3.

Tensor cores of Hopper cut the products that they add to 13 bits of the sum so far. Of values with a mean of 1 and a
deviation of 0.5 that loses 1.5 % over 1,024 keys, 14 % over 8,192 and 51 % over 65,536, in FlashAttention-3 too. Over
this many keys, all alike, it is 2^-4 at most, half a step of p in e4m3. At worst it is 2^-13 a key: where one key
weighs 2^13 times as much as each other.
"""


def check_granularity(name: str, dtype: torch.dtype, granularity: str) -> None:
    """Check that a cache of this dtype may have such scales; "none" is for dtypes that need none."""
    allowed = ("none",) if dtype not in LARGEST else GRANULARITIES if dtype == torch.int8 else ("none", *GRANULARITIES)
    if granularity not in allowed:
        raise bad_value(name, f"one of {', '.join(map(repr, allowed))} for {dtype}", repr(granularity))


def granularity_of(scale: Tensor | None) -> str:
    """The granularity a scale tensor stands for: its rank, also where Hkv is 1."""
    return "none" if scale is None else GRANULARITIES[scale.dim()]


def check_scale(name: str, scale: Tensor | None, stored: Tensor) -> None:
    """Check a cache's scale against its stored tensor [num_pages, Hkv, page_size, D]."""
    if scale is None:
        if stored.dtype == torch.int8:
            raise bad_value(name, "a scale tensor for an int8 cache", None)
        return
    if stored.dtype not in LARGEST:
        raise bad_value(name, f"None for an unquantised {stored.dtype} cache", f"a tensor {tuple(scale.shape)}")
    if scale.dtype not in SCALE_DTYPES:
        raise bad_type(name, "float32 or bfloat16", scale.dtype)
    num_pages, num_kv_heads, page_size, head_dim = stored.shape
    shapes = ((), (num_kv_heads,), (num_kv_heads, head_dim), (num_pages, num_kv_heads, page_size))
    if tuple(scale.shape) not in shapes:
        raise bad_value(name, f"one of the shapes {', '.join(map(str, shapes))}", tuple(scale.shape))
    if scale.device != stored.device:
        raise bad_value(name, f"a tensor on {stored.device}", scale.device)


@dataclass(frozen=True)
class KVQuant:
    """How a cache stores keys and values: a dtype and a granularity for each of K and V.

    A worked example: ``KVQuant(torch.int8, "token")`` stores the key row ``[0.5, -2.54, 1.0]`` with the scale
    2.54 / 127 = 0.02 as ``[25, -127, 50]``, and reads it back as ``[0.5, -2.54, 1.0]``.

    Args:
        dtype: int8, float8_e4m3fn or float8_e5m2; or bfloat16, float16, float32 with granularity "none".
        k: granularity of K: "tensor", "head", "channel", "token", or "none". "default" is "token" for int8, which
            cannot do without a scale, and "none" for all others: fp8 is then stored as it is.
        v: granularity of V; None is the same as k.

    Raises:
        TypeError, ValueError: naming the field.
    """

    dtype: torch.dtype
    k: str = "default"
    v: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in (*LARGEST, *WIDE):
            raise bad_type("dtype", "int8, float8_e4m3fn, float8_e5m2, bfloat16, float16 or float32", self.dtype)
        if self.k == "default":
            object.__setattr__(self, "k", "token" if self.dtype == torch.int8 else "none")
        for name, granularity in (("k", self.k), ("v", self.v_granularity)):
            check_granularity(name, self.dtype, granularity)
        object.__setattr__(self, "v", self.v_granularity)  # so that equal storages compare equal

    @classmethod
    def of(cls, quant: object) -> KVQuant:
        """From the argument of ``PagedKV.empty``: a KVQuant, or a dtype for ``KVQuant(dtype)``.

        Raises:
            TypeError: anything else.
        """
        if isinstance(quant, KVQuant):
            return quant
        if isinstance(quant, torch.dtype):
            return cls(quant)
        raise bad_type("quant", "a KVQuant or a torch.dtype", repr(quant))

    @property
    def v_granularity(self) -> str:
        """The granularity of V: ``v``, or ``k`` where v is None."""
        return self.k if self.v is None else self.v

    @property
    def is_quantised(self) -> bool:
        """True for int8 and fp8 storage."""
        return self.dtype in LARGEST

    def bytes_per_token(self, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> int:
        """Cache bytes that one token of one layer takes, token scales (fp32) included.

        ``v_head_dim``: elements of a value row; None is ``head_dim``.
        """
        token_scales = (self.k == "token") + (self.v_granularity == "token")
        elements = head_dim + (head_dim if v_head_dim is None else v_head_dim)
        return num_kv_heads * (elements * self.dtype.itemsize + 4 * token_scales)


def spread(granularity: str, scale: Tensor | None) -> Tensor | None:
    """A scale shaped to multiply keys or values [Hkv, N, D]; a "token" scale comes gathered for them, [Hkv, N]."""
    if scale is None or granularity == "tensor":
        return scale
    return {"head": scale[:, None, None], "channel": scale[:, None], "token": scale[..., None]}[granularity]


def token_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [..., Hkv] (fp32) that stores each row of ``x`` [..., Hkv, D]: max|x| / largest, 1 for a zero row.

    At least ``SMALLEST_SCALE``, and NaN for a row with a NaN or an infinity, which so reads NaN in any dtype.
    """
    return _scale_for(x.float().abs().amax(-1), dtype)


def quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x / scale`` in the stored dtype: round half to even, saturated at the largest value (127, 448, 57344).

    NaN is NaN, without a sign, in fp8 and 0 in int8. A scale of 0, which reads 0 whatever is stored, counts as 1.
    """
    if dtype not in LARGEST:
        return x.to(dtype)
    scaled = x.float() if scale is None else x.float() / scale.float().where(scale != 0, 1.0)
    scaled = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    scaled = scaled.where(scaled == scaled, 0.0 if dtype == torch.int8 else torch.nan)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


def dequantise(stored: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``stored x scale`` in ``dtype``; ``scale`` already broadcasts against ``stored``."""
    value = stored.to(dtype)
    return value if scale is None else value * scale.to(dtype)


def calibrate(x: Tensor, dtype: torch.dtype, granularity: str) -> Tensor:
    """A static fp32 scale from sample tokens ``x`` [N, Hkv, D]: the largest finite magnitude seen over ``LARGEST``."""
    dims = {"tensor": (0, 1, 2), "head": (0, 2), "channel": (0,)}
    if granularity not in dims:
        raise bad_value("granularity", f"one of {tuple(dims)}", repr(granularity))
    return _scale_for(x.float().abs().nan_to_num(0.0, 0.0).amax(dims[granularity]), dtype)


def _scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """``largest`` over the largest stored value, 1 for zeros, NaN where it is NaN or infinite.

    The divisor is a tensor: CUDA's division by a number is a product with its reciprocal, one bit off here and there.
    """
    scale = (largest / largest.new_full((), LARGEST[dtype])).clamp(min=SMALLEST_SCALE)
    return scale.where(largest < torch.inf, torch.nan).where(largest != 0, 1.0)


def fold_q(q: Tensor, granularity: str, scale: Tensor | None) -> Tensor:
    """Fold K's channel scale [Hkv, D] into ``q`` [Hkv, rows, D]."""
    return q * scale[:, None].to(q.dtype) if granularity == "channel" and scale is not None else q


def fold_scores(s: Tensor, granularity: str, scale: Tensor | None) -> Tensor:
    """Fold K's tensor [], head [Hkv] or gathered token [Hkv, N] scale into the scores ``s`` [Hkv, rows, N]."""
    if scale is None or granularity == "channel":
        return s
    return s * (scale[:, None] if granularity == "token" else _over_rows(granularity, scale)).to(s.dtype)


def fold_p(p: Tensor, granularity: str, scale: Tensor | None) -> Tensor:
    """Fold V's gathered token scale [Hkv, N] into the probabilities ``p`` [Hkv, rows, N]."""
    return p * scale[:, None].to(p.dtype) if granularity == "token" and scale is not None else p


def fold_out(out: Tensor, granularity: str, scale: Tensor | None) -> Tensor:
    """Fold V's tensor [], head [Hkv] or channel [Hkv, Dv] scale into the output ``out`` [Hkv, rows, Dv]."""
    if scale is None or granularity == "token":
        return out
    return out * (scale[:, None] if granularity == "channel" else _over_rows(granularity, scale)).to(out.dtype)


def _over_rows(granularity: str, scale: Tensor) -> Tensor:
    return scale[:, None, None] if granularity == "head" else scale
