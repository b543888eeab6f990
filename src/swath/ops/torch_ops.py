"""The operators as ``torch.library`` ops, for torch.compile, torch.export, dispatch modes, and fake and meta tensors.

A schema holds tensors and plain values only. So each type of argument says here how it is taken apart into such values
and put together again; which arguments an operator has is read from its annotations. Eager calls do not pass here: the
dispatcher would cost them several microseconds each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from swath.cache import PagedKV
from swath.errors import bad_type
from swath.pages import BlockTable, PageTable
from swath.window import Window

NAMESPACE = "swath"
"""Of the operators: ``torch.ops.swath``. A Hub kernel has a namespace of its own, see hub.py."""

_lib = torch.library.Library(NAMESPACE, "DEF")


def must_dispatch(operands: tuple[object, ...]) -> bool:
    """Whether a call must go through the dispatcher, because of who listens or of what it is given."""
    return is_traced() or are_special(operands)


def is_traced() -> bool:
    """Whether every call must go through the dispatcher: tracing, a dispatch mode (fake tensors among them)."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def are_special(operands: tuple[object, ...]) -> bool:
    """Whether a call of these must go through the dispatcher: one is of a subclass of Tensor.

    Or all of them are on "meta", and only shapes are asked for. Operands may be of any type (a PagedKV stands for its
    K): what cannot be one is for the checks to name.
    """
    all_meta = None
    for operand in operands:
        x: Any = operand.k if isinstance(operand, PagedKV) else operand
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            all_meta = all_meta is not False and x.is_meta
        elif isinstance(x, Tensor):
            return True
    return bool(all_meta)


@dataclass(frozen=True)
class Parts:
    """How values of a type pass through a schema.

    schema: the type in the schema's language of each part, by the suffix of its name.
    apart, together: from a value to its parts, and back.
    """

    schema: dict[str, str]
    apart: Callable[[str, Any], tuple[Any, ...]]
    together: Callable[..., Any]


def _as_it_is(schema: str, wanted: str, *types: type) -> Parts:
    def apart(name: str, x: Any) -> tuple[Any, ...]:
        if not isinstance(x, types):
            raise bad_type(name, wanted, type(x).__name__)
        return (x,)

    return Parts({"": schema}, apart, lambda x: x)


def _cache_apart(name: str, cache: Any) -> tuple[Any, ...]:
    if not isinstance(cache, PagedKV):
        raise bad_type(name, "a PagedKV", type(cache).__name__)
    return cache.tensors


def _window_apart(_name: str, window: Any) -> tuple[Any, ...]:
    window = Window.of(window)
    g = window.global_tokens
    per_seq = isinstance(g, Tensor)
    leading = 0 if per_seq else g, g if per_seq else None
    return window.size, *leading, window.causal, window.max_global_tokens, window.bounds, window.max_visible


def _window(size: int | None, count: int, per_seq: Tensor | None, *others: Any) -> Window:
    return Window(size, count if per_seq is None else per_seq, *others)


def _table_apart(name: str, table: Any) -> tuple[Any, ...]:
    if isinstance(table, PageTable):
        return table.entries, table.indptr, table.rows, table.unit
    if isinstance(table, Tensor):
        return table, None, None, "page"
    if not isinstance(table, (tuple, list)) or len(table) != 2:
        raise bad_type(name, "a tensor, a pair (page_ids, page_indptr) or a PageTable", type(table).__name__)
    return *table, None, "page"


PARTS: dict[Any, Parts] = {
    Tensor: _as_it_is("Tensor", "a tensor", Tensor),
    Tensor | None: _as_it_is("Tensor?", "a tensor or None", Tensor, NoneType),
    int: _as_it_is("SymInt", "an int", int, torch.SymInt),
    int | None: _as_it_is("SymInt?", "an int or None", int, torch.SymInt, NoneType),
    float: _as_it_is("float", "a float", float, int),
    float | None: _as_it_is("float?", "a float or None", float, int, NoneType),
    bool: _as_it_is("bool", "a bool", bool),
    str: _as_it_is("str", "a str", str),
    torch.dtype | None: _as_it_is("ScalarType?", "a dtype or None", torch.dtype, NoneType),
    PagedKV: Parts(
        {"_k": "Tensor", "_v": "Tensor", "_k_scale": "Tensor?", "_v_scale": "Tensor?"}, _cache_apart, PagedKV
    ),
    Window | int | None: Parts(
        {
            "_size": "int?",
            "_global_tokens": "int",
            "_global_tokens_per_seq": "Tensor?",
            "_causal": "bool",
            "_max_global_tokens": "int?",
            "_bounds": "Tensor?",
            "_max_visible": "int?",
        },
        _window_apart,
        _window,
    ),
    BlockTable: Parts(
        {"": "Tensor", "_indptr": "Tensor?", "_rows": "Tensor?", "_unit": "str"}, _table_apart, PageTable
    ),
}
"""By annotation."""


@dataclass(frozen=True)
class TorchOp:
    """An operator of ``torch.ops.swath``: the arguments of a public function, by name and type, taken apart.

    name: with the overload, if it is not the default one.
    arguments: types by name, in the order of the schema.
    returns: the results in the schema's language.
    run, fake: take the arguments by name and return the results; ``fake`` makes them without computing.
    mutates: names of arguments that ``run`` writes into.
    """

    name: str
    arguments: dict[str, Any]
    returns: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    mutates: Sequence[str] = ()

    def __post_init__(self) -> None:
        letters = iter("abcdefgh")
        written = [self._parameter(*p, letters) for p in self._schema()]
        _lib.define(f"{self.name}({', '.join(written)}) -> {self.returns}")
        _lib.impl(self.name, lambda *parts: self.run(**self._together(parts)), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"{NAMESPACE}::{self.name}", lambda *parts: self.fake(**self._together(parts)), lib=_lib
        )

    def __call__(self, **arguments: Any) -> Any:
        """Through the dispatcher."""
        op, _, overload = self.name.partition(".")
        parts = [p for name, kind in self.arguments.items() for p in PARTS[kind].apart(name, arguments[name])]
        return getattr(getattr(getattr(torch.ops, NAMESPACE), op), overload or "default")(*parts)

    def _schema(self) -> list[tuple[str, str, str]]:
        """The parts of all arguments: argument, name of the part, its type in the schema."""
        return [
            (name, name + suffix, schema)
            for name, kind in self.arguments.items()
            for suffix, schema in PARTS[kind].schema.items()
        ]

    def _parameter(self, argument: str, part: str, schema: str, letters: Any) -> str:
        if argument in self.mutates and schema.startswith("Tensor"):
            schema = f"Tensor({next(letters)}!){schema.removeprefix('Tensor')}"
        return f"{schema} {part}"

    def _together(self, parts: tuple[Any, ...]) -> dict[str, Any]:
        left = iter(parts)
        return {
            name: PARTS[kind].together(*(next(left) for _ in PARTS[kind].schema))
            for name, kind in self.arguments.items()
        }
