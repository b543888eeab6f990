"""What Triton would compile for a call on an H200 that need not be here, and a recorder of it in an engine's adapter.

Triton compiles a kernel for its constants and options and for what it specialises arguments to: the dtype of a tensor
and whether its address is a multiple of 16, None, whether an integer is 1 or a multiple of 16, the boxes of a
descriptor. All of that is in a key, as Triton itself finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from compile_variants import tiles_of
from torch import Tensor

from conftest import plan_for
from swath import PagedKV
from swath.backends.triton import append
from swath.backends.triton.arguments import operands_of
from swath.engines import common, warmup
from swath.engines.common import Layer, Step
from swath.ops import explain
from swath.target import Target

Key = tuple[object, ...]
H200 = Target("sm_90", 132)


def launch_keys(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> set[Key]:
    """What is compiled for a call of attention, or of ``append_kv``, whose tensors may be on any device."""
    name = op if isinstance(op, str) else op.__name__
    case = explain.prepare(name, *args, **kwargs)
    if name == "append_kv":
        plan, operands = append.plan_for(case, H200), append.operands_of(case)
    else:
        plan = plan_for(tiles_of(case, H200.arch)[-1], case, H200)
        operands = operands_of(case)
    operands = {**operands, **plan.scratch.tensors("meta")}
    return {_key(call.kernel, call.arguments(operands), call.options) for call in plan.calls}


def _key(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Key:
    _, specialised, _ = _binder(kernel)(**arguments)
    named = (f"{name}: {made}" for name, made in zip(kernel.arg_names, specialised, strict=True))
    return (kernel.fn.__name__, *named, *map(str, options.items()))


@cache
def _binder(kernel: Any) -> Any:
    """Triton's own look at the arguments of a kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


@contextmanager
def warming(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    """Within it warm-ups of an adapter compile nothing: the keys of what they would compile."""
    compiled: set[Key] = set()

    def compiling(op: Callable[..., Any], *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        compiled.update(launch_keys(op, *args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(warmup, "warmup", compiling)
        patch.setattr(warmup, "_warmed", set())
        yield compiled


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    """Within it steps of an adapter compute nothing: the keys of what they would launch."""
    launched: set[Key] = set()

    def attend(
        step: Step, layer: Layer, q: Tensor, kv: PagedKV, out: Tensor | None = None, return_lse: bool = False
    ) -> Any:
        arguments, options = step.call(layer, q, kv, out)
        launched.update(launch_keys("paged_attention", *arguments, **options, return_lse=return_lse))
        return torch.empty(*q.shape[:-1], kv.v_head_dim, dtype=q.dtype) if out is None else out

    def append_kv(*args: Any) -> None:
        launched.update(launch_keys("append_kv", *args))

    with monkeypatch.context() as patch:
        patch.setattr(Step, "attend", attend)
        patch.setattr(common, "append_kv", append_kv)
        yield launched


def late(compiled: set[Key], launched: set[Key]) -> list[str]:
    """Each launch that would have to be compiled, beside the nearest of those that were."""
    lines = []
    for key in launched - compiled:
        alike = [other for other in compiled if other[0] == key[0]]
        near = min(alike, key=lambda other: len({*other} ^ {*key}), default=())
        lines.append(f"{key[0]}: {sorted(map(str, {*key} - {*near}))} for {sorted(map(str, {*near} - {*key}))}")
    return lines
