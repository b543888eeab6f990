"""A paged, optionally quantised key/value cache for ``generate(past_key_values=...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from swath.cache import PagedKV, check_page_size
from swath.errors import bad_value
from swath.hf.attention import Scoring
from swath.hf.masks import BandMask
from swath.hf.pages import Pages
from swath.hf.settings import REGISTERED, WindowChoice, check_window_choice, window_of_layer
from swath.hf.versions import layer_types_and_windows
from swath.ops.append import append_kv
from swath.ops.paged import paged_attention
from swath.quant import KVQuant, calibrate
from swath.window import Window

QUANTS = {
    "int8": KVQuant(torch.int8, "token"),
    "fp8": KVQuant(torch.float8_e4m3fn, "token"),
    "fp8_e5m2": KVQuant(torch.float8_e5m2, "token"),
}
"""Storage by name, all with one scale per token and head."""


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer, in pages.

    ``update`` hands the new keys on with this layer attached to them as ``paged_layer``; swath's attention function
    finds it there, and ``attend`` stores the keys and reads all of them from the pages.
    """

    supports_early_init = False

    def __init__(self, pages: Pages, quant: KVQuant | None, overrides: bool) -> None:
        super().__init__()
        self.pages, self.quant, self.overrides = pages, quant, overrides
        self.store: PagedKV | None = None
        self.length = 0
        self._new: tuple[Tensor, Tensor] | None = None

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
        return self.store.page_size * self.store.quant.bytes_per_token(self.store.num_kv_heads, self.store.head_dim)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pool. Static scales (tensor, head, channel) are taken from these keys and values."""
        quant = KVQuant(key_states.dtype) if self.quant is None else self.quant
        _, num_kv_heads, _, head_dim = key_states.shape
        scales = [
            None
            if granularity in ("none", "token")
            else calibrate(x.transpose(1, 2).flatten(0, 1), quant.dtype, granularity)
            for x, granularity in ((key_states, quant.k), (value_states, quant.v_granularity))
        ]
        self.store = PagedKV.empty(
            quant, self.pages.num_pages, num_kv_heads, self.pages.page_size, head_dim,
            k_scale=scales[0], v_scale=scales[1], device=key_states.device,
        )  # fmt: skip
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, Hkv, T, D]; they come back with this layer attached."""
        if self._new is not None:
            raise bad_value("attn_implementation", "one registered by swath.hf.register", "one that read no pages")
        self._new = key_states, value_states
        self.length += key_states.shape[2]
        handle = key_states.detach()
        handle.paged_layer = self  # type: ignore[attr-defined]
        return handle, value_states

    def attend(self, query: Tensor, band: BandMask, window: Window, scoring: Scoring, impl: str) -> Tensor:
        """Store the tokens of the last ``update``, then attend to all: query [B, Hq, T, D] to [B, T, Hq, D]."""
        if self._new is None:
            raise bad_value("key", "keys of the last update, read once", "keys read before")
        (key, value), self._new = self._new, None
        if self.overrides:
            window = self.pages.window
        if window != self.pages.window:
            raise bad_value("past_key_values", f"a PagedCache made for {window}", self.pages.window)
        new = key.shape[2]
        passes = self.pages.extend(self.length - new, new, band.first, key.device)
        store = self._store_for(key, value)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for p in passes:
            if p.copies is not None:
                _copy_pages(store, store, p.copies[0], p.copies[1])
            part = slice(p.start, p.stop)
            append_kv(store, k[:, part].flatten(0, 1), v[:, part].flatten(0, 1), p.slot_mapping)
            paged_attention(
                q[:, part], store, p.block_table, p.seq_lens, max_kv_len=p.max_kv_len, window=window,
                out=out[:, part], impl=impl, **scoring,
            )  # fmt: skip
        return out

    def forget(self, length: int) -> None:
        """Go back to ``length`` columns."""
        self.length, self._new = length, None

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and first column of the mask for ``query_length`` new tokens."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def _store_for(self, key: Tensor, value: Tensor) -> PagedKV:
        if self.store is None:
            self.lazy_initialization(key, value)
        old = self.store
        if old is not None and old.num_pages < self.pages.num_pages:
            self.store = _grown(old, self.pages.num_pages)
        if self.store is None:
            raise RuntimeError("lazy_initialization made no pool")
        return self.store


