"""An operator: the way of a public function from its arguments to a checked case and to a backend, eager or traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from swath import dispatch
from swath.ops.arguments import check_names
from swath.ops.signature import Memory
from swath.ops.torch_ops import TorchOp, are_special, is_traced
from swath.problem import Accepted, Outputs, result_of


class Case(Protocol):
    """A checked call in the form that backends read."""

    @property
    def result(self) -> Any:
        """What the public function returns, once a backend has run it."""


C = TypeVar("C", bound=Case)
F = TypeVar("F", bound=Callable[..., Any])
Operands = tuple[Any, ...]
Options = dict[str, Any]


@dataclass(frozen=True)
class Stages(Generic[C]):
    """From the arguments of a public function to a case, in the steps that a call like an earlier one takes or not.

    check: every check, of a call whose signature was not met before.
    outputs: where its results go, made or given.
    case: the checked call.
    """

    check: Callable[..., Accepted]
    outputs: Callable[[Accepted, Operands, Options], Outputs]
    case: Callable[[Accepted, Operands, Options, Outputs], C]
    memory: Memory[Accepted] = field(default_factory=Memory)

    def accept(self, operands: Operands, options: Options) -> Accepted:
        """What the checks find about a call, or found about one that looked the same."""
        return self.memory.recall(self.check, operands, options)

    def prepare(self, operands: Operands, options: Options) -> C:
        """All of them."""
        accepted = self.accept(operands, options)
        return self.case(accepted, operands, options, self.outputs(accepted, operands, options))


class Operator(Generic[C]):
    """A public function that backends implement.

    Args:
        name: of the public function.
        module: of each backend that implements it: ``swath.backends.<backend>.<module>``.
        prepare: from the arguments of the public function, all but ``impl``, to a checked case with its outputs made.
        results: what a case that has run gives back, as the schema has it.
        arguments: types by name, as ``torch_ops.PARTS`` has them.
        defaults: values of arguments that may be left out.
        returns: the results in the schema's language.
        mutates: names of arguments that are written into.
        stages: of ``prepare``, where calls that look alike are remembered.
    """

    def __init__(
        self, name: str, module: str, prepare: Callable[..., C], results: Callable[[C], Any],
        arguments: dict[str, Any], defaults: dict[str, Any], returns: str, mutates: tuple[str, ...] = (),
        stages: Stages[C] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.module, self.prepare, self.results, self.stages = name, module, prepare, results, stages
        self.arguments, self.defaults = {**arguments, "impl": str}, defaults
        self.torch_op = TorchOp(name, self.arguments, returns, self._run, self._fake, mutates)

    def __call__(self, operands: Operands, options: Options, impl: str) -> Any:
        """What the public function returns."""
        if not is_traced():
            if self.stages is not None:
                accepted = self.stages.accept(operands, options)
                # Where one that looks the same has run, what this one is given is not special either.
                if accepted.ready or not are_special(operands):
                    return self.run_alike(self.stages, accepted, operands, options, impl)
            elif not are_special(operands):
                return self.execute(self.prepare(*operands, **options), impl).result
        if torch.compiler.is_compiling():
            check_names(options, self.defaults, self.name)
        else:  # so that a wrong call is named as everywhere, and not by the schema
            self.prepare(*operands, **options)
            dispatch.check_impl(self.module, impl)
        named = dict(zip(self.arguments, operands, strict=False))
        return self.dispatched({**self.defaults, **named, **options, "impl": impl})

    def run_alike(
        self, stages: Stages[C], accepted: Accepted, operands: Operands, options: Options, impl: str
    ) -> Any:  # fmt: skip
        """What the public function returns for a call that looks like an accepted one.

        A backend that can do so is ready after the first of them: it launches the others from their arguments.
        """
        outputs = stages.outputs(accepted, operands, options)
        arguments = (*operands, *options.values(), *outputs)
        ready = accepted.ready.get(impl) if type(impl) is str else None
        if ready is None or not ready(arguments):
            case = stages.case(accepted, operands, options, outputs)
            backend = dispatch.choose(self.module, case, impl)
            backend.run(case)
            if impl not in accepted.ready:
                accepted.ready[impl] = dispatch.ready(backend, case, arguments)
        return result_of(outputs)

    def execute(self, case: C, impl: str) -> C:
        """Run a prepared case."""
        dispatch.choose(self.module, case, impl).run(case)
        return case

    def dispatched(self, named: dict[str, Any]) -> Any:
        """What the public function returns, through the dispatcher."""
        return self.torch_op(**named)

    def _run(self, impl: str, **arguments: Any) -> Any:
        return self.results(self.execute(self.prepare(**arguments), impl))

    def _fake(self, impl: str, **arguments: Any) -> Any:
        """The results, made and not computed. A backend that does not exist is named when the call runs."""
        del impl
        return self.results(self.prepare(**arguments))


def spelled_out(options: type, defaults: dict[str, Any]) -> Callable[[F], F]:
    """Give a function that takes ``**options`` a signature with their names, for ``help`` and for completion."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
            for name, annotation in options.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *named])  # type: ignore[attr-defined]
        return function

    return decorate
