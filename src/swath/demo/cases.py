"""The rows of the table: which attention, over which cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from swath.demo import gpt_oss
from swath.demo.measure import Case
from swath.demo.settings import Settings
from swath.hf.leading import leaves_leading
from swath.hf.rotary import why_unknown
from swath.window import Window


def windowed(model: Any, settings: Settings) -> Case:
    """The user's window over the user's cache: what the demo generates text with."""
    size, leading = settings.window, settings.global_tokens
    name = f"window {size}" + (f" + {leading} leading" if leading else "")
    return Case(name, model, Window(size, global_tokens=leading), settings.kv)


def cases(model: Any, calibration: list[Tensor], settings: Settings) -> list[Case]:
    """Full attention, the bare window, the window with leading tokens, and gpt-oss's shape where the model allows.

    Each comes over a cache in the model's dtype and over the quantised one.
    """
    size = settings.window
    attentions: list[tuple[str, Any, Window | None]] = [
        (own_attention(model.config), model, None),
        (f"window {size}", model, Window(size)),
    ]
    if settings.global_tokens:
        chosen = windowed(model, settings)
        attentions.append((chosen.attention, model, chosen.window))
    if settings.quick:
        first, *others = attentions
        return [Case(*first, kv) for kv in _kinds(settings)] + [Case(*each, settings.kv) for each in others]
    if can_reshape(model):
        sinks = gpt_oss.calibrate(model, calibration)
        for name, given in (("gpt-oss shape, sinks", sinks), ("gpt-oss shape, no sinks", None)):
            attentions.append((name, gpt_oss.with_sinks(model, given, size), None))
    every = [Case(*each, kv) for each in attentions for kv in _kinds(settings)]
    far = after_long_text(model, settings) if settings.budget.before else []
    last = max((i for i, case in enumerate(every) if case.attention == windowed(model, settings).attention), default=-1)
    return [*every[: last + 1], *far, *every[last + 1 :]]


def after_long_text(model: Any, settings: Settings) -> list[Case]:
    """The user's window after a long text, with the leading tokens where the text has them, and near."""
    case, before = windowed(model, settings), settings.budget.before
    if case.window is None or not leaves_leading(case.window) or why_unknown(model.config, "full_attention"):
        return []
    return [
        replace(case, attention=f"... after {before // 1024}k tokens", before=before),
        replace(case, attention="... kept near", before=before, leading_positions="cache"),
    ]


def notes(model: Any, settings: Settings) -> str:
    """What the names of the rows leave unsaid, and which rows are left out."""
    if settings.quick:
        return f"Quick: half the tokens, and only some rows, of the full demo. {_trained(model)}"
    parts = [_trained(model)]
    if can_reshape(model):
        parts.append(f"gpt-oss shape: window {settings.window} in the odd layers; sink logits calibrated, not trained.")
    else:
        parts.append(f"No rows with sinks: they are made from llama models, and this one is {model.config.model_type}.")
    if settings.budget.before:
        parts.append(
            f"After {settings.budget.before // 1024}k tokens: other text of {settings.budget.before:,} tokens was read"
            ' before. Kept near: the same, with `leading_positions="cache"`.'
        )
    return " ".join(parts)


def can_reshape(model: Any) -> bool:
    """Whether a model of gpt-oss's shape can be made of it."""
    return bool(model.config.model_type == "llama")


def _trained(model: Any) -> str:
    """With which attention the model was trained, and up to which length."""
    own, longest = own_attention(model.config), getattr(model.config, "max_position_embeddings", None)
    return f"The model was trained with {own}" + (f", up to {longest:,} tokens." if longest else ".")


def own_attention(config: Any) -> str:
    """The name of what the model does by itself."""
    return "the model's own windows" if getattr(config, "sliding_window", None) else "full attention"


def _kinds(settings: Settings) -> list[str]:
    return list(dict.fromkeys(["none", settings.kv]))
