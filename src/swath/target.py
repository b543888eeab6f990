"""Questions to the hardware and to what is installed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for and launched on: "sm_90", "gfx942", or "interpreter"."""

    arch: str
    num_sms: int = 1

    @property
    def interpret(self) -> bool:
        """Triton's interpreter, on CPU tensors."""
        return self.arch == "interpreter"

    @property
    def compute_capability(self) -> int:
        """90 for sm_90; 0 for what is not NVIDIA's."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel may start before the one it depends on has ended (programmatic dependent launch)."""
        return self.compute_capability >= 90

    @property
    def shared_bytes(self) -> int:
        """Shared memory (LDS) that one program may use, by the vendors' tables; the least of them where unknown."""
        return SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values()))

    def has_pairs(self, stored: str) -> bool:
        """Whether the inline PTX of device/quant.py runs here: float8_e4m3 conversion came with sm_89."""
        return self.compute_capability >= (89 if stored == "e4m3" else 80)


def target_of(device: torch.device) -> Target:
    """The target that a device is; a CPU stands for the interpreter."""
    return _gpu_target(device) if device.type == "cuda" else Target("interpreter")


@cache
def _gpu_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(arch, int(properties.multi_processor_count))


_HERE = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE  # changing to where one is costs microseconds
    return torch.cuda.device(device)


@cache
def has_triton() -> bool:
    """Whether Triton is installed here."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton was asked to run its kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_no_triton(device: torch.device) -> str | None:
    """The reason Triton kernels cannot run on tensors of ``device``, or None."""
    if not has_triton():
        return "Triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        return None if interpreting() else "tensors are on the cpu (TRITON_INTERPRET=1 runs kernels there, for tests)"
    return f"tensors are on {device.type}"
