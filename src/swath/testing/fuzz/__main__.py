"""The command line: ``python -m swath.testing.fuzz --help``."""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

import swath
from swath.dispatch import BACKENDS
from swath.target import has_triton, interpreting
from swath.testing.fuzz.draw import CALLS_A_VARIANT, SIZES
from swath.testing.fuzz.sweep import DeviceLostError, Settings, Tally, quick_interpreter, sweep
from swath.testing.fuzz.workers import Run, Team

FOREVER = 10**9


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; what was not given follows from the others."""
    parser = argparse.ArgumentParser(
        prog="python -m swath.testing.fuzz", description="random calls of swath's functions against float64"
    )
    add = parser.add_argument
    add("--calls", type=int, help="how many (1000, or no limit with --minutes)")
    add("--minutes", type=float, help="stop after so long")
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="triton without a GPU runs in its interpreter")
    add("--seed", type=int, default=0, help="of the first call; 1000 x variant + number")
    add("--processes", type=int, default=1, help="how many run side by side")
    add("--device", help="of the tensors (cuda where there is one, but for --backend cpu)")
    add("--sizes", choices=tuple(SIZES), help="how large calls are (large on a GPU, small in the interpreter)")
    add("--per-variant", type=int, help="calls of each compiled variant (40 on a GPU, 1 elsewhere)")
    add("--extreme", action="store_true", help="numbers at the ends of their types too")
    add("--patience", type=float, default=600.0, help="seconds after which a call counts as hung")
    found = parser.parse_args(arguments)
    for name in ("calls", "minutes", "processes", "per_variant"):
        value = getattr(found, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')}: wanted a number above 0, got {value}")
    cuda = torch.cuda.is_available() and found.backend != "cpu"
    found.device = found.device or ("cuda" if cuda else "cpu")
    on_gpu = found.device.startswith("cuda")
    if found.backend == "triton" and not on_gpu and has_triton():
        os.environ["TRITON_INTERPRET"] = "1"
    found.sizes = found.sizes or ("large" if on_gpu else "small" if interpreting() else "medium")
    found.calls = found.calls or (FOREVER if found.minutes else 1000)
    found.per_variant = found.per_variant or (40 if on_gpu else 1)
    most = CALLS_A_VARIANT - found.seed % CALLS_A_VARIANT
    if found.seed < 0 or found.per_variant > most:
        parser.error(f"--seed: wanted one >= 0 with {found.per_variant} numbers left of its {CALLS_A_VARIANT}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, report, and return the exit code: 1 where something was found."""
    asked = parsed(arguments)
    tries = 60 if asked.device == "cpu" and not interpreting() else 15
    settings = Settings(asked.backend, asked.device, asked.sizes, asked.extreme, tries)
    until = time.monotonic() + 60 * asked.minutes if asked.minutes else float("inf")
    run = Run(asked.seed, asked.calls, asked.per_variant, asked.processes, settings, until, asked.patience)
    tell(f"{where(settings)}, seeds from {asked.seed}, {asked.per_variant} a variant, {asked.processes} processes")
    began = time.monotonic()
    tally = one_call(run) if run.calls == 1 else Team(run, tell).finish()
    seconds = time.monotonic() - began
    tell(report(tally))
    tell(f"{tally.calls:,} calls in {seconds:.0f} s, {tally.calls / seconds:.1f}/s: {len(tally.findings)} findings")
    return 1 if tally.findings else 0


def one_call(run: Run) -> Tally:
    """A single call, in this process."""
    tally = Tally()
    try:
        with quick_interpreter():
            tally.add(sweep([run.seed], run.settings, lambda _, finding: tell(str(finding)) if finding else None))
    except DeviceLostError:
        tell("the device is lost")
    return tally


def where(settings: Settings) -> str:
    """What runs, in which versions."""
    device = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else settings.device
    versions = [f"swath {swath.__version__}", f"torch {torch.__version__}"]
    if has_triton():
        from triton import __version__ as triton_version

        versions.append(f"Triton {triton_version}")
    mode = " in Triton's interpreter" if interpreting() else ""
    extreme = ", extreme numbers" if settings.extreme else ""
    return f"backend {settings.impl} on {device}{mode}, {settings.sizes} sizes{extreme}; {', '.join(versions)}"


def report(tally: Tally) -> str:
    """Calls by backend and by option."""
    lines = ["ran on     " + ", ".join(f"{name} {count:,}" for name, count in tally.backends.most_common())]
    if tally.refused:
        lines.append(f"refused    {tally.refused:,}")
    used, seed = tally.worst
    lines.append(f"of a budget {used:.2f} used at most, by seed {seed}")
    by_option: dict[str, list[str]] = {}
    for (option, value), count in tally.options.most_common():
        by_option.setdefault(option, []).append(f"{value} {count:,}")
    lines += [f"{option:<15} {', '.join(values)}" for option, values in sorted(by_option.items())]
    return "\n".join(lines)


def tell(text: str) -> None:
    """Print at once, whatever the output is."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
