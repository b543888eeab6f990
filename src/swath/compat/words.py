"""Errors in FlashAttention's words: swath's operators name arguments as swath does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

WORDS = {
    "scale": "softmax_scale",
    "sink": "s_aux",
    "max_q_len": "max_seqlen_q",
    "max_kv_len": "max_seqlen_k",
}
"""What swath calls an argument, and what FlashAttention does."""


def in_flash_words(**own: str) -> Callable[[Function], Function]:
    """Let a function's errors begin with FlashAttention's names of arguments; ``own`` are names that it alone has."""
    words = WORDS | own

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                name, colon, rest = str(error).partition(":")
                if not colon or name not in words:
                    raise
                raise type(error)(f"{words[name]}:{rest}") from None

        return call  # type: ignore[return-value]

    return decorate
