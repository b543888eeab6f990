"""What replaces parts of Triton's interpreter computes the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton")

from triton.language import core, math
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as of_triton

import interpreter
import recording

BUILDER = of_triton.interpreter_builder
OLD = TritonSemantic(BUILDER)
RANDOM = np.random.default_rng(0)
TYPES = {np.int32: core.int32, np.int64: core.int64, np.float32: core.float32, np.bool_: core.int1}


def block(*shape: int, of: Any = np.float32) -> Any:
    """A tensor of random numbers."""
    numbers = (RANDOM.standard_normal(shape) * 50).astype(of)
    return core.tensor(of_triton.TensorHandle(numbers, TYPES[of]), core.block_type(TYPES[of], list(shape)))


def scalar(value: Any, of: Any = np.int32) -> Any:
    return core.tensor(of_triton.TensorHandle(np.array([value], dtype=of), TYPES[of]), TYPES[of])


def ints(*shape: int) -> Any:
    return block(*shape, of=np.int32)


def bools(numbers: Any) -> Any:
    return core.tensor(of_triton.TensorHandle(numbers, core.int1), core.block_type(core.int1, [len(numbers)]))


def same(got: Any, want: Any) -> bool:
    """In type, attributes and bits."""
    x, y = got.handle, want.handle
    types = (got.type, got.dtype, x.dtype, x.data.dtype, x.data.shape)
    sizes = [size.value for size in got.shape] == [size.value for size in want.shape]
    return types == (want.type, want.dtype, y.dtype, y.data.dtype, y.data.shape) and sizes and (
        x.data.tobytes() == y.data.tobytes()
    )  # fmt: skip


Draw = Callable[[], tuple[Any, ...]]
CALLS: dict[str, tuple[Any, Draw]] = {
    "blocks": (core.add, lambda: (block(4, 8), block(4, 8))),
    "a row and a column": (core.mul, lambda: (ints(4, 1), ints(1, 8))),
    "a block and a scalar": (core.sub, lambda: (ints(8), scalar(RANDOM.integers(99)))),
    "scalars": (core.tensor.__floordiv__, lambda: (scalar(-7), scalar(RANDOM.integers(1, 5)))),
    "a type that is promoted": (core.add, lambda: (ints(8), block(8, of=np.int64))),
    "a number": (core.tensor.__radd__, lambda: (ints(8), 3)),
    "a constexpr": (core.tensor.__lt__, lambda: (ints(8), core.constexpr(5))),
    "bits": (core.tensor.__rshift__, lambda: (ints(8), 3)),
    "a choice": (core.where, lambda: (block(8, of=np.bool_), block(8), 0.5)),
    "the larger": (core.maximum, lambda: (block(8), block(8))),
    "the larger, or NaN": (core.maximum, lambda: (block(8), block(8), core.PropagateNan.ALL)),
    "a cast": (core.cast, lambda: (block(8), core.float16)),
    "a cast to bf16": (core.cast, lambda: (block(8), core.bfloat16)),
    "a cast to the same": (core.cast, lambda: (block(8), core.float32)),
    "a new axis": (core.tensor.__getitem__, lambda: (block(8), (slice(None), None))),
    "a function": (math.exp2, lambda: (block(8),)),
    "a product": (core.dot, lambda: (block(16, 16), block(16, 16))),
    "a range": (core.arange, lambda: (0, 16)),
    "constants": (core.full, lambda: ([4, 4], 2.5, core.float32)),
    "a shape": (core.reshape, lambda: (block(4, 8), (8, 4))),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_recording_computes_what_the_builtin_does(name: str) -> None:
    """The first call, which is recorded, and repeated ones with other values."""
    builtin, draw = CALLS[name]
    quick = recording.recorded(builtin, BUILDER)
    for _ in range(4):
        args = draw()
        assert same(quick(*args), builtin(*args, _semantic=OLD))


def recordings_of(quick: Any) -> dict[Any, Any]:
    cells = dict(zip(quick.__code__.co_freevars, quick.__closure__, strict=True))
    made: dict[Any, Any] = cells["recordings"].cell_contents
    return made


def test_calls_of_a_kind_share_a_recording() -> None:
    quick = recording.recorded.__wrapped__(core.add, BUILDER)
    for _ in range(3):
        quick(ints(8), ints(8))
    assert [*map(callable, recordings_of(quick).values())] == [True]


@pytest.mark.parametrize(
    "values", [(1, True, 1.0), (0.0, -0.0), (5, 6), (None, 0, False), ("int32", core.int32), (core.float32, "fp32")]
)
def test_constants_that_differ_are_of_another_kind(values: tuple[Any, ...]) -> None:
    assert len({recording.kind_of(value) for value in values}) == len(values)


def test_nan_is_of_its_own_kind() -> None:
    assert recording.kind_of(float("nan")) == recording.kind_of(float("nan"))


def test_tensors_in_lists_are_no_constants() -> None:
    with pytest.raises(recording.NotRecordableError):
        recording.kind_of((ints(8),))


def test_memory_is_read_and_written_in_every_call() -> None:
    """Under a mask, in a block, and by a scalar whose mask is false."""
    load, store = (recording.recorded(builtin, BUILDER) for builtin in (core.load, core.store))
    memory = np.arange(8, dtype=np.int32)
    pointer = core.pointer_type(core.int32)
    at = memory.ctypes.data + 4 * np.arange(8, dtype=np.uint64)
    block_at = core.tensor(of_triton.TensorHandle(at, pointer), core.block_type(pointer, [8]))
    scalar_at = core.tensor(of_triton.TensorHandle(at[3:4], pointer), pointer)
    for turn in range(3):
        before = memory.copy()
        live = np.arange(8) % 3 != turn
        got = load(block_at, mask=bools(live), other=-5), load(scalar_at, mask=scalar(turn != 1, np.bool_), other=-5)
        assert (got[0].handle.data == np.where(live, memory, -5)).all()
        assert got[1].handle.data[0] == (memory[3] if turn != 1 else -5)
        written = ints(8)
        store(block_at, written, mask=bools(~live))
        assert (memory == np.where(live, before, written.handle.data)).all()
        memory[:] = range(8)
    store(scalar_at, scalar(70))
    assert memory[3] == 70


def test_what_is_refused_is_refused_each_time() -> None:
    quick = recording.recorded(core.add, BUILDER)
    for _ in range(2):
        with pytest.raises(ValueError, match="incompatible dimensions"):
            quick(ints(8), ints(4))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_overflow_is_found(operation: str) -> None:
    """In scalars and in one number of a block; the largest and the smallest number are none."""
    largest, smallest = 2**31 - 1, -(2**31)
    first, second = {"add": (largest, 1), "sub": (smallest, 1), "mul": (smallest, -1)}[operation]
    neutral = {"add": 0, "sub": 0, "mul": 1}[operation]
    for size in (1, 8):
        numbers = np.zeros(size, dtype=np.int32)
        numbers[-1] = first
        handles = [of_triton.TensorHandle(x, core.int32) for x in (numbers, np.full(size, second, dtype=np.int32))]
        harmless = of_triton.TensorHandle(np.full(size, neutral, dtype=np.int32), core.int32)
        interpreter.create_overflow_check(BUILDER, handles[0], harmless, operation, (smallest, largest))
        with pytest.raises(AssertionError, match=f"overflow in {operation}"):
            interpreter.create_overflow_check(BUILDER, *handles, operation, (smallest, largest))


@pytest.mark.parametrize("source", ["bf16", "fp32"])
def test_bits_move_as_the_interpreter_converts(source: str) -> None:
    """All numbers of bf16, and float32 with them as upper halves: infinities, NaN and subnormals too."""
    old = of_triton._convert_float
    new = interpreter.moving_bits(old)
    upper = np.arange(1 << 16, dtype=np.uint32)
    types = {"bf16": core.bfloat16, "fp32": core.float32}
    target = "fp32" if source == "bf16" else "bf16"
    kept = [upper, upper[(upper & 0x7F80) != 0]]
    for numbers in kept:
        low = (numbers * 40503) & 0xFFFF
        data = numbers.astype(np.uint16) if source == "bf16" else (numbers << 16 | low).view(np.float32)
        for laid in (data, data.reshape(8, -1).T):
            got, want = (convert(laid, types[source], types[target], None) for convert in (new, old))
            assert (got.dtype, got.strides) == (want.dtype, want.strides)
            assert (got == want).all()
