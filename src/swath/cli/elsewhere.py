"""Asking about a GPU that is not here: tensors without data, on CUDA devices that stand for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import FakeTensorMode

from swath import target
from swath.target import Target

INTERPRET = "TRITON_INTERPRET"
GPUS = {
    "sm_80": (108, "A100"),
    "sm_86": (84, "A40, RTX A6000"),
    "sm_89": (142, "L40S"),
    "sm_90": (132, "H100, H200"),
    "sm_100": (148, "B200"),
    "sm_103": (160, "B300"),
    "sm_120": (170, "RTX 5090"),
    "gfx942": (304, "MI300X"),
    "gfx950": (256, "MI355X"),
}
"""By architecture: multiprocessors (compute units) of a card, and which."""


@contextmanager
def cuda_is(gpu: Target) -> Iterator[None]:
    """CUDA devices are ``gpu``, as far as backends are concerned."""
    before = target._gpu_target
    target._gpu_target = lambda _device: gpu  # type: ignore[assignment]
    try:
        yield
    finally:
        target._gpu_target = before


@contextmanager
def without_data() -> Iterator[None]:
    """Tensors made here, on any device, have shapes and no memory."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # 0 is aligned
        yield


@contextmanager
def interpreting(wanted: bool) -> Iterator[None]:
    """Triton's interpreter on or off, as far as ``why_not`` is concerned."""
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1" if wanted else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[INTERPRET]
        else:
            os.environ[INTERPRET] = before
