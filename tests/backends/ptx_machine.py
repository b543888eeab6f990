"""A Hopper GPU that runs one program after the other, by its PTX: the kernel in Gluon without a GPU.

A warp is a coroutine of 32 lanes (``ptx_warp.py``), and all warps of a program share this memory. What the hardware
does in the background is done at once: boxes of the memory accelerator, and products of warpgroups, each warp its 16
rows. So wrong indices, masks and counts of bytes or arrivals show, and a deadlock is an error. Races do not show, nor
what ptxas makes of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx_program import Program
from ptx_warp import Warp

SHARED_BASE, SHARED_BYTES = 1024, 232_448
DESCRIPTORS = 0xD0000000
"""What the addresses of descriptors begin with, which the kernel has by value: these plus the parameter's number."""
PATIENCE = 50
"""Turns of all warps without progress after which they wait for one another."""


@dataclass
class Mbarrier:
    """Arrivals and bytes that are still missing in this phase."""

    arrivals: int
    missing: int
    phase: int = 0
    missing_bytes: int = 0

    def count(self, arrivals: int = 0, nbytes: int = 0) -> None:
        """Of ``arrivals``, and of bytes that arrive (or are expected, below 0)."""
        self.missing -= arrivals
        self.missing_bytes -= nbytes
        if self.missing < 0:
            raise RuntimeError("more arrivals at an mbarrier than it counts")
        if self.missing == self.missing_bytes == 0:
            self.phase += 1
            self.missing = self.arrivals


@dataclass
class Machine:
    """A launch: its parameters as 64-bit numbers, descriptors by the number of their parameter, and tensors."""

    program: Program
    params: Sequence[int]
    descriptors: dict[int, Any]
    tensors: Sequence[torch.Tensor]
    shared: np.ndarray = field(init=False)
    mbarriers: dict[int, Mbarrier] = field(init=False)
    named: dict[int, tuple[int, int]] = field(init=False)  # threads that have arrived, and how often all have

    def run(self, grid: int) -> None:
        """All programs, one after the other."""
        for index in range(grid):
            self.shared = np.full(SHARED_BASE + SHARED_BYTES, 0xA5, np.uint8)
            self.mbarriers, self.named = {}, {}
            warps = [Warp(self, number, index, grid) for number in range(self.program.threads // 32)]
            with np.errstate(all="ignore"):
                self._until_all_end({warp: warp.run() for warp in warps})

    def _until_all_end(self, turns: dict[Warp, Any]) -> None:
        still = 0
        while turns:
            before = sum(warp.count for warp in turns)
            for warp in [warp for warp, turn in turns.items() if next(turn, "end") == "end"]:
                before -= warp.count + 1
                del turns[warp]
            still = 0 if sum(warp.count for warp in turns) > before else still + 1
            if still > PATIENCE:
                raise RuntimeError("deadlock: " + "; ".join(f"warp {w.number} waits for {w.waits_for}" for w in turns))

    def arrive(self, barrier: int, threads: int) -> int:
        """Of a warp at a named barrier of that many threads: how often all had arrived before."""
        arrived, times = self.named.get(barrier, (0, 0))
        arrived += 32
        if arrived > threads:
            raise RuntimeError(f"{arrived} threads at barrier {barrier} of {threads}")
        self.named[barrier] = (0, times + 1) if arrived == threads else (arrived, times)
        return times

    def pointer(self, address: int, nbytes: int) -> Any:
        """The bytes at a global address, which must be a tensor's."""
        for x in self.tensors:
            first = x.untyped_storage().data_ptr()
            if first <= address and address + nbytes <= first + x.untyped_storage().nbytes():
                return (ctypes.c_uint8 * nbytes).from_address(address)
        raise RuntimeError(f"{nbytes} bytes at {address:#x} are no tensor's")

    def load_box(self, descriptor: int, coordinates: Sequence[int], to: int, mbarrier: int) -> None:
        """Copy a box into shared memory; 0 where it lies outside the tensor."""
        box, inside, there = self._box(descriptor, coordinates)
        values = self._values(descriptor)
        rows = np.zeros(box, values.dtype)
        rows[inside] = values[there]
        raw = rows.reshape(-1, box[-1]).view(np.uint8)
        self.shared[swizzled(to, *raw.shape)] = raw
        self.mbarriers[mbarrier].count(nbytes=raw.size)

    def store_box(self, descriptor: int, coordinates: Sequence[int], at: int) -> None:
        """Copy what lies inside the tensor of a box in shared memory."""
        box, inside, there = self._box(descriptor, coordinates)
        values = self._values(descriptor)
        rows = np.ascontiguousarray(self.shared[swizzled(at, int(np.prod(box[:-1])), box[-1] * values.itemsize)])
        values[there] = rows.view(values.dtype).reshape(box)[inside]

    def _values(self, descriptor: int) -> np.ndarray:
        x = self.descriptors[descriptor - DESCRIPTORS].base
        return x.view(torch.uint8).numpy() if x.itemsize == 1 else x.view(torch.int16).numpy().view(np.uint16)

    def _box(self, descriptor: int, coordinates: Sequence[int]) -> tuple[Any, tuple[slice, ...], tuple[slice, ...]]:
        """The shape of a box, and which part of it lies in the tensor, and where; the last coordinate comes first."""
        desc = self.descriptors[descriptor - DESCRIPTORS]
        inside, there = [], []
        for first, length, size in zip(coordinates[::-1], desc.block_shape, desc.base.shape, strict=True):
            low, high = max(first, 0), min(first + length, size)
            high = max(high, low)
            inside.append(slice(low - first, high - first))
            there.append(slice(low, high))
        return list(desc.block_shape), tuple(inside), tuple(there)


def swizzled(address: int, rows: int, width: int) -> np.ndarray:
    """Where the bytes [rows, width] of rows from ``address`` on lie in shared memory."""
    return swizzle(address + np.arange(rows * width).reshape(rows, width), width)


def swizzle(address: np.ndarray, width: int = 128) -> np.ndarray:
    """16-byte chunks of a row change places with the number of its 128 bytes: among eight, or in rows of 64 four."""
    return address ^ ((address >> 7 & width // 16 - 1) << 4)
