"""Errors at the public door: they name the argument, what was wanted and what came. And checks that need no noun."""

from __future__ import annotations

import torch
from torch import Tensor


def bad_value(argument: str, wanted: str, got: object) -> ValueError:
    """A ValueError for an argument of the right type with a value that cannot work."""
    return ValueError(f"{argument}: wanted {wanted}, got {got}")


def bad_type(argument: str, wanted: str, got: object) -> TypeError:
    """A TypeError for an argument (or the dtype of a tensor) of the wrong kind."""
    return TypeError(f"{argument}: wanted {wanted}, got {got}")


def check_count(name: str, value: object, wanted: str, least: int = 0, most: int | None = None) -> int:
    """An int, which a bool is not, of ``least`` or more, and no more than ``most``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_type(name, wanted, type(value).__name__)
    if value < least or (most is not None and value > most):
        raise bad_value(name, wanted, value)
    return value


def check_is_tensor(name: str, x: object) -> Tensor:
    """A tensor whose elements lie in memory as its strides say: not sparse, quantised or nested, nor inside vmap."""
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        kind = "nested" if x.is_nested else "quantised" if x.is_quantized else str(x.layout).removeprefix("torch.")
        raise bad_type(name, "a strided tensor", f"a {kind} one")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise bad_type(name, "a tensor outside torch.func: swath has no rule for vmap or grad", "one inside")
    return x
