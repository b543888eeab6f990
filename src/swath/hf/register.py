"""Making swath selectable as an attention implementation."""

from __future__ import annotations

from functools import partial

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from swath.checks import check_choice
from swath.errors import bad_type, bad_value
from swath.hf.attention import attention_forward
from swath.hf.continuous import continuous_forward
from swath.hf.masks import band_mask
from swath.hf.settings import REGISTERED, Settings, WindowChoice, check_window_choice
from swath.hf.versions import continuous_name
from swath.ops.arguments import COMPUTES

# Transformers gives these substrings a meaning of their own wherever they occur in an implementation's name.
RESERVED = ("flash", "sdpa", "flex_attention", "eager", "/", "|", "@", ":")


def register(
    name: str = "swath", *, window: WindowChoice = None, impl: str = "auto", compute: str = "float",
    fp8_queries: bool = False,
) -> None:  # fmt: skip
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
        compute, fp8_queries: how queries multiply with the keys of an 8-bit PagedCache: ``compute`` is "float", "int8"
            or "fast", as in ``paged_attention``; with ``fp8_queries`` ``quantise_q`` makes them fp8 first.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(name, str) or not name:
        raise bad_type("name", "a non-empty string", repr(name))
    if any(part in name for part in RESERVED):
        raise bad_value("name", f"a name without {', '.join(map(repr, RESERVED))}", repr(name))
    check_window_choice(window)
    check_choice("compute", compute, COMPUTES)
    if not isinstance(fp8_queries, bool):
        raise bad_type("fp8_queries", "a bool", type(fp8_queries).__name__)
    REGISTERED[name] = settings = Settings(window, impl, compute, fp8_queries)
    AttentionInterface.register(name, partial(attention_forward, settings))
    AttentionMaskInterface.register(name, band_mask)
    # Continuous batching lays sequences end to end and tells their lengths: it gets no mask function.
    AttentionInterface.register(continuous_name(name), partial(continuous_forward, settings))
