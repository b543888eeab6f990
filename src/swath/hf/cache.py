"""A paged, optionally quantised key/value cache for ``generate(past_key_values=...)``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from swath.checks import check_int
from swath.errors import bad_type, bad_value
from swath.hf.layer import ON_THE_HOST, PagedLayer
from swath.hf.leading import leaves_leading
from swath.hf.pages import Pages
from swath.hf.rotary import rotary_of
from swath.hf.settings import REGISTERED, WindowChoice, check_window_choice, window_of_layer
from swath.hf.versions import layer_types_and_windows
from swath.pages import check_page_size
from swath.quant import KVQuant
from swath.window import Window

QUANTS = {
    "int8": KVQuant(torch.int8, "token"),
    "fp8": KVQuant(torch.float8_e4m3fn, "token"),
    "fp8_e5m2": KVQuant(torch.float8_e5m2, "token"),
}
"""Storage by name, all with one scale per token and head."""

WINDOWED = "sliding_attention", "chunked_attention"
"""Types of layers that keep the newest keys alone: a query in chunks sees none that is a chunk ago or more."""

AFTER_FAILURE = "a cache of this model, all layers with the same tokens; crop or reset it after a call that failed"


class PagedCache(Cache):  # type: ignore[misc]
    """A cache of pages: old ones are reused once the window has passed them, and values may be int8 or fp8.

    Prefill and decode both read the pages. The model must run on an implementation that ``register`` made. Pad
    batches on the left to generate. Layers may be full, sliding or chunked, each with its own window. Images whose
    tokens see each other, and prefixes, are read from pages as well: those of a call are held while it attends.

    A worked example: a model whose layers slide over 128 keys holds at most 9 pages of 16 tokens per sequence and
    layer while it decodes, however long the text.

    Args:
        config: ``model.config``; its layer types and sliding window say what each layer keeps.
        quant: "int8", "fp8" (e4m3), "fp8_e5m2" with one scale per token and head, or any KVQuant; None stores what
            the model computes. Static scales are calibrated on the first tokens: those of the first call, and of later
            ones as long as fewer than 128 were stored before; what is stored is quantised again as the scales grow.
        page_size: tokens in a page: 1, 8 or a multiple of 16.
        window: replaces the windows of the model and of ``register``: a Window, or ``f(layer_idx)``; where it is
            None, the window given to ``register`` counts, else the model's.
        chunk: where the window is bounded, long prompts go through in passes of this many tokens, so that their
            pages too are reused. Layers whose keys other layers read hold a prompt whole until the next call.
        leading_positions: where leading tokens (``Window(128, global_tokens=4)``) stand for queries far behind them.
            "text": where the text has them, so that a model meets distances beyond those it was trained on.
            "cache": right before the window, as StreamingLLM counts. For models with rotary embeddings of fixed
            frequencies, whose tokens have consecutive positions, and for every ``quant``.

    After a call that failed, in the middle of the layers say, ``crop`` goes back to the tokens before it, or ``reset``
    to none; until then calls are refused. When ``crop``, ``reorder_cache`` or the like raise, the cache is unchanged.

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
        leading_positions: str = "text",
    ) -> None:
        self._config = config.get_text_config(decoder=True)
        check_window_choice(window)
        check_page_size(check_int("page_size", page_size, "an int"))
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise bad_value("chunk", "an int >= 1", repr(chunk))
        if leading_positions not in ("text", "cache"):
            raise bad_value("leading_positions", "'text' or 'cache'", repr(leading_positions))
        storage = _quant_of(quant)
        self._groups: dict[tuple[Window, int | None], Pages] = {}
        self._paged: list[PagedLayer] = []
        layers: list[Any] = []
        for layer_idx, kept in enumerate(_kept_by_layers(self._config)):
            if kept is None:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING["dummy"]())
                continue
            override = window_of_layer(window, layer_idx)
            effective = override or self._settings_window(layer_idx) or kept.window
            group = effective, None if kept.read_again else chunk
            pages = self._groups.setdefault(group, Pages(effective, page_size, group[1]))
            turns = leading_positions == "cache" and leaves_leading(effective)
            rotary = rotary_of(self._config, kept.layer_type) if turns else None
            self._paged.append(PagedLayer(pages, storage, override is not None, len(self._paged), rotary))
            layers.append(self._paged[-1])
        if leading_positions == "cache" and all(layer.rotary is None for layer in self._paged):
            raise bad_value("leading_positions", "'text' without a layer whose window has leading tokens", "'cache'")
        super().__init__(layers=layers)

    @property
    def nbytes_live(self) -> int:
        """Bytes of the pages in use now, scales included, over all layers."""
        return sum(layer.pages.live * layer.page_bytes for layer in self._paged)

    @property
    def nbytes_peak(self) -> int:
        """Bytes of the most pages that each layer ever held at once, summed over the layers."""
        return sum(layer.pages.peak * layer.page_bytes for layer in self._paged)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the pools, pages in use and free ones: after a prompt, the next call gives back what it can."""
        return sum(store.nbytes for pages in self._groups.values() for store in pages.pools.made)

    @torch.compiler.disable(reason=ON_THE_HOST)  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``PagedLayer.update``."""
        if self._config._attn_implementation not in REGISTERED:
            wanted = "one registered by swath.hf.register, and PagedCache(model.config)"
            raise bad_value("attn_implementation", wanted, repr(self._config._attn_implementation))
        if layer_idx >= len(self.layers):
            wanted = f"a PagedCache of this model's configuration, whose layers are {layer_idx + 1} or more"
            raise bad_value("past_key_values", wanted, len(self.layers))
        self._check_order(self.layers[layer_idx], key_states.shape[2])
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
        removed = -_count("tokens_to_remove", tokens_to_remove)  # assisted decoding passes a tensor
        if removed < 0:
            raise bad_value("tokens_to_remove", "a count <= 0", tokens_to_remove)
        length = max(self.get_seq_length() - removed, 0)
        held = min(layer.length for layer in self._paged)
        if length > held:
            wanted = f"{held - self.get_seq_length()} or less: a call that failed left some layers with {held} tokens"
            raise bad_value("tokens_to_remove", wanted, -removed)
        for pages in self._groups.values():
            pages.check_crop(length)
        for pages in self._groups.values():
            pages.crop(length)
        self._forget(length)

    def activate_past_recording(self) -> None:
        """From now on ``crop`` alone releases the pages that a window has passed: assisted decoding goes back."""
        for pages in self._groups.values():
            pages.keep_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let beam i continue beam ``beam_idx[i]``; their pages are shared until one of them writes."""
        self._select("beam_idx", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if _count("repeats", repeats) < 1:
            raise bad_value("repeats", "an int >= 1", repeats)
        self._select("repeats", torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``: their numbers, or a bool for each."""
        self._select("indices", indices)

    @property
    def _batch(self) -> int:
        """Sequences held; 0 before the first token."""
        batches = {pages.batch for pages in self._groups.values()}
        if len(batches) > 1:
            raise bad_value("past_key_values", AFTER_FAILURE, f"{min(batches)} and {max(batches)} sequences")
        return batches.pop()

    def _select(self, name: str, indices: Tensor) -> None:
        batch = self._batch
        if not batch:
            return
        try:
            sequences = torch.arange(batch)[torch.as_tensor(indices).cpu()]
        except IndexError as error:
            raise bad_value(name, f"indices of {batch} sequences", f"{indices}: {error}") from None
        if sequences.dim() != 1:
            raise bad_value(name, "one dimension", tuple(sequences.shape))
        for pages in self._groups.values():
            pages.select(sequences.tolist())

    def _forget(self, length: int) -> None:
        for layer in self._paged:
            layer.forget(length)

    def _check_order(self, layer: PagedLayer, new: int) -> None:
        """Whether the layer before has stored its tokens of this call, and the last layer those of the call before."""
        before = self._paged[layer.order - 1]
        if layer.order and before.new is not None:
            raise bad_value("attn_implementation", "one registered by swath.hf.register", "one that read no pages")
        length = layer.get_seq_length()
        if layer.new is not None or before.length != (length + new if layer.order else length):
            raise bad_value(
                "past_key_values", AFTER_FAILURE, f"{length} tokens in a layer and {before.length} before it"
            )

    def _settings_window(self, layer_idx: int) -> Window | None:
        settings = REGISTERED.get(self._config._attn_implementation)
        return None if settings is None else settings.override(layer_idx)


