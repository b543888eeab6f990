"""Errors in FlashAttention 2's words: swath's operators and other releases name arguments in their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from swath.errors import bad_type

Function = TypeVar("Function", bound=Callable[..., Any])

WORDS = {
    "scale": "softmax_scale",
    "sink": "s_aux",
    "max_q_len": "max_seqlen_q",
    "max_kv_len": "max_seqlen_k",
}
"""What swath calls an argument, and what FlashAttention does."""

OTHER_WORDS = {
    "scale": "softmax_scale",
    "sm_scale": "softmax_scale",
    "sink": "s_aux",
    "sinks": "s_aux",
    "learnable_sink": "s_aux",
    "page_table": "block_table",
    "return_lse": "return_attn_probs or return_softmax_lse",
    "return_softmax_lse": "return_attn_probs",
    "return_attn_probs": "return_softmax_lse",
    "seqused_k": "cu_seqlens_k or cache_seqlens",
    "cu_seqlens_q": "flash_attn_varlen_func, which takes a block_table",
    "q_descale": "q_scale of swath.paged_attention",
    "k_descale": "k_scale of a PagedKV, for swath.paged_attention",
    "v_descale": "v_scale of a PagedKV, for swath.paged_attention",
    "out": "out of swath.attention or swath.paged_attention",
}
"""What FlashAttention 3 and 4, vLLM and swath call an argument, and what takes its place in FlashAttention 2."""


def in_flash_words(**own: str) -> Callable[[Function], Function]:
    """Let a function's errors begin with FlashAttention's names of arguments; ``own`` are names that it alone has."""
    words = WORDS | own

    def decorate(function: Function) -> Function:
        known = signature(function).parameters

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                _check_names(kwargs, known)
                name, colon, rest = str(error).partition(":")
                if not colon or name not in words:
                    raise
                raise type(error)(f"{words[name]}:{rest}") from None

        return call  # type: ignore[return-value]

    return decorate


def _check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Keywords that the function has; for a word of another library the error says FlashAttention 2's."""
    for name in given:
        if name not in known:
            raise bad_type(name, OTHER_WORDS.get(name, f"one of {', '.join(known)}"), f"{name}=") from None
