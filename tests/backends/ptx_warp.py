"""A warp of ``ptx_machine.py``: 32 lanes, their registers, and where each of them is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ptx_arithmetic as arithmetic
from ptx_arithmetic import UNSIGNED, as_type, bits_of
from ptx_program import Instruction

if TYPE_CHECKING:
    from ptx_machine import Machine

LANES = 32
TURN = 4000
"""Instructions of a warp after which the others have a turn."""
SHARED = {"shared", "shared::cta"}
"""The memory of a thread block, as Triton 3.6 and 3.8 write it."""
TOGETHER = ("bar", "barrier", "redux", "vote", "shfl", "stmatrix", "ldmatrix", "elect", "wgmma", "mbarrier", "brx")
"""What all lanes of a warp must reach."""
ALL = np.ones(LANES, bool)
"""Most instructions are run by all lanes, which this very array says: known at a glance."""
ALL.flags.writeable = False


@cache
def constant(operand: str, kind: str) -> np.ndarray:
    """A number that an instruction has, or a parameter's address, for all lanes [32]; not to be changed."""
    if found := re.search(r"_param_(\d+)$", operand):
        value = np.full(LANES, 0xD0000000 + int(found[1]), np.uint64)
    elif re.fullmatch(r"-?\d+\.\d+", operand):
        value = np.full(LANES, float(operand), np.float32)
    elif operand.startswith("0f"):
        value = np.full(LANES, int(operand[2:], 16), np.uint32).view(np.float32)
    elif kind == "pred":
        value = np.full(LANES, operand != "0")
    else:
        number = int(operand.rstrip("U"), 0) & (2 ** bits_of(kind) - 1)
        value = as_type(np.full(LANES, number, UNSIGNED[bits_of(kind)]), kind)
    value.flags.writeable = False
    return value


@cache
def names_in(operand: str) -> tuple[str, ...]:
    """The registers and numbers of ``{a, b}`` or of one operand."""
    return tuple(re.findall(r"[%\w.]+", operand))


@cache
def address_of(operand: str) -> tuple[str, int]:
    """The register of ``[register + offset]``, and the offset."""
    found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if found is None:
        raise NotImplementedError(operand)
    return found[1], int(found[2] or 0)


@cache
def bytes_of(rows: range, stride: int, width: int) -> np.ndarray:
    """Where rows [n, 32] of a matrix of 8 bits lie, from its start on and before the swizzle; eight are a block."""
    row, k = np.array(rows)[:, None], np.arange(32)
    return row // 8 * stride + row % 8 * width + k


@cache
def pairs_of(rows: range, stride: int) -> np.ndarray:
    """The same of rows [n, 16] of 16 bits."""
    row, k = np.array(rows)[:, None], np.arange(16)
    return row // 8 * stride + row % 8 * 128 + 2 * k


@cache
def pairs_by_column(rows: range, stride: int, leading: int) -> np.ndarray:
    """And where columns of them lie side by side, 64 a block."""
    row, k = np.array(rows)[:, None], np.arange(16)
    return row // 64 * leading + row % 64 * 2 + k // 8 * stride + k % 8 * 128


