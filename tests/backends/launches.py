"""Launches without a GPU: plans that compile nothing and launch on a recorder, and what each launch must pass on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import plan_for
from swath import target
from swath.problem import Problem
from swath.target import Target


class Recorder:
    """Stands for a compiled kernel and its launcher: keeps what it was launched with."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.stream = 7
        self.asked: list[Any] = []

    def run(self, *args: Any) -> None:
        self.launches.append(args)

    def stream_of(self, index: Any) -> int:
        """The current stream of the device with an index."""
        self.asked.append(index)
        return self.stream

    def taken(self) -> list[tuple[Any, ...]]:
        """The grid and the kernel's arguments of each launch since this was last asked."""
        found = [(grid, *map(plain, values)) for grid, _, _, _, _, _, _, _, _, *values in self.launches]
        self.launches.clear()
        return found


def recording(monkeypatch: pytest.MonkeyPatch, recorder: Recorder | None = None) -> Recorder:
    """Plans compile nothing and launch on a Recorder, a new one or this, with all scratch in one place."""
    pytest.importorskip("triton")
    if target.interpreting():
        pytest.skip("the interpreter has no compiled kernels to remember")
    from swath.backends.triton import runtime

    recorder = recorder or Recorder()
    block = torch.empty(1 << 30, dtype=torch.uint8)
    monkeypatch.setattr(runtime.KernelCall, "launch", lambda self, operands: recorder)
    monkeypatch.setattr(runtime.Scratch, "allocate", lambda self, device: block[: self.nbytes] if self.nbytes else None)
    active = SimpleNamespace(get_current_stream=recorder.stream_of)
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=active))
    return recorder


def plain(x: Any) -> Any:
    """What decides a launch argument: a tensor's address, and what a box is encoded from."""
    if isinstance(x, Tensor):
        return x.data_ptr()
    if hasattr(x, "block_shape"):
        return x.base.data_ptr(), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.layout
    return x


def fresh_arguments(problem: Problem, arch: str, tiles: str) -> list[tuple[Any, ...]]:
    """What each launch of a call must pass on, built anew."""
    from swath.backends.triton.arguments import operands_of

    plan = plan_for(tiles, problem, Target(arch, 132))
    operands = {**operands_of(problem), **plan.scratch.tensors(torch.device("cpu"))}
    rows = []
    for call in plan.calls:
        values = call.arguments(operands).values()
        rows.append((call.grid, *map(plain, values)))
    return rows
