"""Results: JSON lines, one for each case and provider, each with its machine, so that files can be joined and cut."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import swath
from swath.errors import bad_value

Row = dict[str, Any]

IDENTITY = ("gpu", "driver", "torch", "triton", "swath", "commit")
"""What two rows must share to stand in one run."""


def describe(device: torch.device, commit: str | None) -> Row:
    """The machine, the versions and the date; ``commit`` where git does not tell."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cpu": None if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "swath": swath.__version__,
        "commit": _commit() or commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: a line is no row; a last line that a crash cut short is left out.
    """
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or not {"case", "provider", "status"} <= row.keys():
            raise bad_value(str(path), "lines of JSON with case, provider and status", f"line {number}")
        rows.append(row)
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file in one write, on the disk when this returns: a case is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a+", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def done(path: Path, machine: Row) -> set[str]:
    """Names of the cases that a file has of this machine; an absent file has none.

    Raises:
        ValueError: the file holds rows of another machine, version or commit.
    """
    rows = read(path) if path.exists() else []
    for row in rows:
        differing = [key for key in IDENTITY if row.get(key) != machine[key]]
        if differing:
            key = differing[0]
            raise bad_value(f"resume {path}", f"rows with {key} {machine[key]}", row.get(key))
    return {row["case"] for row in rows}


def measured(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """Rows that have a time, by case and provider; of several the last."""
    return {(row["case"], row["provider"]): row for row in rows if row["status"] == "ok"}


def machine_of(row: Row) -> str:
    """The GPU, or the CPU where there was none."""
    return str(row["gpu"] or row.get("cpu"))


def conditions(rows: Iterable[Row]) -> str:
    """The machines, versions, commits and dates of rows in a sentence."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        driver = f", driver {row['driver']}" if row.get("driver") else ""
        where = f"{machine_of(row)}{driver}, torch {row['torch']}, Triton {row['triton']}, swath {row['swath']}"
        commits = found.setdefault(where, {}).setdefault(row["date"], [])
        commit = row["commit"] or "no commit"
        if commit not in commits:
            commits.append(commit)
    return "; ".join(f"{where} at {_by_day(days)}" for where, days in found.items())


def _by_day(commits: dict[str, list[str]]) -> str:
    return ", and at ".join(f"{' and '.join(names)}, {date}" for date, names in commits.items())


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


def version_of(package: str) -> str | None:
    """The installed version of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
