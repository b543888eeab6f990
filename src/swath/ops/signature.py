"""What a call looks like: everything about its arguments but the contents of tensors.

Checks read nothing else, and nothing else decides which kernels are launched and how. So what one call found out holds
for every later call that looks the same, and is remembered under the signature: an eager decode step would spend more
time on finding it out again than the GPU spends on attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from swath.cache import PagedKV
from swath.pages import PageTable
from swath.problem import is_in_place
from swath.window import Window

ALIGNMENT = 16
"""Bytes: compilers specialise kernels for pointers that are multiples of it."""
MOST_SIGNATURES = 1024
BOUND_STEP = 64
VALUES = frozenset({int, float, bool, str, type(None)})
"""Types of arguments that count by their values. They count with their types: 1, 1.0 and True are equal to Python."""

V = TypeVar("V")
Signature = tuple[object, ...]


def signature_of(operands: tuple[Any, ...], options: dict[str, Any]) -> Signature:
    """The signature of a call: tensors by dtype, shape, strides, device and so on, numbers and words as they are.

    Arguments of any type are taken, since wrong ones are for the checks to name. What is no key, such as a list, makes
    a signature that cannot be hashed.
    """
    if "max_kv_len" in options:
        options = {**options, "max_kv_len": coarse(options["max_kv_len"])}
    with_grad = torch.is_grad_enabled()
    looks: list[object] = [with_grad, *options]
    for x in (*operands, *options.values()):
        kind = type(x)
        if kind is Tensor or kind is Parameter:  # as ``tensor_look``, but calls cost too
            needs_grad = with_grad and x.requires_grad
            look = x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % ALIGNMENT, x.is_neg(), needs_grad
            looks.append(look)
        elif kind in VALUES:
            looks.append(kind)
            looks.append(x)
        elif kind is PagedKV and not with_grad:
            looks.append(cache_look(x))
        else:
            looks.append(_look(x))
    out = options.get("out")
    if out is not None:
        looks.append(is_in_place(operands[0], out))
    return tuple(looks)


def tensor_look(x: Tensor) -> object:
    """What a signature says of a tensor, where no gradients are recorded."""
    return x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % ALIGNMENT, x.is_neg()


class Look:
    """Stands for what some caches look like, all of them alike: hashed and compared as the object that it is."""


_looks: dict[Signature, Look] = {}


def cache_look(cache: PagedKV) -> Look:
    """What a signature says of a cache where no gradients are recorded: found out once, since its tensors stay."""
    found: Look | None = cache.__dict__.get("_look")
    if found is None:
        if len(_looks) >= MOST_SIGNATURES:
            _looks.clear()
        found = cache.__dict__["_look"] = _looks.setdefault(signature_of(cache.tensors, {}), Look())
    return found


def _look(x: object) -> object:
    if type(x) is PagedKV:
        return PagedKV, signature_of(x.tensors, {})
    if type(x) is Window:
        if type(x.global_tokens) is int and x.bounds is None:
            return Window, x.key
        tensors = signature_of((x.global_tokens, x.bounds), {})
        return Window, x.size, x.causal, x.max_global_tokens, coarse(x.max_visible), tensors
    if type(x) is PageTable:
        return PageTable, signature_of((x.entries, x.indptr, x.rows, x.unit), {})
    if isinstance(x, (tuple, list)):
        return tuple, signature_of(tuple(x), {})
    return [x]  # not a key, so not kept: what else decides about an unknown type, or a subclass, is not known


def coarse(bound: Any) -> Any:
    """A host bound rounded up, so that growing sequences keep their signature for a while: any true bound will do."""
    return -(-bound // BOUND_STEP) * BOUND_STEP if type(bound) is int and bound > 0 else bound


class Memory(Generic[V]):
    """What checks found out about calls, by signature; all is forgotten beyond ``MOST_SIGNATURES`` of them."""

    def __init__(self) -> None:
        self._known: dict[Signature, V] = {}

    def recall(self, check: Callable[..., V], operands: tuple[object, ...], options: dict[str, Any]) -> V:
        """What ``check(*operands, **options)`` returned for such a call, or returns now for one not met before."""
        signature: Signature = ()
        found = None
        try:
            signature = signature_of(operands, options)
            found = self._known.get(signature)
        except (TypeError, RuntimeError):  # no key; or a tensor without strides or memory of its own, as inside vmap
            signature = ()
        if found is None:
            found = check(*operands, **options)
            if signature:
                if len(self._known) >= MOST_SIGNATURES:
                    self._known.clear()
                self._known[signature] = found
        return found
