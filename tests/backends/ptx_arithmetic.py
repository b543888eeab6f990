"""What PTX computes in registers, for the warps of ``ptx_machine.py``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ptx_program import Instruction

if TYPE_CHECKING:
    from ptx_warp import Warp

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@cache
def bits_of(kind: str) -> int:
    """Of a type as "s32"."""
    return int(re.findall(r"\d+", kind)[0])


@cache
def dtypes_of(kind: str) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Of its bits in a register, and of its numbers."""
    bits = bits_of(kind)
    numbers = {"f": {16: np.float16, 32: np.float32}, "s": SIGNED}.get(kind[0], UNSIGNED)
    return np.dtype(UNSIGNED[bits]), np.dtype(numbers[bits])


def as_type(x: np.ndarray, kind: str) -> np.ndarray:
    """The bits of registers as numbers of a type; not to be changed, because they may be the registers' own."""
    if x.dtype.kind == "b":
        return x
    unsigned, numbers = dtypes_of(kind)
    if x.dtype != unsigned:
        x = x.astype(unsigned)
    return x if numbers == unsigned else x.view(numbers)


E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
"""The values of its bytes."""


def as_floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of 16 or 8 bits as float64."""
    if dtype == "s8":
        return raw.view(np.int8).astype(np.float64)
    if dtype == "e4m3":
        return E4M3[raw]
    if dtype == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return raw.view(np.float16).astype(np.float64)


def fragments(product: np.ndarray) -> np.ndarray:
    """Rows [16, N] of an accumulator as its registers [N / 2, 32].

    Lane ``l`` has in register ``i`` row ``l // 4 + i // 2 % 2 * 8`` and column ``i // 4 * 8 + l % 4 * 2 + i % 2``.
    """
    halves = product.reshape(2, 8, -1, 4, 2)  # i // 2 % 2, l // 4, i // 4, l % 4, i % 2
    return halves.transpose(2, 0, 4, 1, 3).reshape(-1, 32)


def left_fragment(registers: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """The left operand [16, 16] of a product from four registers, which have two columns each; of 8 bits [16, 32].

    Register ``i`` has rows ``l // 4 + i % 2 * 8``, and from column ``i // 2 * 8 + l % 4 * 2`` on; of 8 bits twice that.
    """
    bits = UNSIGNED[8 if dtype == "e4m3" else 16]
    parts = as_floats(np.stack(registers).view(bits), dtype).reshape(2, 2, 8, 4, -1)  # i // 2, i % 2, l // 4, l % 4
    return parts.transpose(1, 2, 0, 3, 4).reshape(16, -1)


def do(warp: Warp, step: Instruction, lanes: np.ndarray) -> None:
    """An instruction whose result goes to its first operand."""
    kind = step.kind
    if kind in ("mov", "cvta"):
        _move(warp, step, lanes)
        return
    if kind == "cvt":
        result = _converted(warp, step)
    elif kind == "setp":
        result = _compared(warp, step)
    elif kind == "selp":
        yes, no = (warp.read(x, step.parts[-1]) for x in step.operands[1:3])
        result = np.where(warp.registers[step.operands[3]], yes, no)
    elif step.parts[-1] == "f32":
        inputs = [warp.read(x, "f32") for x in step.operands[1:]]
        if kind not in ROUNDED_ONCE:
            inputs = [x.astype(np.float64) for x in inputs]
        result = FLOATS[kind](*inputs).astype(np.float32, copy=False)
    else:
        result = _integer(warp, step)
    warp.write(step.operands[0], result, lanes)


FLOATS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "fma": lambda a, b, c: a * b + c, "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh,
    "max": lambda *x: np.fmax.reduce(x), "min": lambda *x: np.fmin.reduce(x),
}  # fmt: skip
"""In float64, then rounded once. The maximum of a number and NaN is the number."""
ROUNDED_ONCE = ("add", "sub", "mul", "div", "neg", "abs", "max", "min")
"""Those of which numpy gives the same in float32."""

INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "neg": np.negative, "max": np.maximum, "min": np.minimum,
}  # fmt: skip

COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _integer(warp: Warp, step: Instruction) -> np.ndarray:
    kind, form, type_ = step.parts[0], step.parts[1], step.parts[-1]
    if type_ == "pred":
        return INTEGERS[kind](*(warp.registers[x] for x in step.operands[1:]))
    if kind in ("mul", "mad"):
        return _product(warp, step, form, type_)
    inputs = [warp.read(x, type_) for x in step.operands[1:]]
    if kind == "prmt":
        return _permuted(*inputs)
    if kind in ("shl", "shr"):
        return _shifted(inputs[0], warp.read(step.operands[2], "u32"), kind == "shl")
    if kind == "bfe":
        return inputs[0] >> inputs[1] & (UNSIGNED[32](1) << inputs[2]) - UNSIGNED[32](1)
    if kind in ("div", "rem"):
        x, y = (v.astype(np.int64) for v in inputs)
        quotient = np.abs(x) // np.maximum(np.abs(y), 1) * np.sign(x) * np.sign(y)
        return (quotient if kind == "div" else x - quotient * y).astype(inputs[0].dtype)
    result = INTEGERS[kind](*inputs)
    return np.maximum(result, 0).astype(result.dtype) if form == "relu" else result


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of a and b, which the lowest nibbles of the selector number; none as copies of a sign."""
    wide = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(32, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        if (nibble > 7).any():
            raise NotImplementedError("prmt of signs")
        byte = wide >> (nibble.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _product(warp: Warp, step: Instruction, form: str, type_: str) -> np.ndarray:
    bits = bits_of(type_)
    wide = {"s": SIGNED, "u": UNSIGNED}[type_[0]].get(2 * bits)
    a, b = (warp.read(x, type_) for x in step.operands[1:3])
    if form == "hi":
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    result = a.astype(wide) * b.astype(wide) if form == "wide" else a * b
    if step.parts[0] == "mad":
        result = result + warp.read(step.operands[3], f"{type_[0]}{8 * result.dtype.itemsize}")
    return result


def _shifted(x: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    """PTX shifts by 32 and more push all bits out."""
    bits = 8 * x.dtype.itemsize
    near = np.minimum(by, bits - 1).astype(x.dtype)
    if left:
        return np.where(by < bits, x << near, 0).astype(x.dtype)
    return np.where((by < bits) | (x.dtype.kind == "i"), x >> near, 0).astype(x.dtype)


def _compared(warp: Warp, step: Instruction) -> np.ndarray:
    name, type_ = step.parts[1], step.parts[-1]
    a, b = (warp.read(x, type_) for x in step.operands[1:3])
    nan = np.isnan(a) | np.isnan(b) if type_ == "f32" else np.zeros(32, bool)
    if name in ("num", "nan"):
        result = nan if name == "nan" else ~nan
    else:
        result = COMPARISONS[name[:2]](a, b)
        result = result | nan if len(name) == 3 else result & ~nan
    if len(step.parts) == 4 and step.parts[2] in ("and", "or"):
        result = INTEGERS[step.parts[2]](result, warp.registers[step.operands[3]])
    return result


def _converted(warp: Warp, step: Instruction) -> np.ndarray:
    to, source = step.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = (_in_16_bits(warp.read(x, "f32"), to) for x in step.operands[1:3])
        return high.astype(np.uint32) << np.uint32(16) | low
    if to == "e4m3x2":
        high, low = (_in_e4m3(warp.read(x, "f32")) for x in step.operands[1:3])
        return high.astype(np.uint16) << np.uint16(8) | low
    x = warp.read(step.operands[1], source)
    if to == "f32":
        return (as_floats(x, source) if source == "bf16" else x).astype(np.float32)
    return x.astype({"s": SIGNED, "u": UNSIGNED, "b": UNSIGNED}[to[0]][bits_of(to)])


def _in_e4m3(x: np.ndarray) -> np.ndarray:
    """Bytes, half to even, saturated at 448."""
    return torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _in_16_bits(x: np.ndarray, to: str) -> np.ndarray:
    if to == "f16x2":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), 0x7FFF, rounded >> np.uint32(16)).astype(np.uint16)


def _move(warp: Warp, step: Instruction, lanes: np.ndarray) -> None:
    to, source = step.operands[:2]
    type_ = step.parts[-1]
    if to.startswith("{"):  # halves, the lower one first
        bits = bits_of(type_) // 2
        x = warp.read(source, type_)
        for i, register in enumerate(re.findall(r"[%\w.]+", to)):
            warp.write(register, (x >> UNSIGNED[2 * bits](i * bits)).astype(UNSIGNED[bits]), lanes)
    elif source.startswith("{"):
        low, high = (warp.read(x, f"b{bits_of(type_) // 2}") for x in re.findall(r"[%\w.]+", source))
        wide = UNSIGNED[bits_of(type_)]
        warp.write(to, low.astype(wide) | high.astype(wide) << wide(bits_of(type_) // 2), lanes)
    else:
        warp.write(to, warp.read(source, type_), lanes)
