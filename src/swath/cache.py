"""Keys and values in memory: paged caches and dense sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from swath.checks import check_count, check_float, check_is_tensor, check_rows, check_separate, check_values
from swath.errors import bad_type, bad_value
from swath.pages import PageTable, check_page_size, pages_holding
from swath.quant import GRANULARITIES, LARGEST, WIDE, KVQuant, check_scale, dequantise, granularity_of, spread
from swath.vendors import aiter_pages, dense_pages, vllm_pages

CACHE_DTYPES = (*WIDE, *LARGEST)
FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class PagedKV:
    """A paged key/value cache of one layer, logically [num_pages, num_kv_heads, page_size, head_dim].

    Rows of V may be shorter than those of K: they have ``v_head_dim`` <= ``head_dim`` elements.

    A worked example: with ``page_size`` 16 and the block-table row ``[7, 2]``, the key at position 18 of that
    sequence is ``k[2, :, 2, :]``: entry 18 // 16 of the row names page 2, and 18 % 16 is the slot in it.

    Args:
        k, v: stored keys [..., D] and values [..., Dv], any strides with the last one 1. Kernels read V by K's offsets
            where both have the same strides.
        k_scale, v_scale: fp32 or bf16, any strides; the rank is the granularity (see quant.py), and a number is one of
            granularity "tensor". None for 16-bit caches, and for fp8 caches whose values are stored as they are.

    Raises:
        TypeError, ValueError: naming the field.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def __init__(
        self, k: Tensor, v: Tensor, k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None
    ) -> None:
        _check_pools(k, v)
        for name, value in (("k", k), ("v", v)):
            object.__setattr__(self, name, value)
        for name, scale, stored in (("k_scale", k_scale, k), ("v_scale", v_scale, v)):
            scale = _as_tensor(name, scale, stored.device)
            check_scale(name, scale, stored)
            object.__setattr__(self, name, scale)

    @classmethod
    def empty(
        cls,
        quant: KVQuant | torch.dtype,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        device: torch.device | str = "cpu",
    ) -> PagedKV:
        """A new cache as ``quant`` says, where a dtype stands for ``KVQuant(dtype)``.

        It takes ``num_pages * page_size * quant.bytes_per_token(num_kv_heads, head_dim, v_head_dim)`` bytes. Keys and
        values are whatever the memory held: no slot is read before it is written. Token scales are allocated, as ones;
        static scales must be given. ``v_head_dim``: elements of a value row; None is ``head_dim``.
        """
        quant = KVQuant.of(quant)
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        for name, n in zip(("num_pages", "num_kv_heads", "page_size", "head_dim"), shape, strict=True):
            check_count(name, n, "an int >= 0")
        if v_head_dim is not None:
            check_count("v_head_dim", v_head_dim, "an int >= 0 or None", most=head_dim)
        scales: list[Tensor | None] = []
        for name, granularity, given in (("k_scale", quant.k, k_scale), ("v_scale", quant.v_granularity, v_scale)):
            if granularity == "token" and given is None:
                given = torch.ones(shape[:3], dtype=torch.float32, device=device)
            scale = _as_tensor(name, given, device)
            if (scale is not None and scale.dim() >= len(GRANULARITIES)) or granularity_of(scale) != granularity:
                came = None if scale is None else f"one of shape {tuple(scale.shape)}"
                raise bad_value(name, f"a scale of granularity {granularity!r}", came)
            scales.append(scale)
        widths = head_dim, head_dim if v_head_dim is None else v_head_dim
        k, v = (torch.empty(*shape[:3], width, dtype=quant.dtype, device=device) for width in widths)
        return cls(k, v, k_scale=scales[0], v_scale=scales[1])

    def __repr__(self) -> str:
        sizes = f"num_pages={self.num_pages}, num_kv_heads={self.num_kv_heads}"
        sizes += f", page_size={self.page_size}, head_dim={self.head_dim}"
        if self.v_head_dim != self.head_dim:
            sizes += f", v_head_dim={self.v_head_dim}"
        quant = f"dtype={self.quant.dtype}, k={self.quant.k!r}, v={self.quant.v!r}"
        return f"PagedKV({sizes}, {quant}, nbytes={self.nbytes}, device='{self.k.device}')"

    @classmethod
    def from_nhd(
        cls, k: Tensor, v: Tensor, *, k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None
    ) -> PagedKV:
        """A view of caches kept as [num_pages, page_size, Hkv, D]; token scales come as [num_pages, page_size, Hkv]."""
        for name, x in (("k", k), ("v", v)):
            if check_is_tensor(name, x).dim() != 4:
                raise bad_value(name, "shape [num_pages, page_size, num_kv_heads, head_dim]", tuple(x.shape))
        return cls(k.transpose(1, 2), v.transpose(1, 2), k_scale=_by_head(k_scale), v_scale=_by_head(v_scale))

    @classmethod
    def from_packed(
        cls,
        kv: Tensor,
        *,
        layout: str = "nhd",
        v_head_dim: int | None = None,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
    ) -> PagedKV:
        """A view of one tensor whose rows hold K then V, as vLLM packs them.

        ``layout``: "nhd" is [num_pages, page_size, Hkv, 2 * D] (vLLM 0.25 to 0.31), where token scales come as
        [num_pages, page_size, Hkv]; "hnd" is [num_pages, Hkv, page_size, 2 * D] (from vLLM 0.32 on), where they come as
        [num_pages, Hkv, page_size]. ``v_head_dim``: elements of a row that are V's, at its end; None is half of them.
        """
        if layout == "nhd":
            k_scale, v_scale = _by_head(k_scale), _by_head(v_scale)
        return cls(*vllm_pages(kv, layout, v_head_dim), k_scale=k_scale, v_scale=v_scale)

    @classmethod
    def from_aiter(
        cls, k: Tensor, v: Tensor, *, k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None
    ) -> PagedKV:
        """A copy of aiter's blocked caches: K [n, Hkv, D/x, p, x]; V [n, Hkv, D, p] or [n, Hkv, p/x, D, x]."""
        return cls(*aiter_pages(k, v), k_scale=k_scale, v_scale=v_scale)

    @classmethod
    def from_dense(cls, k: Tensor, v: Tensor, *, page_size: int | None = None) -> tuple[PagedKV, Tensor]:
        """A view of caches kept as [B, S, Hkv, D], of any S and strides, and their block table [B, pages], int32.

        ``page_size`` divides S, and the keys from one sequence to the next. None takes 128, or the largest of 64, 32,
        16, 8 and 1 that does; kernels are slower over pages of 1. Where sequences do not lie a whole number of keys
        apart, or those of v not as far as those of k, each is a page: S is 1, 8 or a multiple of 16 then.
        """
        *pools, table = dense_pages(k, v, page_size)
        return cls(*pools), table

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Token slots in a page."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Elements of a key row, D."""
        return self.k.shape[3]

    @property
    def v_head_dim(self) -> int:
        """Elements of a value row, Dv."""
        return self.v.shape[3]

    @cached_property
    def quant(self) -> KVQuant:
        """The storage in words: dtype and granularities."""
        return KVQuant(self.k.dtype, granularity_of(self.k_scale), granularity_of(self.v_scale))

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: what else is remembered of them holds addresses, which a copy does not share."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """k, v, k_scale and v_scale."""
        return self.k, self.v, self.k_scale, self.v_scale

    def check_writable(self) -> None:
        """Check that new tokens have places of their own: pools that are only read may be expanded views.

        Raises:
            ValueError: naming the tensor.
        """
        token = self.quant.k == "token", self.quant.v == "token"
        named = zip(("k", "v", "k_scale", "v_scale"), self.tensors, (True, True, *token), strict=True)
        for name, x, written in named:
            if x is not None and written:
                check_separate(f"cache.{name}", x)

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor begins inside the pool of K or V."""
        at = x.data_ptr()
        return any(start <= at < end for start, end in self._spans)

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """The addresses of K and V, from the first byte to behind the last one."""
        pools = [x for x in (self.k, self.v) if x.numel() and x.data_ptr()]
        reach = [sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 for x in pools]
        return [(x.data_ptr(), x.data_ptr() + n * x.element_size()) for x, n in zip(pools, reach, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, scales included."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


def _check_pools(k: object, v: object) -> None:
    """Check the stored keys and values of a cache."""
    k, v = check_is_tensor("k", k), check_is_tensor("v", v)
    if k.dtype not in CACHE_DTYPES:
        raise bad_type("k", "one of " + ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES), k.dtype)
    if k.dim() != 4:
        raise bad_value("k", "shape [num_pages, num_kv_heads, page_size, head_dim]", tuple(k.shape))
    check_values(v, k)
    if v.device != k.device:
        raise bad_value("v", f"a tensor on {k.device}", v.device)
    for name, x in (("k", k), ("v", v)):
        check_rows(name, x)
    check_page_size(k.shape[2])


def _by_head(scale: Tensor | float | None) -> Tensor | float | None:
    """Token scales [num_pages, page_size, Hkv] as a cache has them; others as they are."""
    return scale.transpose(1, 2) if isinstance(scale, Tensor) and scale.dim() == 3 else scale


def _as_tensor(name: str, scale: object, device: torch.device | str) -> Tensor | None:
    """A scale as a tensor on ``device``, which a number becomes."""
    if scale is None or isinstance(scale, Tensor):
        return scale if scale is None else check_is_tensor(name, scale)
    value = check_float(name, scale, "a tensor, a float or None")
    if not FLOAT32.tiny <= value <= FLOAT32.max:
        raise bad_value(name, "a float > 0 that float32 can hold", value)
    return torch.full((), value, dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class KeySlice:
    """Stored keys and values of N neighbouring positions of one sequence; what has no page reads as zero.

    k [Hkv, N, D], v [Hkv, N, Dv] in the stored dtype; live bool [N]: the position has a slot in a page that exists.
    k_scale, v_scale: as in the cache, a "token" scale gathered to [Hkv, N]. quant: dtype and granularities.
    """

    k: Tensor
    v: Tensor
    live: Tensor
    quant: KVQuant
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def dequantised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K [Hkv, N, D] and V [Hkv, N, Dv] in ``dtype``, scales applied."""
        return (
            dequantise(self.k, spread(self.quant.k, self.k_scale), dtype),
            dequantise(self.v, spread(self.quant.v_granularity, self.v_scale), dtype),
        )

    def narrow(self, start: int, stop: int) -> KeySlice:
        """Rows ``start .. stop - 1`` of this slice, as views."""
        return KeySlice(
            self.k[:, start:stop],
            self.v[:, start:stop],
            self.live[start:stop],
            self.quant,
            _per_token(self.quant.k, self.k_scale, lambda s: s[:, start:stop]),
            _per_token(self.quant.v_granularity, self.v_scale, lambda s: s[:, start:stop]),
        )


def _per_token(granularity: str, scale: Tensor | None, take: Callable[[Tensor], Tensor]) -> Tensor | None:
    return take(scale) if granularity == "token" and scale is not None else scale


@dataclass(frozen=True, eq=False)
class PagedKeys:
    """Keys of a batch in a paged cache: the paged value of a K/V source."""

    cache: PagedKV
    table: PageTable
    seq_lens: Tensor

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return self.seq_lens.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.cache.num_kv_heads

    @property
    def v_head_dim(self) -> int:
        """Elements of a value row, Dv."""
        return self.cache.v_head_dim

    @property
    def capacity(self) -> int:
        """Most keys a sequence can have."""
        return self.table.max_pages(self.cache.page_size) * self.cache.page_size

    @cached_property
    def _kv_lens(self) -> list[int]:
        return [max(n, 0) for n in self.seq_lens.tolist()]

    def kv_len(self, b: int) -> int:
        """Keys of sequence ``b`` as its length says; those beyond its pages are not visible."""
        return self._kv_lens[b]

    def slice(self, b: int, start: int, stop: int) -> KeySlice:
        """The keys at positions ``start .. stop - 1`` of sequence ``b``; only pages that hold them are read."""
        cache, size = self.cache, self.cache.page_size
        pages = pages_holding(start, stop, size)
        ids = self.table.row(b, size)[pages]
        missing = pages.stop - pages.start - ids.shape[0]
        if missing > 0:
            ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        in_pool = (ids >= 0) & (ids < cache.num_pages)
        complete = bool(in_pool.all())
        skip, stop = start - pages.start * size, stop - pages.start * size

        def take(pool: Tensor) -> Tensor:
            """[num_pages, Hkv, page_size, ...] -> [Hkv, stop - start, ...], dead pages zero."""
            if complete:
                # Head by head: one gather over both dimensions would copy the whole pool, or the result once more.
                taken = pool.new_empty(pool.shape[1], ids.shape[0], *pool.shape[2:])
                for head, stored in zip(taken, pool.unbind(1), strict=True):
                    torch.index_select(stored, 0, ids, out=head)
            else:
                taken = pool.new_zeros(pool.shape[1], ids.shape[0], *pool.shape[2:])
                taken[:, in_pool] = pool.index_select(0, ids[in_pool]).transpose(0, 1)
            return taken.flatten(1, 2)[:, skip:stop]

        return KeySlice(
            take(cache.k),
            take(cache.v),
            in_pool[:, None].expand(-1, size).reshape(-1)[skip:stop],
            cache.quant,
            _per_token(cache.quant.k, cache.k_scale, take),
            _per_token(cache.quant.v_granularity, cache.v_scale, take),
        )


@dataclass(frozen=True, eq=False)
class DenseKeys:
    """Keys of a batch laid end to end, [Tk, Hkv, D], values [Tk, Hkv, Dv]: the dense value of a K/V source."""

    k: Tensor
    v: Tensor
    cu_seqlens: Tensor

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.k.shape[1]

    @property
    def v_head_dim(self) -> int:
        """Elements of a value row, Dv."""
        return self.v.shape[2]

    @property
    def capacity(self) -> int:
        """Most keys a sequence can have."""
        return self.k.shape[0]

    @cached_property
    def _bounds(self) -> list[int]:
        return [max(row, 0) for row in self.cu_seqlens.tolist()]

    def kv_len(self, b: int) -> int:
        """Keys of sequence ``b``."""
        return max(self._bounds[b + 1] - self._bounds[b], 0)

    def slice(self, b: int, start: int, stop: int) -> KeySlice:
        """The keys at positions ``start .. stop - 1`` of sequence ``b``, as views; fewer where k ends before them."""
        first = self._bounds[b]
        k, v = (x[first + start : first + stop].transpose(0, 1) for x in (self.k, self.v))
        return KeySlice(k, v, torch.ones(k.shape[1], dtype=torch.bool, device=k.device), KVQuant(k.dtype))