class Warp:
    """Its registers hold unsigned integers [32], or booleans; an instruction's type says how they are read.

    An array in a register is never changed, but replaced: registers and what was read of them may share it.
    """

    def __init__(self, machine: Machine, number: int, program: int, programs: int) -> None:
        self.machine, self.number = machine, number
        lane = np.arange(LANES, dtype=np.uint32)
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": lane + np.uint32(LANES * number), "%laneid": lane, "%ctaid.x": lane * 0 + np.uint32(program),
            "%nctaid.x": lane * 0 + np.uint32(programs), "global_smem": lane * 0 + np.uint32(1024),
        }  # fmt: skip
        self.active = ALL
        self.at: np.ndarray | None = None  # where each lane is, while they are not together
        self.held = np.zeros(LANES, bool)  # lanes that wait for the others of the warp
        self.count, self.waits_for = 0, ""
        self.special: dict[str, Callable[[Instruction, np.ndarray], None]] = {
            "ld": self._load, "st": self._store, "atom": self._atom, "elect": self._elect, "shfl": self._shuffle,
            "redux": self._reduce, "vote": self._vote, "stmatrix": self._stmatrix, "ldmatrix": self._ldmatrix,
            "wgmma": self._wgmma,
        }  # fmt: skip

    def run(self) -> Iterator[None]:
        """Until the kernel returns; yields where other warps must go on."""
        pc, program = 0, self.machine.program
        while True:
            if self.at is not None:
                pc = self._next(self.at)
            step = program.instructions[pc]
            if self.at is not None and step.kind in TOGETHER:
                self.held |= self.active
                continue
            self.count += 1
            if step.kind == "ret":
                return
            if step.kind == "bra":
                pc = self._branch(pc, self._taken(step), program.labels[step.operands[0]])
                continue
            if step.kind == "brx":
                target = program.tables[step.operands[1]][int(self.read(step.operands[0], "u32")[0])]
                pc = program.labels[target]
                continue
            if step.waits:
                yield from self._wait(step)
            elif not step.does_nothing:
                self._do(step)
            pc += 1
            if self.at is not None:
                self.at = np.where(self.active, pc, self.at)
            if self.count % TURN == 0:
                yield

    def _next(self, at: np.ndarray) -> int:
        """Of lanes that are apart, those that are furthest behind go on, but not those that wait for the others."""
        free = ~self.held
        if not free.any() and (at != at[0]).any():
            raise RuntimeError("lanes of a warp wait for one another")
        pc = int((at[free] if free.any() else at).min())
        self.active = at == pc
        if self.active.all():
            self.active, self.at, self.held = ALL, None, np.zeros(LANES, bool)
        return pc

    def _branch(self, pc: int, taken: np.ndarray, target: int) -> int:
        if self.at is None and (taken.all() or not taken.any()):
            return target if taken.all() else pc + 1
        at = np.full(LANES, pc) if self.at is None else self.at
        self.at = np.where(taken, target, np.where(self.active, pc + 1, at))
        return pc

    def _taken(self, step: Instruction) -> np.ndarray:
        """The lanes that run an instruction."""
        if step.guard is None:
            return self.active
        return self.active & (self.registers[step.guard] != step.negated)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand [32] as numbers of a type of PTX."""
        known = self.registers.get(operand)
        return constant(operand, kind) if known is None else as_type(known, kind)

    def write(self, register: str, value: np.ndarray, lanes: np.ndarray) -> None:
        """Numbers [32] into those lanes."""
        if register == "_":
            return
        if value.dtype.kind not in "bu":
            value = value.view(UNSIGNED[8 * value.dtype.itemsize])
        if lanes is not ALL and (old := self.registers.get(register)) is not None:
            value = np.where(lanes, value, old.astype(value.dtype))
        self.registers[register] = value

    def address(self, operand: str, kind: str = "u32") -> np.ndarray:
        """Of ``[register + offset]``, int64 [32]."""
        register, offset = address_of(operand)
        return self.read(register, kind).astype(np.int64) + offset

    def _wait(self, step: Instruction) -> Iterator[None]:
        if step.kind != "mbarrier":
            yield from self._named_barrier(step)
            return
        operands, lanes = step.operands, self._taken(step)
        found, parity = self._mbarrier(operands[1]), int(self.read(operands[2], "u32")[0])
        self.waits_for = f"mbarrier {operands[1]} {found}, parity {parity}"
        if found.phase & 1 == parity:
            yield
        self.write(operands[0], np.full(LANES, found.phase & 1 != parity), lanes)

    def _do(self, step: Instruction) -> None:
        lanes = self._taken(step)
        if done := self.special.get(step.kind):
            done(step, lanes)
        elif step.kind == "mbarrier" or step.name.startswith("cp.async.bulk.tensor"):
            for lane in np.nonzero(lanes)[0]:
                self._asynchronously(step, int(lane))
        else:
            arithmetic.do(self, step, lanes)

    def _named_barrier(self, step: Instruction) -> Iterator[None]:
        barrier = int(self.read(step.operands[0], "u32")[0])
        threads = self.machine.program.threads
        if len(step.operands) > 1:
            threads = int(self.read(step.operands[1], "u32")[0])
        times = self.machine.arrive(barrier, threads)
        self.waits_for = f"barrier {barrier} of {threads}"
        while step.parts[1] == "sync" and self.machine.named[barrier][1] == times:
            yield

    def _mbarrier(self, operand: str, lane: int = 0) -> Any:
        return self.machine.mbarriers[int(self.address(operand)[lane])]

    def _asynchronously(self, step: Instruction, lane: int) -> None:
        """What one lane asks of an mbarrier or of the memory accelerator."""
        from ptx_machine import Mbarrier

        operands = step.operands
        if step.parts[1] == "init":
            arrivals = int(self.read(operands[1], "u32")[lane])
            self.machine.mbarriers[int(self.address(operands[0])[lane])] = Mbarrier(arrivals, arrivals)
        elif step.parts[1] == "arrive":
            number = int(self.read(operands[2], "u32")[lane]) if len(operands) > 2 else 1
            expected = number if "expect_tx" in step.parts else 0
            self._mbarrier(operands[1], lane).count(1 if expected else number, -expected)
        elif step.parts[1] == "async":
            stores = "shared::cta" in step.parts[-2]
            box, other = (operands[0], operands[1]) if stores else (operands[1], operands[0])
            names = names_in(box)
            descriptor = int(self.read(names[0], "u64")[0])
            coordinates = [int(self.read(x, "s32")[lane]) for x in names[1:]]
            at = int(self.address(other)[lane])
            if stores:
                self.machine.store_box(descriptor, coordinates, at)
            else:
                self.machine.load_box(descriptor, coordinates, at, int(self.address(operands[2])[lane]))

    def _load(self, step: Instruction, lanes: np.ndarray) -> None:
        kind, registers = step.parts[-1], names_in(step.operands[0])
        if step.parts[1] == "param":
            number = self.machine.params[int(re.findall(r"\d+", step.operands[1])[-1])]
            self.write(registers[0], np.full(LANES, number & (2 ** bits_of(kind) - 1), UNSIGNED[bits_of(kind)]), lanes)
            return
        width = bits_of(kind) // 8
        raw = self._bytes(step.operands[1], step.parts, lanes, width * len(registers))
        for i, register in enumerate(registers):
            value = np.ascontiguousarray(raw[:, i * width : (i + 1) * width]).view(UNSIGNED[8 * width])[:, 0]
            self.write(register, value.astype(np.uint16) if width == 1 else value, lanes)

    def _bytes(self, operand: str, parts: tuple[str, ...], lanes: np.ndarray, size: int) -> np.ndarray:
        raw = np.zeros((LANES, size), np.uint8)
        if SHARED.intersection(parts):
            raw[lanes] = self.machine.shared[self.address(operand)[lanes, None] + np.arange(size)]
            return raw
        at = self.address(operand, "u64")
        for lane in np.nonzero(lanes)[0]:
            raw[lane] = self.machine.pointer(int(at[lane]), size)
        return raw

    def _store(self, step: Instruction, lanes: np.ndarray) -> None:
        kind = step.parts[-1]
        values = [self.read(x, kind) for x in names_in(step.operands[1])]
        raw = np.concatenate([np.ascontiguousarray(v).view(np.uint8).reshape(LANES, -1) for v in values], 1)
        if SHARED.intersection(step.parts):
            self.machine.shared[self.address(step.operands[0])[lanes, None] + np.arange(raw.shape[1])] = raw[lanes]
            return
        at = self.address(step.operands[0], "u64")
        for lane in np.nonzero(lanes)[0]:
            self.machine.pointer(int(at[lane]), raw.shape[1])[:] = raw[lane].tolist()

    def _atom(self, step: Instruction, lanes: np.ndarray) -> None:
        old, more = self.read(step.operands[0], "s32").copy(), self.read(step.operands[2], "s32")
        at = self.address(step.operands[1], "u64")
        for lane in np.nonzero(lanes)[0]:
            there = np.frombuffer(self.machine.pointer(int(at[lane]), 4), np.int32)
            old[lane] = there[0]
            there[0] += more[lane]
        self.write(step.operands[0], old, lanes)

    def _elect(self, step: Instruction, lanes: np.ndarray) -> None:
        self.write(step.operands[1], np.arange(LANES) == np.nonzero(lanes)[0][0], lanes)

    def _shuffle(self, step: Instruction, lanes: np.ndarray) -> None:
        x, by, lane = self.read(step.operands[1], "u32"), self.read(step.operands[2], "s32"), np.arange(LANES)
        self.write(step.operands[0], x[lane ^ by if "bfly" in step.parts else by % LANES], lanes)

    def _reduce(self, step: Instruction, lanes: np.ndarray) -> None:
        how: dict[str, Any] = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce}
        result = how[step.parts[2]](self.read(step.operands[1], "s32"))
        self.write(step.operands[0], np.full(LANES, result, np.int32), lanes)

    def _vote(self, step: Instruction, lanes: np.ndarray) -> None:
        self.write(step.operands[0], np.full(LANES, self.registers[step.operands[1]].any()), lanes)

    def _matrices(self, operand: str, count: int) -> list[np.ndarray]:
        """Where matrices of 8 rows of 16 bytes lie: their bytes' addresses [8, 16]."""
        at = self.address(operand)
        return [at[8 * i : 8 * i + 8, None] + np.arange(16) for i in range(count)]

    def _stmatrix(self, step: Instruction, _lanes: np.ndarray) -> None:
        registers = names_in(step.operands[1])
        for register, at in zip(registers, self._matrices(step.operands[0], len(registers)), strict=True):
            self.machine.shared[at] = np.ascontiguousarray(self.read(register, "u32")).view(np.uint8).reshape(8, 16)

    def _ldmatrix(self, step: Instruction, lanes: np.ndarray) -> None:
        registers = names_in(step.operands[0])
        for register, at in zip(registers, self._matrices(step.operands[1], len(registers)), strict=True):
            rows = np.ascontiguousarray(self.machine.shared[at])
            self.write(register, rows.view(np.uint32).reshape(LANES), lanes)

    def _wgmma(self, step: Instruction, lanes: np.ndarray) -> None:
        """The warp's 16 of the 64 rows of d = a @ b (+ d), of a and b of 16 or 8 bits."""
        d, a, b, adds = step.operands[:4]
        shape = re.search(r"m64n(\d+)k(?:16|32)", step.name)
        if shape is None:
            raise NotImplementedError(step.name)
        dtype, sums = step.parts[-1], step.parts[-3]
        by_column = dtype in ("bf16", "f16") and step.operands[-1] == "1"
        if a.startswith("{"):
            left = arithmetic.left_fragment([self.read(x, "u32") for x in names_in(a)], dtype)
        else:
            rows = range(self.number % 4 * 16, self.number % 4 * 16 + 16)
            left = self._matrix(int(self.read(a, "u64")[0]), rows, dtype, by_column=False)
        right = self._matrix(int(self.read(b, "u64")[0]), range(int(shape[1])), dtype, by_column)
        values, registers = arithmetic.fragments(left @ right.T), names_in(d)
        if self.read(adds, "pred")[0]:
            values = values + np.stack([self.read(register, sums) for register in registers])
        values = values.astype(np.int32 if sums == "s32" else np.float32).view(np.uint32)
        for register, value in zip(registers, values, strict=True):
            self.write(register, value, lanes)

    def _matrix(self, descriptor: int, rows: range, dtype: str, by_column: bool) -> np.ndarray:
        """Rows [n, 32 bytes] of a matrix in shared memory whose rows, or ``by_column`` columns, are swizzled in 128
        bytes, or rows of 8 bits in 64."""
        from ptx_machine import swizzle

        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        width = {1: 128, 2: 64}.get(descriptor >> 62)
        if width is None or (width == 64 and dtype not in ("s8", "e4m3")):
            raise NotImplementedError("another swizzle than that of 128 bytes, or of 64 for 8 bits")
        if dtype in ("s8", "e4m3"):
            at = swizzle(start + bytes_of(rows, stride, width), width)
            return arithmetic.as_floats(self.machine.shared[at], dtype)
        at = swizzle(start + (pairs_by_column(rows, stride, leading) if by_column else pairs_of(rows, stride)))
        return arithmetic.as_floats(self.machine.shared.view(np.uint16)[at >> 1], dtype)
