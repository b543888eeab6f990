"""What an implementation of ours is registered with, and the windows it gives to layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from swath.errors import bad_type, bad_value
from swath.window import Window

WindowChoice: TypeAlias = Window | Callable[[int], "Window | None"] | None
"""One window for all layers, or the window of each layer index; None keeps the model's own."""


@dataclass(frozen=True)
class Settings:
    """The arguments of ``register``."""

    window: WindowChoice = None
    impl: str = "auto"
    compute: str = "float"
    fp8_queries: bool = False

    def override(self, layer_idx: int) -> Window | None:
        """The window that replaces the model's own in a layer, if any."""
        return window_of_layer(self.window, layer_idx)


REGISTERED: dict[str, Settings] = {}
"""Implementations of ours by name."""


def check_window_choice(window: object) -> None:
    """A causal Window with a plain count of leading tokens, a function, or None."""
    if isinstance(window, Window):
        if not window.causal:
            raise bad_value("window", "a causal window", window)
        if isinstance(window.global_tokens, Tensor):
            raise bad_type("window.global_tokens", "an int, which fits every batch", "a tensor")
        if window.bounds is not None:
            raise bad_value("window.bounds", "None: rows of one batch are no others'", "a tensor")
    elif window is not None and not callable(window):
        raise bad_type("window", "a Window, a function of the layer index, or None", type(window).__name__)


def window_of_layer(choice: WindowChoice, layer_idx: int) -> Window | None:
    """The window that ``choice`` names for a layer."""
    if choice is None or isinstance(choice, Window):
        return choice
    window = choice(layer_idx)
    if window is not None and not isinstance(window, Window):
        raise bad_type("window(layer_idx)", "a Window or None", type(window).__name__)
    check_window_choice(window)
    return window
