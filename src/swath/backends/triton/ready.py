"""Launches of compiled kernels past Triton's lookups, and calls that are launched from their arguments alone.

What Triton specialises a kernel for (dtypes, which numbers are 1 or multiples of 16, which addresses are multiples of
16) is fixed by the signature of a call (see ops/signature.py), and so is which argument a kernel takes as what. All of
it is found in the first run of a signature; later ones only read addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from swath.backends.triton.arguments import Operands
from swath.cache import PagedKV
from swath.pages import PageTable
from swath.window import Window

if TYPE_CHECKING:
    from swath.backends.triton.runtime import KernelCall, Plan

Part = Callable[[Any], Tensor] | None
"""How a tensor is got from an argument that it is a part of; None where it is the argument."""
Addresses = Mapping[str, int]
"""Of the tensors of a call, by the names of ``operands_of``."""
OUTPUTS = ("out", "lse")
"""Operands of attention that are the last arguments of a ready call."""
PARTS = {PagedKV: ("k", "v", "k_scale", "v_scale"), PageTable: ("entries", "indptr", "rows"),
         Window: ("global_tokens", "bounds")}  # fmt: skip
"""Where the nouns keep their tensors."""
STREAM = 3
"""The place of the stream in what Triton's launchers take: a grid, the stream, what to launch, and its arguments."""
UNWATCHED = (None, None, None)
"""No launch metadata, no hook before a launch, none after it."""


@dataclass(frozen=True, eq=False, slots=True)
class ReadyLaunch:
    """A launch of a compiled kernel through Triton's own launcher, past its lookups (50 us for our entries).

    The launcher takes addresses for tensors: of operands by name, and of scratch by its offset in the allocation.
    """

    compiled: Any  # kept, so that the kernel stays loaded
    run: Callable[..., None]
    values: list[Any]  # all that ``run`` takes; what is not known yet is 0
    operands: list[tuple[int, str]]
    moved: list[tuple[int, str, int]]  # operands of which the launch takes what is behind an offset
    scratch: list[tuple[int, int]]
    boxes: list[tuple[int, str | None, int]]  # place, operand (None: scratch), and its offset

    def __call__(self, addresses: Addresses, scratch: int, stream: int) -> None:
        """Launch on ``stream`` with operands at ``addresses``, and scratch that begins at ``scratch``."""
        values = self.values.copy()
        values[STREAM] = stream
        for place, name in self.operands:
            values[place] = addresses[name]
        for place, name, offset in self.moved:
            values[place] = addresses[name] + offset
        for place, offset in self.scratch:
            values[place] = scratch + offset
        for place, box, offset in self.boxes:
            values[place] = box_at((scratch if box is None else addresses[box]) + offset, values[place])
        self.run(*values)


def ready_launch(call: KernelCall, compiled: Any, operands: Operands, offsets: dict[str, int]) -> ReadyLaunch | None:
    """The launch of a call that ran; None for the interpreter, and for a Triton that keeps its kernels otherwise."""
    parts = ("run", "function", "packed_metadata")
    if not isinstance(call.kernel, JITFunction) or not all(hasattr(compiled, part) for part in parts):
        return None
    before: list[Any] = [call.grid, 1, 1, 0, compiled.function, compiled.packed_metadata, *UNWATCHED]
    parameters = call.kernel.arg_names
    boxed = [(i, p, call.boxed(p)) for i, p in enumerate(parameters, len(before))]
    boxes: list[tuple[int, str | None, int]] = [
        (i, None if name in offsets else name, offsets.get(name, 0) + call.offset(p, operands))
        for i, p, name in boxed
        if name is not None
    ]
    taken = [
        (i, call.sources.get(p, p), call.offset(p, operands))
        for i, p, name in boxed
        if p not in call.args and name is None
    ]
    given = [(i, name, offset) for i, name, offset in taken if name not in offsets and operands.get(name) is not None]
    values = before + [call.args.get(p) for p in parameters]
    if boxes:
        arguments = call.arguments(operands)
        for i, p, name in boxed:
            if name is not None:
                values[i] = box_at(0, arguments[p])  # a tensor here would be kept from being freed
    return ReadyLaunch(
        compiled=compiled,
        run=compiled.run,
        values=values,
        operands=[(i, name) for i, name, offset in given if offset == 0],
        moved=[(i, name, offset) for i, name, offset in given if offset > 0],
        scratch=[(i, offsets[name] + offset) for i, name, offset in taken if name in offsets],
        boxes=boxes,
    )


def box_at(address: int, box: Any) -> Any:
    """A tensor descriptor like ``box`` at an address, in a quarter of the time of ``copy.copy``."""
    other = object.__new__(type(box))
    other.__dict__ = box.__dict__ | {"base": Address(address)}
    return other


@dataclass(slots=True)
class Address:
    """What a tensor is to a box that is encoded anew: an address."""

    value: int

    def data_ptr(self) -> int:
        """The address, by the name that tensors give it."""
        return self.value


@dataclass(frozen=True, eq=False, slots=True)
class ReadyCall:
    """Calls of one signature on one device, launched from their arguments: no case is made, no backend is chosen.

    sources: operands by name, with the argument that each of them is, or the part of it.
    """

    plan: Plan
    device: torch.device
    sources: list[tuple[str, int, Part]]

    def __call__(self, arguments: Sequence[Any]) -> bool:
        """Launch; or False, and nothing is launched: another device is the current one, or a profiler listens."""
        if self.device.index != torch.cuda.current_device():
            return False
        addresses = {}
        for name, i, part in self.sources:
            x = arguments[i]
            addresses[name] = (x if part is None else part(x)).data_ptr()
        return self.plan.launch(addresses, self.device)


def ready_call(
    plan: Plan, operands: Operands, arguments: Sequence[Any], device: torch.device, outputs: Sequence[str] = OUTPUTS
) -> ReadyCall | None:
    """The calls that look like this one, which ran; None where an operand is not exactly one of its arguments.

    An operand that is no argument was made from one. One that is several arguments (q is also ``out``) tells nothing
    of which of them it is in another call.

    arguments: those of the public function, and behind them the outputs (None for one that is not asked for), which
        are the operands of the names ``outputs``.
    """
    if not plan.is_ready:
        return None
    made = len(arguments) - len(outputs)
    places: dict[int, list[tuple[int, Part]]] = {}
    for x, i, part in _tensors(arguments[:made]):
        places.setdefault(id(x), []).append((i, part))
    sources = []
    for name, operand in operands.items():
        if operand is None:
            continue
        found = [(made + outputs.index(name), None)] if name in outputs else places.get(id(operand), [])
        if len(found) != 1:
            return None
        sources.append((name, *found[0]))
    return ReadyCall(plan, device, sources)


def _tensors(arguments: Sequence[Any]) -> Iterator[tuple[Tensor, int, Part]]:
    """All tensors in the arguments, each with its argument's place, and how it is got from that where it is a part."""
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            yield x, i, None
        elif isinstance(x, (tuple, list)):
            yield from ((part, i, itemgetter(j)) for j, part in enumerate(x) if isinstance(part, Tensor))
        else:
            for field in PARTS.get(type(x), ()):
                part = getattr(x, field)
                if isinstance(part, Tensor):
                    yield part, i, attrgetter(field)
