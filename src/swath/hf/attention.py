"""swath as an attention implementation of Transformers."""

from __future__ import annotations

from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from swath.errors import bad_type, bad_value
from swath.hf.carried import CarriedMask
from swath.hf.masks import BandMask
from swath.hf.settings import Settings
from swath.ops.attention import attention
from swath.window import Window

# Keywords that would change the result, so they may not be ignored.
UNSUPPORTED = (
    "position_bias",
    "indices",
    "block_indices",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cache",
    "output_attentions",
)


class Scoring(TypedDict):
    """How a layer makes its scores: options of the attention operators."""

    scale: float | None
    softcap: float
    sink: Tensor | None


def scoring_of(
    query: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    others: dict[str, Any],
) -> Scoring:
    """The keywords that models pass to attention functions; what swath cannot compute exactly raises ValueError."""
    if dropout:
        raise bad_value("dropout", "0 (swath is forward only; call model.eval())", dropout)
    for name in UNSUPPORTED:
        if others.get(name) is not None and others[name] is not False:
            raise bad_value(name, "nothing: swath does not support it", type(others[name]).__name__)
    return Scoring(scale=scaling, softcap=softcap or 0.0, sink=_local_sink(s_aux, query))


def attention_forward(
    settings: Settings,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CarriedMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer: query [B, Hq, Q, D], key and value [B, Hkv, K, D] to [B, Q, Hq, D].

    Keys come after RoPE and not repeated. Keys that a PagedCache returned are read from its pages instead.

    Raises:
        TypeError, ValueError: what cannot be computed exactly: dropout, a bias, a mask of another form.
    """
    scoring = scoring_of(query, scaling, dropout, softcap, s_aux, kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    layer = _paged_layer(key, value)
    kv_len = key.shape[2] if layer is None else layer.get_seq_length()
    band = _band(attention_mask, query.shape[0], query.shape[2], kv_len, sliding_window, causal, layer is not None)
    band = band if layer is None or band.window.causal else band.with_runs(query.device)
    window = _effective_window(settings.override(getattr(module, "layer_idx", 0)), band)
    if layer is not None:
        if window is band.window and band.says(layer.pages.window):
            window = layer.pages.window
        if not isinstance(band.q_column, Tensor) and band.q_column + band.q_len != kv_len:
            raise bad_value("attention_mask", "rows for the newest tokens", f"rows from column {band.q_column}")
        return cast(Tensor, layer.attend(query, key.shape[2], band, window, scoring, settings)), None
    return _dense(query, key, value, band, window, scoring, settings.impl), None


def _paged_layer(key: Tensor, value: Tensor) -> Any:
    """The layer of a PagedCache that handed out these keys and values, which are then read from its pages."""
    layer, of_value = (getattr(x, "paged_layer", None) for x in (key, value))
    if layer is not of_value:
        changed = "key" if layer is None else "value"
        raise bad_value(changed, "the tensor that PagedCache.update returned", "another: the model changes it first")
    return layer


def _dense(
    query: Tensor, key: Tensor, value: Tensor, band: BandMask, window: Window, scoring: Scoring, impl: str
) -> Tensor:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    cu_seqlens_q, cu_seqlens_k, q_start = band.varlen_on(query.device)
    out: Any = attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q_len=band.q_len, max_kv_len=band.kv_len, window=window,
        q_start=q_start, impl=impl, **scoring,
    )  # fmt: skip
    return cast(Tensor, out.unflatten(0, (band.batch, band.q_len)))


def _band(
    mask: Tensor | CarriedMask | None,
    batch: int,
    q_len: int,
    kv_len: int,
    sliding_window: int | None,
    causal: bool,
    cached: bool,
) -> BandMask:
    """The mask as a BandMask of the right size: carried, read from a tensor, or from no mask at all."""
    if mask is None:
        return _band_without_mask(batch, q_len, kv_len, sliding_window, causal, cached)
    if isinstance(mask, CarriedMask):
        band = mask.band
    elif isinstance(mask, Tensor):
        if mask.dim() == 4 and mask.shape[0] == 1:
            mask = mask.expand(batch, -1, -1, -1)
        band = BandMask.of_dense(mask, kv_len - q_len, Window(sliding_window if causal else None, causal=causal))
    else:
        raise bad_type("attention_mask", "a 4-D tensor or None", type(mask).__name__)
    if (band.batch, band.q_len, band.kv_len) != (batch, q_len, kv_len):
        wanted = f"{batch} sequences, {q_len} queries and {kv_len} keys, as query and key"
        raise bad_value("attention_mask", wanted, f"{band.batch}, {band.q_len} and {band.kv_len}")
    return band


def _band_without_mask(
    batch: int, q_len: int, kv_len: int, sliding_window: int | None, causal: bool, cached: bool
) -> BandMask:
    """The model made no mask: no padding, and the layer's own keywords say which keys a query sees."""
    if not causal:  # eager attention shows all keys then, also in a layer that says a window (DiffusionGemma)
        return BandMask(Window(causal=False), batch, q_len, kv_len, 0)
    if q_len != kv_len and not cached:
        # Where the queries stand among keys of another number (a static cache's, say) only a mask could tell.
        raise bad_value("attention_mask", f"a mask for {q_len} causal queries over {kv_len} keys", None)
    return BandMask(Window(sliding_window), batch, q_len, kv_len, kv_len - q_len)


def _effective_window(override: Window | None, band: BandMask) -> Window:
    """The override if there is one, as far as the cache still holds its keys; else the model's window."""
    if override is None:
        return band.window
    if band.window.bounds is not None:
        raise bad_value(
            "window", "None for a layer whose queries see runs of keys (images, prefixes, chunks)", override
        )
    if not band.window.causal:
        raise bad_value("window", "None for a layer that is not causal", override)
    if band.dropped:
        check_within(override, band.window.size)
    return override


def check_within(window: Window, held: int | None) -> None:
    """Refuse a window that reaches keys which a cache of the newest ``held`` keys has dropped."""
    if held is not None and (window.size is None or window.size > held or window.global_tokens):
        raise bad_value("window", f"keys within Window({held}): the model's cache drops the others", window)


def _local_sink(s_aux: Tensor | None, query: Tensor) -> Tensor | None:
    """The sink logits of the query heads at hand, in a dtype that swath takes."""
    if s_aux is None:
        return None
    # Under tensor parallelism the parameter is a DTensor of global shape, sharded as the heads are.
    sink: Tensor = s_aux.to_local() if hasattr(s_aux, "to_local") else s_aux
    return sink if sink.dtype in (torch.float32, query.dtype) else sink.float()