@dataclass(frozen=True)
class Kept:
    """What a layer of the model keeps: the keys in a window, which later layers may read again; and its type."""

    window: Window
    read_again: bool
    layer_type: str


def _kept_by_layers(config: Any) -> list[Kept | None]:
    """What each layer keeps, from the configuration; None for a layer that reads another's keys, or has none."""
    layers = layer_types_and_windows(config)
    unknown = sorted({kind for kind, _ in layers} - {"full_attention", *WINDOWED, "dummy"})
    if unknown:
        raise bad_value("config", f"layers of full_attention, {' or '.join(WINDOWED)}", ", ".join(unknown))
    last = {kind: layer_idx for layer_idx, (kind, _) in enumerate(layers)}
    shared = bool(getattr(config, "num_kv_shared_layers", None))
    return [
        None if kind == "dummy" else Kept(Window(size if kind in WINDOWED else None), shared and last[kind] == i, kind)
        for i, (kind, size) in enumerate(layers)
    ]


def _count(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise bad_type(name, "an int", type(value).__name__) from None


def _quant_of(quant: KVQuant | str | None) -> KVQuant | None:
    if quant is None or isinstance(quant, KVQuant):
        return quant
    if quant not in QUANTS:
        raise bad_value("quant", f"one of {', '.join(map(repr, QUANTS))}, a KVQuant or None", repr(quant))
    return QUANTS[quant]
