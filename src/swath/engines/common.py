"""What the adapters of engines share: caches as views, a layer's constants, and one step as all its layers see it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from swath import bounds
from swath.cache import PagedKV
from swath.engines.shards import Shard
from swath.errors import bad_value
from swath.ops import paged
from swath.ops.append import append_kv
from swath.ops.paged import PAGED_ATTENTION, paged_attention
from swath.ops.signature import cache_look, tensor_look
from swath.ops.torch_ops import must_dispatch
from swath.pages import BlockTable
from swath.problem import Accepted, is_in_place
from swath.vendors import vllm_pages
from swath.window import Window

SCALE_DTYPE = torch.float32
"""Of token scales that lie in an engine's pages."""
BATCH_INVARIANT_SPLIT = 256
"""Keys between two cuts of a sequence, where an engine wants results that no batch changes."""
Operands = tuple[Tensor, PagedKV, BlockTable, Tensor]
"""q, cache, block_table and seq_lens."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What never changes about a layer: how far it sees, and how its scores are made.

    Args:
        size: keys in its window, the query's own included; None is no limit. (See ``window_size``.)
        scale, softcap: as ``paged_attention`` takes them.
        sink: [Hq] logits. It may be a parameter whose weights are loaded later.
        split_size: of ``paged_attention``, for the same bits in any batch.
        impl: the backend of attention.
    """

    size: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    sink: Tensor | None = None
    split_size: int | None = None
    impl: str = "auto"

    @cached_property
    def numbers(self) -> tuple[object, ...]:
        """All of it but the sink and the backend."""
        return self.size, self.scale, self.softcap, self.split_size

    @cached_property
    def options(self) -> dict[str, Any]:
        """Its options of ``paged_attention``."""
        return dict(scale=self.scale, softcap=self.softcap, sink=self.sink, split_size=self.split_size)

    @cached_property
    def without_sink(self) -> Layer:
        """The same layer, whose sink joins later."""
        return replace(self, sink=None)

    def append(self, cache: PagedKV, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Write k, v [T or more, Hkv, D] into ``slots``, int [T]; -1 is none, and rows past them are padding."""
        n = slots.shape[0]
        if k.shape[0] != n:
            k, v = k[:n], v[:n]
        append_kv(cache, k, v, slots)


@dataclass(eq=False)
class Step:
    """One forward pass as all layers see it: made once, from tensors that stay on the device.

    An engine with two pools of pages has two steps, see ``over``. No field is changed once a step is made; it is not
    frozen because vLLM copies metadata field by field.

    Args:
        block_table, seq_lens: as ``paged_attention`` takes them, for B sequences; new tokens count in seq_lens.
        slots: int [T or fewer], where the new tokens are written; -1 for none.
        num_tokens: rows of q that may belong to a sequence, T. Rows past them are padding and are not touched.
        max_q_len, max_kv_len: host bounds of the lengths, for launches and scratch.
        cu_seqlens_q: [B + 1]; None where every sequence has exactly ``max_q_len`` query tokens, T / B.
        q_start: [B], or None: the queries are the last keys.
        global_tokens, causal: of the layers' windows (see ``Window``).
        size: keys in the windows of all layers, in place of their own; None: each layer has its own.
        shard: None, or which keys are here, of those that ranks hold by turns. Lengths and bounds count the keys of all
            ranks, ``block_table`` has the pages of this one.
        spans, whole_spans: None, or [B, R, 2], ranges of keys whose rows see all of them, also later keys, as
            ``swath.bounds.blocks`` takes them: image spans. Attention is causal but for them.
    """

    block_table: BlockTable
    seq_lens: Tensor
    slots: Tensor
    num_tokens: int
    max_q_len: int
    max_kv_len: int
    cu_seqlens_q: Tensor | None = None
    q_start: Tensor | None = None
    global_tokens: int | Tensor = 0
    causal: bool = True
    size: int | None = None
    shard: Shard | None = None
    spans: Tensor | None = None
    whole_spans: bool = True
    _windows: dict[int | None, Window] = field(default_factory=dict, init=False, repr=False)
    _accepted: dict[object, Accepted] = field(default_factory=dict, init=False, repr=False)

    def over(self, block_table: BlockTable, slots: Tensor) -> Step:
        """The same step over the pages of another pool."""
        other = copy(self)  # and not ``replace``: vLLM's own subclasses have other constructors
        other.block_table, other.slots, other._windows, other._accepted = block_table, slots, {}, {}
        return other

    def window(self, size: int | None) -> Window:
        """The window of layers that see ``size`` keys, the same object for all of them."""
        if size not in self._windows:
            leading = 0 if size is None else self.global_tokens
            if self.spans is None and self.shard is None:
                made = Window(size, leading, self.causal)
            else:
                seen = self._bounds(size)
                if self.shard is not None:
                    held = self.shard.held(torch.as_tensor(leading))
                    leading = held if isinstance(leading, Tensor) else int(held)
                    seen = self.shard.seen(seen)
                made = Window(global_tokens=leading, bounds=seen)
            self._windows[size] = made
        return self._windows[size]

    def _bounds(self, size: int | None) -> Tensor:
        """The keys of each row: shaped as q is given, with [lo, hi) in place of heads and D."""
        if not self.causal:
            raise bad_value("causal", "True where there are spans or shards", False)
        steps = None if self.max_q_len == 1 else self.max_q_len
        count = steps if self.cu_seqlens_q is None else self.num_tokens
        rows = bounds.positions_of(self.seq_lens, count, cu_seqlens_q=self.cu_seqlens_q, q_start=self.q_start)
        spans = self.seq_lens.new_empty(self.seq_lens.shape[0], 0, 2) if self.spans is None else self.spans
        return bounds.blocks(rows, spans, size=size, whole=self.whole_spans, cu_seqlens_q=self.cu_seqlens_q)

    @cached_property
    def held(self) -> Tensor:
        """Keys of each sequence that are here, [B]."""
        return self.seq_lens if self.shard is None else self.shard.held(self.seq_lens)

    def attend(
        self, layer: Layer, q: Tensor, cache: PagedKV, out: Tensor | None = None, return_lse: bool = False
    ) -> Any:
        """Attention of q [T or more, Hq, D]: out [T, Hq, D], a new tensor or the rows given, and the LSE [T, Hq]."""
        arguments, options = self.call(layer, q, cache, out)
        options["return_lse"] = return_lse
        if torch.is_grad_enabled() or must_dispatch(arguments):
            made = paged_attention(*arguments, **options, impl=layer.impl)
        else:
            accepted = self._accept(layer, arguments, options)
            made = PAGED_ATTENTION.run_alike(paged.STAGES, accepted, arguments, options, layer.impl)
        if arguments[0].dim() == 3:
            return made
        return made.flatten(0, 1) if isinstance(made, Tensor) else tuple(x.flatten(0, 1) for x in made)

    def _accept(self, layer: Layer, arguments: Operands, options: dict[str, Any]) -> Accepted:
        """What the checks find: once a step for layers that are alike, since what all layers share has one look."""
        q, cache, out, sink = arguments[0], arguments[1], options["out"], layer.sink
        looks = (tensor_look(q), cache_look(cache), out is None or tensor_look(out), sink is None or tensor_look(sink))
        key = layer.numbers, options["return_lse"], looks, is_in_place(q, out)
        accepted = self._accepted.get(key)
        if accepted is None:
            accepted = self._accepted[key] = paged.STAGES.accept(arguments, options)
        return accepted

    def call(self, layer: Layer, q: Tensor, cache: PagedKV, out: Tensor | None) -> tuple[Operands, dict[str, Any]]:
        """The arguments of ``paged_attention``, by position and by name."""
        n, steps = self.num_tokens, self.max_q_len
        if q.shape[0] != n:
            q = q[:n]
        if out is not None and out.shape[0] != n:
            out = out[:n]
        if self.cu_seqlens_q is None and steps > 1:
            q = q.unflatten(0, (-1, steps))
            out = None if out is None else out.unflatten(0, (-1, steps))
        window = self.window(layer.size if self.size is None else self.size)
        options = dict(
            cu_seqlens_q=self.cu_seqlens_q, max_q_len=steps, window=window, q_start=self.q_start, out=out,
            max_kv_len=self.max_kv_len if self.shard is None else self.shard.most(self.max_kv_len), **layer.options,
        )  # fmt: skip
        return (q, cache, self.block_table, self.held), options


def window_size(left: int) -> int | None:
    """Keys in a window of which an engine says how many stand before the query: -1 is no limit (FlashAttention)."""
    return Window.from_flash(left, 0, causal=True).size


def stored_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cache tensor as what it stores: engines keep fp8 as uint8."""
    return x if x.dtype == dtype else x.view(dtype)


def rows_cache(
    kv: Tensor, dtype: torch.dtype, *,
    v_head_dim: int | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> PagedKV:  # fmt: skip
    """A view of one tensor a layer, [num_pages, Hkv, page_size, D + Dv] with any strides, whose rows hold K then V.

    ``v_head_dim``: Dv, None for half of a row.
    """
    return PagedKV(*vllm_pages(stored_as(kv, dtype), "hnd", v_head_dim), k_scale=k_scale, v_scale=v_scale)


def nhd_cache(
    k: Tensor, v: Tensor, page_size: int, dtype: torch.dtype, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> PagedKV:  # fmt: skip
    """A view of pools of tokens, k and v [num_pages * page_size, Hkv, D], as SGLang keeps them.

    Token scales are [num_pages * page_size, Hkv], others as in every cache.

    Raises:
        ValueError: the pool is no whole number of pages.
    """
    if k.shape[0] % page_size:
        raise bad_value("k", f"whole pages of {page_size} tokens", tuple(k.shape))

    def by_page(x: Tensor) -> Tensor:
        return x.view(-1, page_size, *x.shape[1:])

    k_scale, v_scale = (by_page(x) if x is not None and x.shape == k.shape[:2] else x for x in (k_scale, v_scale))
    return PagedKV.from_nhd(
        by_page(stored_as(k, dtype)), by_page(stored_as(v, dtype)), k_scale=k_scale, v_scale=v_scale
    )


def planar_cache(kv: Tensor, head_dim: int, dtype: torch.dtype) -> PagedKV:
    """The bytes of each page read as K, V, K's token scales and V's, each [Hkv, page_size, ...] in one piece.

    Rows with scales between them begin at multiples of 8 bytes: int8 decode read them at a third of the speed (H200,
    rows of 264 bytes: 375 us; in pieces: 137 us).

    Args:
        kv: [num_pages, Hkv, page_size, D + Dv + 8], one byte an element. The bytes of a page lie together, in any
            order: nothing but this view may read or write them.
        head_dim: D.
        dtype: int8 or an fp8 type.

    Raises:
        ValueError: the bytes of a page are spread.
    """
    num_pages, num_kv_heads, page_size, content = kv.shape
    page_bytes = num_kv_heads * page_size * content
    spread = 1 + sum((n - 1) * stride for n, stride in zip(kv.shape[1:], kv.stride()[1:], strict=True))
    if spread != page_bytes or kv.stride(0) % SCALE_DTYPE.itemsize or kv.storage_offset() % SCALE_DTYPE.itemsize:
        raise bad_value("kv", f"pages of {page_bytes} bytes in one piece", f"strides {kv.stride()}")
    pages = kv.as_strided((num_pages, page_bytes), (kv.stride(0), 1))
    v_head_dim = content - head_dim - 2 * SCALE_DTYPE.itemsize
    pieces, at = [], 0
    for kind, last in ((dtype, (head_dim,)), (dtype, (v_head_dim,)), (SCALE_DTYPE, ()), (SCALE_DTYPE, ())):
        shape = (num_kv_heads, page_size, *last)
        end = at + prod(shape) * kind.itemsize
        pieces.append(pages[:, at:end].view(kind).unflatten(1, shape))
        at = end
    return PagedKV(*pieces)
