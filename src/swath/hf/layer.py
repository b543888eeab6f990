"""The keys and values of one layer in pages, as Transformers sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from swath.cache import PagedKV
from swath.errors import bad_type, bad_value
from swath.hf.attention import Scoring
from swath.hf.leading import attend_near, held_keys
from swath.hf.masks import BandMask
from swath.hf.pages import Pages, Pass
from swath.hf.pools import magnitudes, rescale, static_scales
from swath.hf.rotary import Rotary
from swath.hf.settings import Settings
from swath.ops.append import append_kv
from swath.ops.paged import paged_attention
from swath.ops.quantise import quantise_q
from swath.quant import KVQuant, calibrate
from swath.window import Window

CALIBRATION_TOKENS = 128
"""Static scales follow the tokens of calls that find fewer tokens than this, over the whole batch."""


ON_THE_HOST = "a PagedCache allocates pages on the host between graphs: compile without fullgraph=True"


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer, in pages.

    ``update`` hands the new keys on with this layer attached to them as ``paged_layer``; swath's attention function
    finds it there, and ``attend`` stores the keys and reads all of them from the pages. Another layer that is handed
    the same keys reads the same pages.
    """

    supports_early_init = False

    def __init__(self, pages: Pages, quant: KVQuant | None, overrides: bool, order: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.pages, self.quant, self.overrides, self.order = pages, quant, overrides, order
        self.rotary = rotary  # None: leading tokens stay where the text has them
        self.length = 0
        self.new: tuple[Tensor, Tensor] | None = None
        self._place = len(pages.pools.stores)
        self._largest: list[Tensor] = []
        pages.pools.stores.append(None)

    @property
    def keys(self) -> Tensor:
        """Nowhere in one piece.

        Raises:
            TypeError: a model reads what the layer stores by itself.
        """
        raise bad_type("past_key_values", "a cache of Transformers: the model reads its keys itself", "a PagedCache")

    @keys.setter
    def keys(self, _: None) -> None:
        """Transformers sets it to None at first."""

    @property
    def store(self) -> PagedKV | None:
        """The pool of this layer; None before the first token."""
        return self.pages.pools.stores[self._place]

    @property
    def is_sliding(self) -> bool:
        """Whether old keys are dropped."""
        return not self.pages.window.is_unbounded

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` can go back as far as one likes."""
        return not self.is_sliding or self.pages.keep_past

    @property
    def page_bytes(self) -> int:
        """Bytes of a page with its scales; 0 before the first token."""
        if self.store is None:
            return 0
        store = self.store
        return store.page_size * store.quant.bytes_per_token(store.num_kv_heads, store.head_dim, store.v_head_dim)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pool for keys and values of these shapes; static scales (tensor, head, channel) are still 1."""
        quant = KVQuant(key_states.dtype) if self.quant is None else self.quant
        _, num_kv_heads, _, head_dim = key_states.shape
        v_head_dim = value_states.shape[3]
        k_scale, v_scale = (
            _ones(granularity, num_kv_heads, dim, key_states.device)
            for granularity, dim in ((quant.k, head_dim), (quant.v_granularity, v_head_dim))
        )
        self.pages.pools.stores[self._place] = PagedKV.empty(
            quant, self.pages.num_pages, num_kv_heads, self.pages.page_size, head_dim, v_head_dim=v_head_dim,
            k_scale=k_scale, v_scale=v_scale, device=key_states.device,
        )  # fmt: skip
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take new keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]; both come back with this layer attached."""
        if self.new is not None:
            raise bad_value("attn_implementation", "one registered by swath.hf.register", "one that read no pages")
        self.new = key_states, value_states
        handles = key_states.detach(), value_states.detach()
        for handle in handles:
            handle.paged_layer = self  # type: ignore[attr-defined]
        return handles

    @torch.compiler.disable(reason=ON_THE_HOST)  # type: ignore[untyped-decorator]
    def attend(
        self, query: Tensor, keys: int, band: BandMask, window: Window, scoring: Scoring, settings: Settings
    ) -> Tensor:  # fmt: skip
        """Store the ``keys`` tokens of the last ``update``, then attend to all: query [B, Hq, T, D] to [B, T, Hq, Dv].

        A layer that reads the keys of another may have queries for the newest of the tokens alone.
        """
        if window.bounds is None:
            window = self._own_window(window)
        elif self.overrides:
            raise bad_value("window", "None for a layer whose queries see runs of keys", self.pages.window)
        passes = self._passes_again(query.shape[2], keys) if self.new is None else self._passes_of(*self.new, band)
        self._check_runs(passes, band)
        if self.store is None:
            raise RuntimeError("lazy_initialization made no pool")
        q = query.transpose(1, 2)
        out = q.new_empty(*q.shape[:-1], self.store.v_head_dim)
        for p in (p.on(query.device) for p in passes):
            part = slice(p.start, p.stop)
            if self.new is not None:
                k, v = (x[:, :, part].transpose(1, 2).flatten(0, 1) for x in self.new)
                append_kv(self.store, k, v, p.slot_mapping)
            if self.rotary is not None and p.max_kv_len > held_keys(window):
                if settings.compute != "float" or settings.fp8_queries:
                    raise bad_value("compute", "float, where leading tokens are kept near", settings.compute)
                out[:, part] = attend_near(q[:, part], self.store, p, window, self.rotary, scoring, settings.impl)
                continue
            seen = window if window.bounds is None else _rows_of(window, len(q), part)
            _attend_pages(q[:, part], self.store, p, seen, out[:, part], scoring, settings)
        self.forget(self.get_seq_length())
        return out

    def forget(self, length: int) -> None:
        """Hold ``length`` columns and no new keys."""
        self.length, self.new = length, None

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.length if self.new is None else self.length + self.new[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and first column of the mask for ``query_length`` new tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def _passes_of(self, key: Tensor, value: Tensor, band: BandMask) -> list[Pass]:
        """The passes of new keys, with pages to store them in, and scales."""
        reach = () if band.host_runs is None else (band.host_runs[..., 1].amax(0) - self.length).tolist()
        passes = self.pages.extend(self.length, key.shape[2], band.first, key.device, reach)
        if self.store is None:
            self.lazy_initialization(key, value)
        if self.store is not None and self.pages.tokens(self.length) < CALIBRATION_TOKENS:
            self._calibrate(self.store, [_without_padding(x, band, self.length) for x in (key, value)])
        return passes

    def _own_window(self, window: Window) -> Window:
        """The window that was given with the cache, or the mask's, which must be what pages are kept for."""
        held = self.pages.window
        if self.overrides and window.causal:
            return held
        if window != held:
            raise bad_value("past_key_values", f"a PagedCache made for {window}", held)
        return window

    def _check_runs(self, passes: list[Pass], band: BandMask) -> None:
        """Whether rows that see runs of keys find them: none released before their pass, none stored after it."""
        if band.host_runs is None:
            return
        first = torch.tensor(band.first)[:, None]
        for p in passes:
            low, end = band.host_runs[:, p.start : p.stop].unbind(-1)  # columns, [B, rows]
            held = first + torch.tensor(p.held)[:, None]
            if bool(((low < end) & ((low < held) | (end > p.stored))).any()):
                wanted = f"keys in a window of {self.pages.window.size}, and behind it images of this call alone"
                raise bad_value("attention_mask", wanted, "rows that see keys which are not held")

    def _passes_again(self, queries: int, keys: int) -> list[Pass]:
        """The passes of the newest call, for another layer that reads the same keys."""
        passes = self.pages.passes
        if not passes or passes[-1].stop != keys or queries > keys:
            raise bad_value("key", f"keys of the newest call, for its {queries} queries", "keys of another call")
        if len(passes) > 1:
            wanted = f"at least {keys}, as another layer reads the keys of this one after they are stored"
            raise bad_value("chunk", wanted, self.pages.chunk)
        return [replace(passes[0], stop=queries)]

    def _calibrate(self, store: PagedKV, new: list[Tensor]) -> None:
        """Let static scales cover these tokens too; what is stored is quantised again."""
        static = static_scales(store.quant)
        if not static:
            return
        largest = [magnitudes(x) for x in new]
        held = self.pages.holding(self.length)
        if held:
            largest = [torch.maximum(a, b) for a, b in zip(self._largest, largest, strict=True)]
        self._largest = largest
        pages = torch.tensor(held, dtype=torch.long, device=store.k.device)
        for name, granularity in static.items():
            rescale(store, name, calibrate(largest[name == "v_scale"], store.quant.dtype, granularity), pages)


def _attend_pages(
    q: Tensor, store: PagedKV, p: Pass, window: Window, out: Tensor, scoring: Scoring, settings: Settings
) -> None:
    """Attention of one pass, q [B, T, Hq, D], into ``out`` [B, T, Hq, Dv], in the form that ``settings`` ask for."""
    options: dict[str, Any] = dict(max_kv_len=p.max_kv_len, window=window, impl=settings.impl, **scoring)
    options["compute"] = settings.compute
    if settings.fp8_queries:
        q8, q_scale = quantise_q(q)
        out.copy_(paged_attention(q8, store, p.block_table, p.seq_lens, q_scale=q_scale, **options))
    else:
        paged_attention(q, store, p.block_table, p.seq_lens, out=out, **options)


def _rows_of(window: Window, batch: int, part: slice) -> Window:
    """The window of bounds [batch * rows, 2] of the rows ``part`` of each sequence: [batch, rows, 2]."""
    bounds = cast(Tensor, window.bounds).unflatten(0, (batch, -1))
    return Window(bounds=bounds[:, part])


def _ones(granularity: str, num_kv_heads: int, head_dim: int, device: torch.device) -> Tensor | None:
    """A static scale of 1; None for granularities that have none."""
    shapes = {"tensor": (), "head": (num_kv_heads,), "channel": (num_kv_heads, head_dim)}
    return torch.ones(shapes[granularity], device=device) if granularity in shapes else None


def _without_padding(x: Tensor, band: BandMask, seen: int) -> Tensor:
    """New keys or values [B, Hkv, T, D], of the columns after the first ``seen``, with 0 where the batch is padded."""
    if band.padding is None:
        return x
    first, end = band.padding.to(x.device)[..., None, None, None] - seen
    column = torch.arange(x.shape[2], device=x.device)[:, None]
    return x.masked_fill((column < first) | (column >= end), 0)
