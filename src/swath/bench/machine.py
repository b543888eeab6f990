"""The machine that rows are measured on, and what is installed there."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import swath
from swath.bench.results import Origin


def describe(device: torch.device, commit: str | None, command: str) -> Origin:
    """The machine, the versions and the date; ``commit`` where git does not tell."""
    on_gpu = device.type == "cuda"
    return Origin(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        cpu=None if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        torch=torch.__version__,
        triton=version_of("triton"),
        cuda=torch.version.cuda,
        swath=swath.__version__,
        commit=_commit() or commit,
        date=datetime.now(timezone.utc).date().isoformat(),
        command=command,
    )


def version_of(package: str) -> str | None:
    """The installed version of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this package lies in."""
    here = str(Path(__file__).parents[1])
    head = _first_line("git", "-C", here, "rev-parse", "--short", "HEAD")
    if head is None:
        return None
    return f"{head}, modified" if _first_line("git", "-C", here, "status", "--porcelain", ".") else head


def _first_line(*command: str) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(ran.stdout.splitlines()), None) if ran.returncode == 0 else None
