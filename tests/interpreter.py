"""Triton's interpreter made bearable: slow habits of its replaced by quicker ones that do the same.

What takes most of its time, working out types for every operation, has a file of its own: recording.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np


@contextmanager
def hastened() -> Iterator[None]:
    """Run Triton's interpreter with the replacements below."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    import recording

    patch_lang, launch, call = patching_once(interpreter)
    fits = remembering_sizes(interpreter._validate_np_data_size)
    with (
        patch.object(interpreter, "_patch_lang", patch_lang),
        patch.object(interpreter, "_patch_attr", recording.patch_attr),
        patch.object(interpreter.GridExecutor, "__call__", launch),
        patch.object(interpreter.InterpretedFunction, "__call__", call),
        patch.object(interpreter, "_get_np_dtype", remembering(interpreter._get_np_dtype)),
        patch.object(interpreter, "_validate_np_data_size", fits),
        patch.object(interpreter.TensorHandle, "__init__", making_handles(fits)),
        patch.object(interpreter, "_convert_float", moving_bits(interpreter._convert_float)),
        patch.object(core.tensor, "__init__", like_the_first(core.tensor.__init__, of_tensor)),
        patch.object(core.block_type, "__init__", like_the_first(core.block_type.__init__, of_block_type)),
        patch.object(TritonSemantic, "to_tensor", tensors_first(TritonSemantic.to_tensor, core.tensor)),
        patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow),
        patch.object(interpreter.InterpreterBuilder, "create_overflow_check", create_overflow_check, create=True),
    ):
        yield


def patching_once(interpreter: Any) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """``_patch_lang``, and the calls of kernels and of device functions, that patch ``triton.language`` once a launch.

    The interpreter patches it anew in every call of a device function, a third of its time.
    """
    from triton import language

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()
    ready: dict[Any, Callable[..., Any]] = {}

    @cache
    def languages_in(fn: Any) -> set[str]:
        known = (language, language.core)
        return {value.__name__ for value in fn.__globals__.values() if any(value is module for module in known)}

    def patch_once(fn: Any) -> Any:
        seen = languages_in(fn)
        if seen <= patched:
            return None
        patched.update(seen)
        scope = patch_lang(fn)
        scope.set_attr(language.tensor, "__index__", index_of)
        return scope

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        ready.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        fn = ready.get(self)
        if fn is None:
            patch_once(self.fn)
            fn = ready[self] = self.rewrite()
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    return patch_once, launch_anew, call


def index_of(scalar: Any) -> int:
    """``tensor.__index__``, whose ``int`` of an array is one of numpy's deprecation warnings each time."""
    return int(scalar.handle.data.item())


def remembering(numpy_dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``_get_np_dtype``, which lists all dtypes to find one, a twelfth of the time."""
    known: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = numpy_dtype_of(scalar)
        return known[scalar.name]

    return numpy_dtype


def remembering_sizes(fits: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """``_validate_np_data_size``, which is asked of all that is computed."""
    known: dict[tuple[int, str], bool] = {}

    def fits_in(array: Any, dtype: Any) -> bool:
        key = array.itemsize, dtype.name
        answer = known.get(key)
        if answer is None:
            answer = known[key] = fits(array, dtype)
        return answer

    return fits_in


def making_handles(fits: Callable[[Any, Any], bool]) -> Callable[..., None]:
    """``TensorHandle.__init__``, of a data class: in one call, not four."""

    def initialise(self: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if not fits(data, dtype):
            raise ValueError(f"numbers of {data.itemsize} bytes do not fit in {dtype}")

    return initialise


def moving_bits(convert_float: Callable[..., Any]) -> Callable[..., Any]:
    """``_convert_float``, which takes floats apart in a score of operations, by one where bf16 is half of a float32.

    Subnormals stay with the interpreter, which loses some of them. Its results lie in the order of their indices, as
    those here have to: a product of matrices that lie otherwise is rounded otherwise.
    """

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if rounding is None and (source.name, target.name) == ("bf16", "fp32"):
            bits = np.ascontiguousarray(data).view(np.uint16)
            if not np.any((bits & 0x7FFF) - np.uint16(1) < 0x7F):
                return bits.astype(np.uint32) << 16
        elif rounding is None and (source.name, target.name) == ("fp32", "bf16"):
            bits = np.ascontiguousarray(data).view(np.uint32)
            if not np.any((bits & 0x7FFFFFFF) - np.uint32(1) < 0x7FFFFF):
                return (bits >> 16).astype(np.uint16)
        return convert_float(data, source, target, rounding)

    return converted


Told = tuple[tuple[Any, ...], dict[str, Any]]
"""What decides about the attributes of an object, and the attributes that are given."""


def like_the_first(init: Callable[..., None], told: Callable[..., Told]) -> Callable[..., None]:
    """An ``__init__`` that works out attributes for the first object of its kind; others share all that is not given.

    Shapes are tuples of constants, each with a type that has a name: making them took a third of the time.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def initialise(self: Any, *args: Any) -> None:
        kind, given = told(*args)
        if kind not in known:
            init(self, *args)
            known[kind] = vars(self).copy()
        vars(self).update(known[kind], **given)

    return initialise


def of_tensor(handle: Any, of_type: Any) -> Told:
    given = {"handle": handle, "type": of_type, "dtype": of_type.scalar}
    return tuple(of_type.shape) if of_type.is_block() else (), given


def of_block_type(element: Any, shape: Any) -> Told:
    return (element.name, *(getattr(size, "value", size) for size in shape)), {"element_ty": element}


def tensors_first(to_tensor: Callable[..., Any], tensor: type[Any]) -> Callable[..., Any]:
    """``to_tensor``, which every assignment calls, mostly with a tensor."""

    def as_tensor(self: Any, value: Any, check_type: bool = True) -> Any:
        return value if type(value) is tensor else to_tensor(self, value, check_type)

    return as_tensor


def check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """``binary_op_sanitize_overflow_impl`` by one operation of the builder, not a dozen."""
    integer = lhs.type.scalar
    if integer.int_bitwidth < 64 and self.builder.options.sanitize_overflow:
        ends = integer.get_int_min_value(), integer.get_int_max_value()
        self.builder.create_overflow_check(lhs.handle, rhs.handle, operation.__name__, ends)


EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def create_overflow_check(_builder: Any, lhs: Any, rhs: Any, operation: str, ends: tuple[int, int]) -> None:
    """Of integers below 64 bits, in 64 bits; scalars, the most of them, in Python's."""
    x, y = lhs.data, rhs.data
    if x.size == y.size == 1:
        smallest = largest = getattr(operator, operation)(x.item(), y.item())
    else:
        exact = EXACT[operation](x, y, dtype=np.int64)
        smallest, largest = np.minimum.reduce(exact, axis=None), np.maximum.reduce(exact, axis=None)
    fits = ends[0] <= smallest and largest <= ends[1]
    assert fits, f"overflow in {operation}: beyond {ends}"
