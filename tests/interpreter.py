"""Triton's interpreter made bearable: three of its habits replaced by quicker ones that do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch


@contextmanager
def hastened() -> Iterator[None]:
    """Run Triton's interpreter with the replacements below."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch_lang, launch = patching_once(interpreter)
    with (
        patch.object(interpreter, "_patch_lang", patch_lang),
        patch.object(interpreter.GridExecutor, "__call__", launch),
        patch.object(interpreter, "_get_np_dtype", remembering(interpreter._get_np_dtype)),
        patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow),
    ):
        yield


def patching_once(interpreter: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``_patch_lang`` and ``GridExecutor.__call__`` that patch ``triton.language`` once a launch.

    The interpreter patches it anew in every call of a device function, a third of its time.
    """
    from triton import language

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @cache
    def languages_in(fn: Any) -> set[str]:
        known = (language, language.core)
        return {value.__name__ for value in fn.__globals__.values() if any(value is module for module in known)}

    def patch_once(fn: Any) -> Any:
        seen = languages_in(fn)
        if seen <= patched:
            return None
        patched.update(seen)
        return patch_lang(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    return patch_once, launch_anew


def remembering(numpy_dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``_get_np_dtype``, which lists all dtypes to find one, a twelfth of the time."""
    known: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = numpy_dtype_of(scalar)
        return known[scalar.name]

    return numpy_dtype


def check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """``binary_op_sanitize_overflow_impl`` by two operations of numpy, not a dozen of the interpreter's own."""
    import numpy as np

    exact_operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    integer = lhs.type.scalar
    if integer.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
        exact = exact_operations[operation.__name__](*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        fits = integer.get_int_min_value() <= exact.min() and exact.max() <= integer.get_int_max_value()
        assert fits, f"int{integer.int_bitwidth} overflow in {operation.__name__}"
