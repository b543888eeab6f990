"""Builtins of Triton's interpreter, recorded once for each kind of arguments and then repeated.

What ``tl.load`` or ``tensor.__add__`` asks of its builder follows from the types of the arguments and from constants:
the compiler, which knows no values yet, runs the same code. In the interpreter it was nine tenths of the time. So the
first call of a kind runs with a builder that takes notes, and every call does what the notes say: the same operations
of the interpreter's builder, in the same order, on the values at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from types import CodeType, NoneType
from typing import Any, NamedTuple

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic

Builtin = Callable[..., Any]

PLAIN = {int, bool, str, NoneType, core.PropagateNan}
"""Types of constants whose value and type are all that a recording depends on."""

OF_CONSTANTS = {"create_splat", "create_make_range", "create_int_cast"}
"""Operations that make a constant of constants. No operation writes into its operands, so a constant may be shared."""


class NotRecordableError(Exception):
    """The call has to run as Triton runs it."""


class Unknown(NamedTuple):
    """A handle that every call has its own of, by its name in the notes."""

    name: str

    @property
    def data(self) -> Any:
        """No number, so that it is true, as tensors are in the compiler: ``tl.load`` asks that of a scalar mask."""
        return np.empty(0)


class Recorder:
    """Stands for the builder while a builtin is recorded: makes types and constants, and notes all other operations."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.builder, name)
        return member if name.endswith("_ty") or not callable(member) else partial(self.note, name, member)

    def note(self, name: str, member: Builtin, *args: Any) -> Any:
        constant = not any(isinstance(arg, Unknown) for arg in args)
        if constant and (name.startswith("get_") or name in OF_CONSTANTS):
            return member(*args)
        result = Unknown(f"h{len(self.lines)}")
        self.lines.append(f"{result.name} = {self.name(member)}({', '.join(map(self.name, args))})")
        return result

    def name(self, value: Any) -> str:
        """A value in the notes."""
        if isinstance(value, Unknown):
            return value.name
        if isinstance(value, (list, tuple)) and any(isinstance(item, Unknown) for item in value):
            raise NotRecordableError
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name


def record(builtin: Builtin, builder: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Builtin:
    """A function of the values of ``args`` and ``kwargs``: what the builtin does with arguments of their kind.

    Raises:
        Exception: The builtin looks at values, gives no tensor, or refuses the arguments.
    """
    recorder = Recorder(builder)
    stands = [stand_in(f"a{i}", value) for i, value in enumerate((*args, *kwargs.values()))]
    keywords = dict(zip(kwargs, stands[len(args) :], strict=True))
    result = builtin(*stands[: len(args)], **keywords, _semantic=TritonSemantic(recorder))
    if type(result) is not core.tensor:
        raise NotRecordableError
    given = [f"return a{i}" for i, stand in enumerate(stands) if stand is result]
    made = f"result.handle = {recorder.name(result.handle)}"
    ending = given[:1] or ["result = new(tensor)", "result.__dict__.update(attributes)", made, "return result"]
    head = f"def repeat({', '.join(f'a{i}' for i in range(len(stands)))}):"
    scope = {**recorder.constants, "new": object.__new__, "tensor": core.tensor, "attributes": vars(result)}
    exec(compiled("\n    ".join([head, *recorder.lines, *ending])), scope)
    repeat: Builtin = scope["repeat"]
    return repeat


def stand_in(name: str, value: Any) -> Any:
    """A tensor of the same type that has no value yet; constants stand for themselves."""
    if type(value) is not core.tensor:
        return value
    stand = object.__new__(core.tensor)
    vars(stand).update(vars(value), handle=Unknown(f"{name}.handle"))
    return stand


@cache
def compiled(source: str) -> CodeType:
    """Most notes differ in their constants alone, which have names there, so that few texts are compiled."""
    return compile(source, "<recording>", "exec")


def kind_of(value: Any) -> Any:
    """What a recording depends on: of a constant all. Of a tensor, which may stand in no list here, its type."""
    of = type(value)
    if of in PLAIN:
        return of, value
    if of is float:
        return of, repr(value)  # tells -0.0 from 0.0, and NaN is itself
    if of is core.constexpr:
        return of, kind_of(value.value)
    if of is slice:
        return of, kind_of((value.start, value.stop, value.step))
    if of is tuple or of is list:
        return of, *map(kind_of, value)
    if isinstance(value, core.dtype):
        return core.dtype, value.name
    raise NotRecordableError


@cache
def recorded(builtin: Builtin, builder: Any) -> Builtin:
    """The builtin with its builder, by recordings."""
    tensor, semantic = core.tensor, TritonSemantic(builder)
    recordings: dict[Any, Builtin | None] = {}

    def recording(args: Sequence[Any], kwargs: dict[str, Any]) -> Builtin | None:
        try:
            return record(builtin, builder, args, kwargs)
        except Exception:  # noqa: BLE001 - the builtin itself, which runs then, has no trouble or says what it is
            return None

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        if _semantic is not None and type(_semantic.builder) is Recorder:
            return builtin(*args, **kwargs, _semantic=_semantic)
        try:
            key = tuple([x.type.name if type(x) is tensor else kind_of(x) for x in args])
            if kwargs:
                key += tuple([(name, x.type.name if type(x) is tensor else kind_of(x)) for name, x in kwargs.items()])
        except NotRecordableError:
            return builtin(*args, **kwargs, _semantic=semantic)
        repeat = recordings.get(key)
        if repeat is None and key not in recordings:
            repeat = recordings[key] = recording(args, kwargs)
        if repeat is None:
            return builtin(*args, **kwargs, _semantic=semantic)
        return repeat(*args, *kwargs.values()) if kwargs else repeat(*args)

    return call


def patch_attr(owner: Any, name: str, builtin: Builtin, builder: Any, scope: Any) -> None:
    """``_patch_attr`` of the interpreter: a builtin that has its builder in the place of one that asks for it."""
    scope.set_attr(owner, name, recorded(builtin, builder))
