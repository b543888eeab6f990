"""Keys and values in memory: paged caches, page tables, dense sequences. The only host code with page arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swath.checks import check_alike
from swath.errors import bad_type, bad_value
from swath.quant import LARGEST, WIDE, KVQuant, check_scale, dequantise, granularity_of, spread

CACHE_DTYPES = (*WIDE, *LARGEST)


@dataclass(frozen=True, eq=False)
class PagedKV:
    """A paged key/value cache of one layer, logically [num_pages, num_kv_heads, page_size, head_dim].

    A worked example: with ``page_size`` 16 and the block-table row ``[7, 2]``, the key at position 18 of that
    sequence is ``k[2, :, 2, :]``: entry 18 // 16 of the row names page 2, and 18 % 16 is the slot in it.

    Args:
        k, v: stored keys and values, any strides with the last one 1, the same strides for both.
        k_scale, v_scale: fp32 or bf16, any strides; the rank is the granularity (see quant.py). None for 16-bit
            caches, and for fp8 caches whose values are stored as they are.

    Raises:
        TypeError, ValueError: naming the field.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        if k.dtype not in CACHE_DTYPES:
            raise bad_type("k", "one of " + ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES), k.dtype)
        if k.dim() != 4:
            raise bad_value("k", "shape [num_pages, num_kv_heads, page_size, head_dim]", tuple(k.shape))
        check_alike("v", v, "k", k)
        if v.device != k.device:
            raise bad_value("v", f"a tensor on {k.device}", v.device)
        if k.stride(3) != 1 and k.shape[3] > 1:
            raise bad_value("k", "a last stride of 1", k.stride())
        if any(a != b for a, b, n in zip(k.stride(), v.stride(), k.shape, strict=True) if n > 1):
            raise bad_value("v", f"k's strides {k.stride()}", v.stride())
        check_page_size(k.shape[2])
        check_scale("k_scale", self.k_scale, k)
        check_scale("v_scale", self.v_scale, v)

    @classmethod
    def empty(
        cls,
        quant: KVQuant,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> PagedKV:
        """A zeroed cache as ``quant`` says. Token scales are allocated (ones); static scales must be given."""
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        scales: list[Tensor | None] = []
        for name, granularity, given in (("k_scale", quant.k, k_scale), ("v_scale", quant.v_granularity, v_scale)):
            if granularity == "token" and given is None:
                given = torch.ones(shape[:3], dtype=torch.float32, device=device)
            if granularity_of(given) != granularity:
                came = None if given is None else tuple(given.shape)
                raise bad_value(name, f"a scale of granularity {granularity!r}", came)
            scales.append(given)
        k, v = (torch.zeros(shape, dtype=quant.dtype, device=device) for _ in range(2))
        return cls(k, v, k_scale=scales[0], v_scale=scales[1])

    @classmethod
    def from_nhd(cls, k: Tensor, v: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> PagedKV:
        """A view of caches kept as [num_pages, page_size, Hkv, D]; token scales come as [num_pages, page_size, Hkv]."""
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4:
                raise bad_value(name, "shape [num_pages, page_size, num_kv_heads, head_dim]", tuple(x.shape))
        token = [s.transpose(1, 2) if s is not None and s.dim() == 3 else s for s in (k_scale, v_scale)]
        return cls(k.transpose(1, 2), v.transpose(1, 2), k_scale=token[0], v_scale=token[1])

    @classmethod
    def from_packed(cls, kv: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> PagedKV:
        """A view of one tensor [num_pages, page_size, Hkv, 2 * D] whose rows hold K then V, as vLLM packs them."""
        if kv.dim() != 4 or kv.shape[3] % 2:
            raise bad_value("kv", "shape [num_pages, page_size, num_kv_heads, 2 * head_dim]", tuple(kv.shape))
        k, v = kv.chunk(2, dim=3)
        return cls.from_nhd(k, v, k_scale=k_scale, v_scale=v_scale)

    @classmethod
    def from_aiter(
        cls, k: Tensor, v: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None
    ) -> PagedKV:
        """A copy of aiter's blocked caches: K [n, Hkv, D/x, p, x]; V [n, Hkv, D, p] or [n, Hkv, p/x, D, x]."""
        if k.dim() != 5:
            raise bad_value("k", "shape [num_pages, Hkv, D/x, page_size, x]", tuple(k.shape))
        if v.dim() not in (4, 5):
            raise bad_value("v", "shape [num_pages, Hkv, D, page_size] or [num_pages, Hkv, page_size/x, D, x]", v.shape)
        keys = k.permute(0, 1, 3, 2, 4).flatten(3)
        values = v.transpose(2, 3) if v.dim() == 4 else v.permute(0, 1, 2, 4, 3).flatten(2, 3)
        return cls(keys.contiguous(), values.contiguous(), k_scale=k_scale, v_scale=v_scale)

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
        """Elements of a key or value row."""
        return self.k.shape[3]

    @cached_property
    def quant(self) -> KVQuant:
        """The storage in words: dtype and granularities."""
        return KVQuant(self.k.dtype, granularity_of(self.k_scale), granularity_of(self.v_scale))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """k, v, k_scale and v_scale."""
        return self.k, self.v, self.k_scale, self.v_scale

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, scales included."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


def check_page_size(page_size: int) -> None:
    """Page sizes are 1, 8 or a multiple of 16."""
    if page_size < 1 or (page_size % 16 and page_size not in (1, 8)):
        raise bad_value("page_size", "1, 8 or a multiple of 16", page_size)


def page_count(keys: int, page_size: int) -> int:
    """Pages that so many keys take."""
    return -(-keys // page_size)


def pages_holding(start: int, stop: int, page_size: int) -> slice[int, int, None]:
    """Which pages of a sequence hold its keys ``start .. stop - 1``; of no keys: the page that ``start`` is inside."""
    return slice(start // page_size, page_count(stop, page_size))


def pages_within(start: int, stop: int, page_size: int) -> slice[int, int, None]:
    """Which pages of a sequence hold nothing but its keys ``start .. stop - 1``."""
    return slice(page_count(start, page_size), stop // page_size)


@dataclass(frozen=True, eq=False)
class PageTable:
    """Which page holds which tokens of a sequence, rectangular or flat.

    Args:
        entries: int32 [B, max_pages], or flat page ids [N].
        indptr: None, or int32 [B + 1]: sequence b owns ``entries[indptr[b]:indptr[b + 1]]``.
    """

    entries: Tensor
    indptr: Tensor | None = None

    @classmethod
    def of(cls, block_table: Tensor | Sequence[Tensor], num_seqs: int) -> PageTable:
        """From the public argument: a tensor [B, max_pages], or the pair (page_ids [N], page_indptr [B + 1])."""
        if isinstance(block_table, Tensor):
            if block_table.dim() != 2 or block_table.shape[0] != num_seqs:
                raise bad_value("block_table", f"shape [{num_seqs}, max_pages]", tuple(block_table.shape))
            if block_table.dtype != torch.int32:
                raise bad_type("block_table", "int32", block_table.dtype)
            return cls(block_table)
        if not isinstance(block_table, (tuple, list)) or len(block_table) != 2:
            raise bad_type("block_table", "a tensor or a pair (page_ids, page_indptr)", type(block_table).__name__)
        page_ids, indptr = block_table
        for name, x in (("page_ids", page_ids), ("page_indptr", indptr)):
            if not isinstance(x, Tensor) or x.dtype != torch.int32:
                raise bad_type(f"block_table.{name}", "an int32 tensor", getattr(x, "dtype", type(x).__name__))
            if x.dim() != 1:
                raise bad_value(f"block_table.{name}", "one dimension", tuple(x.shape))
        if indptr.shape[0] != num_seqs + 1:
            raise bad_value("block_table.page_indptr", f"shape [{num_seqs + 1}]", tuple(indptr.shape))
        return cls(page_ids, indptr)

    @property
    def max_pages(self) -> int:
        """Most pages a sequence can have."""
        return self.entries.shape[-1]

    @cached_property
    def _bounds(self) -> list[int]:
        bounds: list[int] = [] if self.indptr is None else self.indptr.tolist()
        return bounds

    def row(self, b: int) -> Tensor:
        """The entries of sequence ``b``, int32 [pages]; a hostile ``indptr`` is cut to what exists."""
        if self.indptr is None:
            return self.entries[b]
        first, end = (min(max(i, 0), self.max_pages) for i in self._bounds[b : b + 2])
        return self.entries[first : max(first, end)]

    def extents(self, seq: Tensor) -> tuple[Tensor, Tensor]:
        """First entry (in ``entries`` laid flat) and number of pages of the sequences ``seq``, on the device."""
        if self.indptr is None:
            return seq * self.max_pages, torch.full_like(seq, self.max_pages)
        ends = self.indptr.long().clamp(0, self.max_pages)
        return ends[seq], ends[seq + 1] - ends[seq]


@dataclass(frozen=True, eq=False)
class KeySlice:
    """Stored keys and values of N neighbouring positions of one sequence; what has no page reads as zero.

    k, v [Hkv, N, D] in the stored dtype; live bool [N]: the position has a slot in a page that exists.
    k_scale, v_scale: as in the cache, a "token" scale gathered to [Hkv, N]. quant: dtype and granularities.
    """

    k: Tensor
    v: Tensor
    live: Tensor
    quant: KVQuant
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def dequantised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V [Hkv, N, D] in ``dtype``, scales applied."""
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
    def capacity(self) -> int:
        """Most keys a sequence can have."""
        return self.table.max_pages * self.cache.page_size

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
        ids = self.table.row(b)[pages]
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
    """Keys of a batch laid end to end, [Tk, Hkv, D]: the dense value of a K/V source."""

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
    def capacity(self) -> int:
        """Most keys a sequence can have."""
        return self.k.shape[0]

    @cached_property
    def _bounds(self) -> list[int]:
        bounds: list[int] = self.cu_seqlens.tolist()
        return bounds

    def kv_len(self, b: int) -> int:
        """Keys of sequence ``b``."""
        return max(self._bounds[b + 1] - self._bounds[b], 0)

    def slice(self, b: int, start: int, stop: int) -> KeySlice:
        """The keys at positions ``start .. stop - 1`` of sequence ``b``, as views."""
        first = self._bounds[b]
        k, v = (x[first + start : first + stop].transpose(0, 1) for x in (self.k, self.v))
        return KeySlice(k, v, torch.ones(k.shape[1], dtype=torch.bool, device=k.device), KVQuant(k.dtype))


def locate_slots(
    block_table: Tensor | Sequence[Tensor],
    seq_lens: Tensor,
    page_size: int,
    num_tokens: int,
    cu_seqlens_q: Tensor | None,
) -> Tensor:
    """``swath.slots`` (see there): token i of a sequence's q_len new ones stands at ``seq_len - q_len + i``."""
    num_seqs = seq_lens.shape[0]
    table = PageTable.of(block_table, num_seqs)
    token = torch.arange(num_tokens, device=seq_lens.device)
    if cu_seqlens_q is None:
        per_seq = num_tokens // max(num_seqs, 1)
        seq, index = token // max(per_seq, 1), token % max(per_seq, 1)
        q_len = torch.full_like(token, per_seq)
    else:
        cu = cu_seqlens_q.long()
        seq = (torch.searchsorted(cu, token, right=True) - 1).clamp(0, num_seqs - 1)
        index, q_len = token - cu[seq], cu[seq + 1] - cu[seq]
    position = seq_lens.long()[seq].clamp(min=0) - q_len + index
    page = position.div(page_size, rounding_mode="floor")
    first, pages = table.extents(seq)
    placed = (position >= 0) & (page < pages) & (index >= 0) & (index < q_len)
    entries = table.entries.reshape(-1).long()
    if not entries.numel():
        return torch.full_like(token, -1)
    entry = entries[(first + page).clamp(0, entries.shape[0] - 1)]
    return torch.where(placed & (entry >= 0), entry * page_size + position % page_size, -1)
