"""The form in which masks of ours travel through a model: an object without values, which no arithmetic can use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from swath.errors import bad_type

if TYPE_CHECKING:
    from swath.hf.masks import BandMask

NO_VALUES = "swath's, which has none: this model has attention code of its own (use 'eager' or 'sdpa')"

COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
# Special methods of Tensor that are no operation on its values.
PROTOCOLS = ("__deepcopy__", "__setstate__", "__torch_dispatch__")


class CarriedMask(BlockMask):
    """A BandMask on its way from the mask function to the attention function, ``band``.

    It has the shape of the mask that it stands for, and no values. A model that adds its mask to scores, or selects
    with it, therefore gets a TypeError: from every function of torch, every operator and every method of a tensor.
    Moving it to another device, and cutting rows and columns off, are all that models may do with it.

    Transformers lets a mask that is no tensor through if it is a BlockMask; it is one in name alone.
    """

    def __init__(self, band: BandMask, device: torch.device | str | int) -> None:
        self.band = band
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, 1, queries, keys]."""
        return self.band.batch, 1, self.band.q_len, self.band.kv_len

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def dim(self) -> int:
        """4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """``shape``, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def to(self, device: Any = None, **_: Any) -> CarriedMask:
        """The same mask on another device."""
        if not isinstance(device, (torch.device, str, int)):
            _refuse(f"to({device})")
        return CarriedMask(self.band, device)

    def contiguous(self) -> CarriedMask:
        """The mask: ``generate`` asks for it with static caches."""
        return self

    def __getitem__(self, index: Any) -> CarriedMask:
        parts = index if isinstance(index, tuple) else (index,)
        rest = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
        after = parts[rest + 1 :]
        slices = parts[:rest] + (slice(None),) * (4 - rest - len(after)) + after
        if len(slices) > 4 or not all(isinstance(part, slice) and part.step in (None, 1) for part in slices):
            _refuse(f"the index {index}")
        sequences, heads, rows, columns = (range(*p.indices(n)) for p, n in zip(slices, self.shape, strict=True))
        if not (sequences and heads and rows and columns):
            _refuse(f"the empty slice {index}")
        return CarriedMask(self.band.cut(sequences, rows, columns), self.device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"CarriedMask has no attribute {name!r}")
        _refuse(name)

    def __repr__(self) -> str:
        return f"CarriedMask({self.band})"

    __str__ = __repr__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(func, "__name__", repr(func)))


def _refuse(operation: str) -> NoReturn:
    raise bad_type("attention_mask", f"a mask with values for {operation}", NO_VALUES)


def _refusing(name: str) -> Any:
    def method(self: CarriedMask, *_: Any, **__: Any) -> NoReturn:
        _refuse(name)

    return method


def _operators() -> list[str]:
    """What Python calls on a tensor by an operator or a conversion, and what BlockMask would answer."""
    special = {name for name in dir(Tensor) if name.startswith("__")} - set(dir(object)) - set(PROTOCOLS)
    inherited = {name for name in vars(BlockMask) if not name.startswith("_")}
    answered = {
        name for name in special | inherited if callable(getattr(CarriedMask, name, getattr(Tensor, name, None)))
    }
    return sorted((answered | set(COMPARISONS)) - set(vars(CarriedMask)))


for _name in _operators():
    setattr(CarriedMask, _name, _refusing(_name))