class PagedCache(Cache):  # type: ignore[misc]
    """A cache of pages: old ones are reused once the window has passed them, and values may be int8 or fp8.

    Prefill and decode both read the pages. The model must run on an implementation that ``register`` made. Pad
    batches on the left to generate. Layers may be full or sliding, each with its own window.

    A worked example: a model whose layers slide over 128 keys holds at most 9 pages of 16 tokens per sequence and
    layer while it decodes, however long the text.

    Args:
        config: ``model.config``; its layer types and sliding window say what each layer keeps.
        quant: "int8", "fp8" (e4m3), "fp8_e5m2" with one scale per token and head, or any KVQuant (static scales are
            calibrated on the first call's tokens); None stores what the model computes.
        page_size: tokens in a page: 1, 8 or a multiple of 16.
        window: replaces the windows of the model and of ``register``: a Window, or ``f(layer_idx)``; where it is
            None, the window given to ``register`` counts, else the model's.
        chunk: where the window is bounded, long prompts go through in passes of so many tokens, so that their
            pages too are reused.

    Raises:
        TypeError, ValueError: naming the argument; a layer type that keeps no plain keys and values.
    """

    def __init__(
        self,
        config: Any,
        *,
        quant: KVQuant | str | None = None,
        page_size: int = 16,
        window: WindowChoice = None,
        chunk: int = 512,
    ) -> None:
        self._config = config.get_text_config(decoder=True)
        check_window_choice(window)
        check_page_size(page_size)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise bad_value("chunk", "an int >= 1", repr(chunk))
        storage = _quant_of(quant)
        self._groups: dict[Window, Pages] = {}
        layers = []
        for layer_idx, own in enumerate(_model_windows(self._config)):
            override = window_of_layer(window, layer_idx)
            effective = override or self._settings_window(layer_idx) or own
            pages = self._groups.setdefault(effective, Pages(effective, page_size, chunk))
            layers.append(PagedLayer(pages, storage, override is not None))
        super().__init__(layers=layers)

    @property
    def nbytes_live(self) -> int:
        """Bytes of the pages in use now, scales included, over all layers."""
        return sum(layer.pages.live * layer.page_bytes for layer in self.layers)

    @property
    def nbytes_peak(self) -> int:
        """Bytes of the most pages that each layer ever held at once, summed over the layers."""
        return sum(layer.pages.peak * layer.page_bytes for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``PagedLayer.update``."""
        if self._config._attn_implementation not in REGISTERED:
            wanted = "one registered by swath.hf.register, and PagedCache(model.config)"
            raise bad_value("attn_implementation", wanted, repr(self._config._attn_implementation))
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def reset(self) -> None:
        """Forget all sequences and keep the pools."""
        for pages in self._groups.values():
            pages.reset()
        self._forget(0)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens of every sequence (a count <= 0, as Transformers passes it).

        Raises:
            ValueError: a positive count, or a window's pages are gone (see ``activate_past_recording``).
        """
        removed = -int(tokens_to_remove)  # assisted decoding passes a tensor
        if removed < 0:
            raise bad_value("tokens_to_remove", "a count <= 0", tokens_to_remove)
        for pages in self._groups.values():
            pages.crop(removed)
        self._forget(max(self.get_seq_length() - removed, 0))

    def activate_past_recording(self) -> None:
        """From now on ``crop`` alone releases the pages that a window has passed: assisted decoding goes back."""
        for pages in self._groups.values():
            pages.keep_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let beam i continue beam ``beam_idx[i]``; their pages are shared until one of them writes."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        batch = next(iter(self._groups.values())).batch
        self._select([b for b in range(batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._select(indices.tolist())

    def _select(self, sequences: Sequence[int]) -> None:
        for pages in self._groups.values():
            pages.select(sequences)

    def _forget(self, length: int) -> None:
        for layer in self.layers:
            layer.forget(length)

    def _settings_window(self, layer_idx: int) -> Window | None:
        settings = REGISTERED.get(self._config._attn_implementation)
        return None if settings is None else settings.override(layer_idx)


def _model_windows(config: Any) -> list[Window]:
    """The window of each layer, from its configuration."""
    layers = layer_types_and_windows(config)
    unknown = sorted({kind for kind, _ in layers} - {"full_attention", "sliding_attention"})
    if unknown:
        raise bad_value("config", "layers of full_attention or sliding_attention", ", ".join(unknown))
    return [Window(size if kind == "sliding_attention" else None) for kind, size in layers]


def _quant_of(quant: KVQuant | str | None) -> KVQuant | None:
    if quant is None or isinstance(quant, KVQuant):
        return quant
    if quant not in QUANTS:
        raise bad_value("quant", f"one of {', '.join(map(repr, QUANTS))}, a KVQuant or None", repr(quant))
    return QUANTS[quant]


def _grown(old: PagedKV, num_pages: int) -> PagedKV:
    """A larger pool with the same pages first. Static scales stay."""
    static = {name: getattr(old, name) for name in ("k_scale", "v_scale") if name not in _token_scales(old.quant)}
    new = PagedKV.empty(
        old.quant, num_pages, old.num_kv_heads, old.page_size, old.head_dim, device=old.k.device, **static
    )
    _copy_pages(old, new, slice(old.num_pages), slice(old.num_pages))
    return new


def _copy_pages(source: PagedKV, target: PagedKV, source_pages: Tensor | slice, target_pages: Tensor | slice) -> None:
    """Copy pages with their token scales."""
    for name in ("k", "v", *_token_scales(source.quant)):
        old, new = getattr(source, name), getattr(target, name)
        if old.element_size() == 1:  # fp8 moves as bytes, which torch can index everywhere
            old, new = old.view(torch.int8), new.view(torch.int8)
        new[target_pages] = old[source_pages]


def _token_scales(quant: KVQuant) -> list[str]:
    """The scale tensors that have a value for every slot, and so belong to pages."""
    granularities = {"k_scale": quant.k, "v_scale": quant.v_granularity}
    return [name for name, granularity in granularities.items() if granularity == "token"]
