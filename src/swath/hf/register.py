"""Making swath selectable as an attention implementation."""

from __future__ import annotations

from functools import partial

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from swath.errors import bad_type, bad_value
from swath.hf.attention import attention_forward
from swath.hf.continuous import continuous_forward
from swath.hf.masks import band_mask
from swath.hf.settings import REGISTERED, Settings, WindowChoice, check_window_choice
from swath.hf.versions import continuous_name

# Transformers gives these substrings a meaning of their own wherever they occur in an implementation's name.
RESERVED = ("flash", "sdpa", "flex_attention", "eager", "/", "|", "@", ":")


def register(name: str = "swath", *, window: WindowChoice = None, impl: str = "auto") -> None:
    """Make swath selectable: ``attn_implementation=name`` or ``model.set_attn_implementation(name)``.

    Grouped heads, sliding windows, soft caps, sink logits (gpt-oss; local shards under tensor parallelism) and
    padding on either side are honoured. A mask may be any in which each query sees its keys in one run; under
    ``torch.compile`` it is a causal, sliding or full window with padding at the ends of the sequences. Other masks are
    refused with an error. For continuous batching (``model.generate_batch``) see ``set_continuous_batching``.

    Args:
        name: the implementation's name. Registering a name again replaces it.
        window: a Window for all layers, or ``f(layer_idx) -> Window | None``, that replaces the model's own: windows
            with leading tokens (``Window(128, global_tokens=4)``) for a model trained with full attention, say.
            Leading tokens count from the first real token. None: what the model says.
        impl: the swath backend for attention.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(name, str) or not name:
        raise bad_type("name", "a non-empty string", repr(name))
    if any(part in name for part in RESERVED):
        raise bad_value("name", f"a name without {', '.join(map(repr, RESERVED))}", repr(name))
    check_window_choice(window)
    REGISTERED[name] = settings = Settings(window, impl)
    AttentionInterface.register(name, partial(attention_forward, settings))
    AttentionMaskInterface.register(name, band_mask)
    # Continuous batching lays sequences end to end and tells their lengths: it gets no mask function.
    AttentionInterface.register(continuous_name(name), partial(continuous_forward, settings))
