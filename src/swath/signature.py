"""What a call looks like: everything about its arguments but the contents of tensors.

Checks read nothing else, and nothing else decides which kernels are launched and how. So what one call found out holds
for every later call that looks the same, and is remembered under the signature: an eager decode step would spend more
time on finding it out again than the GPU spends on attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from swath.cache import PagedKV
from swath.window import Window

ALIGNMENT = 16
"""Bytes: compilers specialise kernels for pointers that are multiples of it."""
MOST_SIGNATURES = 1024
BOUND_STEP = 64

V = TypeVar("V")
Signature = tuple[object, ...]


def signature_of(tensors: tuple[object, ...], values: tuple[object, ...]) -> Signature:
    """The signature of a call: ``tensors`` by dtype, shape, strides, device and so on, ``values`` as they are.

    Arguments of any type are taken, since wrong ones are for the checks to name. Values count with their types: 1, 1.0
    and True are equal to Python and not to the checks.
    """
    looks: list[object] = [torch.is_grad_enabled()]
    for x in tensors:
        if x is None:
            looks.append(None)
        elif type(x) is Tensor or type(x) is Parameter:  # no function of its own: calls cost too
            looks.append((x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % ALIGNMENT, x.requires_grad))
        else:
            looks.append(_look(x))
    return *looks, *values, *map(type, values)


def _look(x: object) -> object:
    if isinstance(x, PagedKV):
        return PagedKV, signature_of(x.tensors, ())
    if type(x) is Window:
        g = x.global_tokens
        return x.size, x.causal, x.max_global_tokens, g if isinstance(g, int) else signature_of((g,), ())
    if isinstance(x, (tuple, list)):
        return type(x), signature_of(tuple(x), ())
    if isinstance(x, Tensor):
        return [x]  # a list is no key: what else decides about other subclasses of Tensor is not known
    return type(x), x


def coarse(bound: object) -> object:
    """A host bound rounded up, so that growing sequences keep their signature for a while: any true bound will do."""
    return -(-bound // BOUND_STEP) * BOUND_STEP if type(bound) is int and bound > 0 else bound


class Memory(Generic[V]):
    """What checks found out about calls, by signature; all is forgotten beyond ``MOST_SIGNATURES`` of them."""

    def __init__(self) -> None:
        self._known: dict[Signature, V] = {}

    def recall(self, check: Callable[..., V], tensors: tuple[object, ...], values: tuple[object, ...]) -> V:
        """What ``check(*tensors, *values)`` returned for such a call, or returns now for one not met before.

        A signature that holds what cannot be a key, such as a list, is never met.
        """
        signature = signature_of(tensors, values)
        try:
            found = self._known.get(signature)
        except TypeError:
            return check(*tensors, *values)
        if found is None:
            found = check(*tensors, *values)
            if len(self._known) >= MOST_SIGNATURES:
                self._known.clear()
            self._known[signature] = found
        return found
