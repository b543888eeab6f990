"""swath's own backends, each a provider. Windows count the visible keys, the query's own included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from swath.bench.case import BenchCase
from swath.bench.inputs import Inputs
from swath.bench.providers.provider import Provider
from swath.dispatch import backends
from swath.ops.explain import explain
from swath.ops.quantise import quantise_q
from swath.target import interpreting

GPU_BACKENDS = ("hopper", "triton")


def call_of(inputs: Inputs) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The public function, its positional arguments and its options."""
    return inputs.call.function, inputs.call.args, inputs.call.options


def _launch(impl: str, inputs: Inputs) -> str:
    function, args, options = call_of(inputs)
    return explain(function, *args, **options, impl=impl).launch


def _why_not(_case: BenchCase) -> None:
    """Every backend has attention, dense and paged; what else it lacks, ``_prepare`` finds out."""


def _prepare(impl: str, inputs: Inputs) -> Callable[[], Tensor]:
    function, args, options = call_of(inputs)
    reason = explain(function, *args, **options, impl=impl).reasons[impl]
    if reason is not None:
        raise NotImplementedError(reason)
    if inputs.case.q_made:
        wide, rest = inputs.wide_q, args[1:]
        return lambda: function(quantise_q(wide, options["q_scale"])[0], *rest, **options, impl=impl)
    return lambda: function(*args, **options, impl=impl)


def _devices(name: str) -> tuple[str, ...]:
    if name not in GPU_BACKENDS:
        return ("cpu",)
    return ("cuda", "cpu") if interpreting() else ("cuda",)


PROVIDERS = tuple(
    Provider(
        f"swath-{name}",
        _why_not,
        partial(_prepare, name),
        module="triton" if name in GPU_BACKENDS else None,
        devices=_devices(name),
        launch=partial(_launch, name),
    )
    for name in backends("attention")
    if name != "reference"
)
