"""Checks that nouns and operators share. They read shapes and dtypes, never the contents of device tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from swath.errors import bad_type, bad_value

INT_DTYPES = (torch.int32, torch.int64)
"""Of lengths, positions and page tables. Kernels narrow 64 bits to 32 where they load them, see device/cache.py."""


def check_no_grad(**tensors: Tensor | None) -> None:
    """swath is forward only: refuse inputs that require grad."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise bad_value(name, "a tensor without grad (swath is forward only; use torch.no_grad())", "grad")


def check_is_tensor(name: str, x: object) -> Tensor:
    """A tensor whose elements lie in memory as its strides say: not sparse, quantised or nested, nor inside vmap, nor
    negated when read (``z.conj().imag``)."""
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        kind = "nested" if x.is_nested else "quantised" if x.is_quantized else str(x.layout).removeprefix("torch.")
        raise bad_type(name, "a strided tensor", f"a {kind} one")
    if torch.compiler.is_compiling():  # of the compiled call's tensors the rest is asked when it runs
        return x
    if x.is_neg():
        raise bad_type(name, "a tensor that memory holds as it is (resolve_neg() makes one)", "a negated view")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise bad_type(name, "a tensor outside torch.func: swath has no rule for vmap or grad", "one inside")
    return x


def check_tensor(name: str, x: object, dims: int, device: torch.device | None = None) -> Tensor:
    """A tensor with ``dims`` dimensions on ``device``."""
    x = check_is_tensor(name, x)
    if x.dim() != dims:
        raise bad_value(name, f"{dims} dimensions", f"shape {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise bad_value(name, f"a tensor on {device}, as the others", x.device)
    return x


def check_ints(name: str, x: object, length: int | None, device: torch.device) -> Tensor:
    """A one-dimensional int32 or int64 tensor on ``device``, of ``length`` where one is given."""
    x = check_tensor(name, x, 1, device)
    check_int_dtype(name, x)
    if length is not None and x.shape[0] != length:
        raise bad_value(name, f"shape [{length}]", tuple(x.shape))
    return x


def check_int_dtype(name: str, x: Tensor) -> None:
    """int32 or int64."""
    if x.dtype not in INT_DTYPES:
        raise bad_type(name, "int32 or int64", x.dtype)


def check_rows(name: str, x: Tensor) -> None:
    """Any strides with the last one 1."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise bad_value(name, "a last stride of 1", f"strides {x.stride()}")


def check_separate(name: str, x: Tensor) -> None:
    """No element stands for several, as after ``expand``: what is written must have a place of its own."""
    strides = x.stride()
    if 0 in strides and any(stride == 0 and n > 1 for stride, n in zip(strides, x.shape, strict=True)):
        raise bad_value(name, "a tensor to write into, each element in a place of its own", f"strides {strides}")


def check_alike(name: str, x: Tensor, of: str, like: Tensor) -> None:
    """The shape and dtype of the tensor ``like``, whose name is ``of``."""
    if x.shape != like.shape:
        raise bad_value(name, f"{of}'s shape {tuple(like.shape)}", tuple(x.shape))
    if x.dtype != like.dtype:
        raise bad_type(name, f"{of}'s dtype {like.dtype}", x.dtype)


def same_strides(x: Tensor, y: Tensor) -> bool:
    """Whether tensors of as many rows lie alike in memory: strides of dimensions of 1 do not count."""
    return all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n > 1)


def check_values(v: Tensor, k: Tensor, name: str = "v", of: str = "k") -> None:
    """Values v [..., Dv] for the keys k [..., D], of their dtype; Dv is D or less."""
    if v.shape[:-1] != k.shape[:-1] or v.shape[-1] > k.shape[-1]:
        *leading, head_dim = k.shape
        raise bad_value(name, f"shape [{', '.join(map(str, leading))}, at most {head_dim}], as {of}", tuple(v.shape))
    if v.dtype != k.dtype:
        raise bad_type(name, f"{of}'s dtype {k.dtype}", v.dtype)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise bad_value(name, f"one of {', '.join(map(repr, choices))}", repr(value))


def check_int(name: str, value: object, wanted: str) -> int:
    """An int, which a bool is not; a traced one is."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise bad_type(name, wanted, type(value).__name__)
    return value  # type: ignore[return-value]


def check_count(name: str, value: object, wanted: str, least: int = 0, most: int | None = None) -> int:
    """An int, which a bool is not, from ``least`` to ``most``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_type(name, wanted, type(value).__name__)
    if value < least:
        raise bad_value(name, wanted, value)
    if most is not None and value > most:
        raise bad_value(name, f"at most {most}", value)
    return value


def check_float(name: str, value: object, wanted: str) -> float:
    """A number, which a bool is not, that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(name, wanted, type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        raise bad_value(name, wanted, value) from None


def check_bound(name: str, value: object, most: int) -> int:
    """A host bound, an int >= 0: no more than ``most``, what the shapes allow, and that where none is given."""
    if value is None:
        return most
    bound = check_int(name, value, "an int or None")
    if bound < 0:
        raise bad_value(name, "an int >= 0", value)
    return min(bound, most)
