"""Kernel launches as values: a plan says everything about the launches of a call but which tensors they get.

Triton works out at every call what an argument specialises: 50 us and more for entries as wide as ours. What it would
find is fixed by the signature of a call (see ops/signature.py), and so is everything else about its launches. A plan
is therefore made once for a signature, learns its compiled kernels in its first run, and from then on only puts the
addresses of tensors in their places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from triton import FutureKernel, knobs
from triton.runtime import driver

from swath.backends.triton.arguments import Operands
from swath.backends.triton.features import FUSED
from swath.backends.triton.ready import Addresses, ReadyLaunch, ready_launch


@dataclass(frozen=True, eq=False, slots=True)
class KernelCall:
    """One launch: kernel, grid, fixed arguments by name, and the compiler's options.

    A parameter of the kernel that ``args`` does not name takes the operand of its name, or of the name that ``sources``
    gives it, seen as the dtype in ``views``. ``args`` may hold names that the kernel does not take.
    """

    kernel: Any
    grid: int
    args: dict[str, Any]
    options: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)
    views: dict[str, torch.dtype] = field(default_factory=dict)

    def launch(self, operands: Operands) -> Any:
        """Launch it the ordinary way; the compiled kernel, or None from the interpreter."""
        return self.kernel[(self.grid,)](**self.arguments(operands), **self.options, **FUSED)

    def compile(self, operands: Operands) -> Any:
        """Compile it without running."""
        return self.kernel.warmup(**self.arguments(operands), **self.options, **FUSED, grid=(self.grid,))

    def arguments(self, operands: Operands) -> dict[str, Any]:
        """All arguments of the kernel by name."""
        return {p: self.args[p] if p in self.args else self._operand(p, operands) for p in self.kernel.arg_names}

    def boxed(self, _parameter: str) -> str | None:
        """The operand that a parameter takes as boxes of the tensor memory accelerator, if it does."""
        return None

    def offset(self, _parameter: str, _operands: Operands) -> int:
        """Bytes of a parameter's operand that the launch passes over at its beginning."""
        return 0

    def _operand(self, parameter: str, operands: Operands) -> Tensor | None:
        x = operands.get(self.sources.get(parameter, parameter))
        return x.view(self.views[parameter]) if x is not None and parameter in self.views else x

    def __str__(self) -> str:
        shape = ", ".join(f"{p} {self.args[p]}" for p in self.kernel.arg_names if p.isupper() and p != "F")
        return f"{self.kernel.fn.__name__} x {self.grid} ({shape}, warps {self.options['num_warps']})"


class Scratch:
    """Tensors that live for one run, in one allocation of the caching allocator."""

    ALIGNMENT = 256

    def __init__(self) -> None:
        self.nbytes = 0
        self._parts: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._zeroed: list[slice] = []

    def add(self, name: str, dtype: torch.dtype, *shape: int, zeroed: bool = False) -> None:
        """One more tensor, with zeros in it where asked for."""
        self._parts[name] = self.nbytes, dtype, shape
        end = self.nbytes + prod(shape) * dtype.itemsize
        if zeroed:
            self._zeroed.append(slice(self.nbytes, end))
        self.nbytes = -(-end // self.ALIGNMENT) * self.ALIGNMENT

    def allocate(self, device: torch.device | str) -> Tensor:
        """The bytes of all of them."""
        block = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for part in self._zeroed:
            block[part].zero_()
        return block

    def tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """All of them, allocated."""
        block = self.allocate(device)
        return {
            name: block[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (at, dtype, shape) in self._parts.items()
        }

    def offsets(self) -> dict[str, int]:
        """Where in the allocation each of them begins, in bytes."""
        return {name: at for name, (at, _, _) in self._parts.items()}


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The launches of a call, in order, for one device."""

    calls: list[KernelCall] = field(default_factory=list)
    scratch: Scratch = field(default_factory=Scratch)
    _ready: list[ReadyLaunch] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Whether it has run, and need not ask Triton again."""
        return bool(self._ready)

    def run(self, operands: Operands, device: torch.device) -> None:
        """Launch on ``device``, which is the current one."""
        if self._ready and self.launch({name: x.data_ptr() for name, x in operands.items() if x is not None}, device):
            return
        operands = {**operands, **self.scratch.tensors(device)}
        offsets = self.scratch.offsets()
        launches = [ready_launch(call, call.launch(operands), operands, offsets) for call in self.calls]
        ready = [launch for launch in launches if launch is not None]
        if len(ready) == len(self.calls):
            self._ready[:] = ready

    def launch(self, addresses: Addresses, device: torch.device) -> bool:
        """Launch on operands at ``addresses``, on the current device; False, and nothing is launched, where this plan
        has not run yet, or a profiler wants Triton to tell it of launches."""
        if not self._ready or _watched():
            return False
        block = self.scratch.allocate(device) if self.scratch.nbytes else None
        base = 0 if block is None else block.data_ptr()
        stream = driver.active.get_current_stream(device.index)
        for launch in self._ready:
            launch(addresses, base, stream)
        return True

    def load(self, operands: Operands) -> None:
        """Compile every kernel and its launcher, and load both, without running or allocating anything.

        Triton builds a launcher and loads the kernel when ``run`` is first asked for: a tenth of a second for each.
        What is left to threads of a compiler (see ``swath.ops.explain.in_threads``) is loaded by them.
        """
        operands = {**operands, **self.scratch.tensors("meta")}
        for call in self.calls:
            compiled = call.compile(operands)
            if compiled is not None and not isinstance(compiled, FutureKernel):  # None is from the interpreter
                attrgetter("run")(compiled)

    def __str__(self) -> str:
        return "; ".join(map(str, self.calls))


def _watched() -> bool:
    """Whether a profiler, say, asks Triton to be told of launches."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
