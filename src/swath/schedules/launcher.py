"""One kernel launch as a value: run it, compile it, put it in words.

Triton works out at every call what an argument specialises, and checks every global a kernel mentions: 50 us and more
for entries as wide as ours. A ``KernelCall`` remembers the compiled kernel under what specialisation depends on (dtypes
and alignments of tensors, values of strides and constexprs) and launches it directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

LARGEST_INT32 = 2**31 - 1

_compiled: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One launch: kernel, grid, arguments by name, and the compiler's options."""

    kernel: Any
    grid: int
    args: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch it on the current device."""
        if not isinstance(self.kernel, JITFunction):  # the interpreter
            self.kernel[(self.grid,)](**self.args, **self.options)
            return
        values = [self.args[name] for name in self.kernel.arg_names]
        key = (self.kernel, torch.cuda.current_device(), *self.options.values(), *self._specialisation())
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = self.kernel[(self.grid,)](**self.args, **self.options)
        else:
            compiled[self.grid, 1, 1](*values)

    def compile(self) -> Any:
        """Compile it without running."""
        return self.kernel.warmup(**self.args, **self.options, grid=(self.grid,))

    def __str__(self) -> str:
        shape = ", ".join(f"{k} {v}" for k, v in (self.args | self.options).items() if k.isupper() and k != "F")
        return f"{self.kernel.fn.__name__} x {self.grid} ({shape}, warps {self.options['num_warps']})"

    def _specialisation(self) -> Iterator[Any]:
        """What the choice of a compiled kernel depends on. Run-time numbers count by their width only."""
        run_time = self.kernel.do_not_specialize
        for name, value in self.args.items():
            if isinstance(value, Tensor):
                yield value.dtype
                yield value.data_ptr() % 16 == 0
            elif name in run_time or isinstance(value, float):
                yield value < LARGEST_INT32
            else:
                yield value
