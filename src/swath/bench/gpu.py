"""``swath bench gpu``: check each case against the reference, then time it and compare with its floor.

The floor is the larger of two times: the bytes that must move over the read bandwidth, and the arithmetic of both
matrix products over the rate of a large one, both measured in the same run.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

import swath
from swath.bench.cases import CASES, BenchCase, make_call
from swath.bench.clock import Flush, as_graph, device_us, host_us, matmul_tflop_per_s, read_tb_per_s

SAMPLED_ROWS = 6
MAX_ERROR = 1e-2
"""Relative error of a sampled row, in norm, beyond which no time is reported; bf16 results are near 2e-3."""


def measure(cases: tuple[BenchCase, ...] = CASES, rounds: int = 21) -> Iterator[dict[str, Any]]:
    """Result rows, the first one describing the machine and its ceilings."""
    device = torch.device("cuda")
    flush = Flush(device)
    machine = describe() | {"read_tb_per_s": read_tb_per_s(flush), "matmul_tflop_per_s": matmul_tflop_per_s()}
    yield machine
    for case in cases:
        yield _measure_case(case, machine, flush, rounds)
        torch.cuda.empty_cache()


def describe() -> dict[str, Any]:
    """The machine and the versions."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "swath": swath.__version__,
        "commit": commit.strip() or None,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _measure_case(case: BenchCase, machine: dict[str, Any], flush: Flush, rounds: int) -> dict[str, Any]:
    op, args, options = make_call(case, torch.device("cuda"))
    function: Callable[..., Any] = getattr(swath, op)

    def run() -> Tensor:
        out: Tensor = function(*args, **options)
        return out

    bytes_us = case.nbytes() / machine["read_tb_per_s"] / 1e6
    math_us = case.flops() / machine["matmul_tflop_per_s"] / 1e6
    row: dict[str, Any] = {"case": case.name, "floor_us": max(bytes_us, math_us), "bound": "bytes"}
    if math_us > bytes_us:
        row["bound"] = "matmul"
    row["error"] = worst_error(case, op, args, options, run())
    if not row["error"] <= MAX_ERROR:
        return row | {"refused": f"a sampled row is off by {row['error']:.1e}, over {MAX_ERROR}"}
    decode = case.kind == "decode"
    times = device_us(as_graph(run) if decode else run, rounds, flush)
    row |= {"us": median(times), "us_p10_p90": [quantiles(times, n=10)[0], quantiles(times, n=10)[-1]]}
    row["x_floor"] = row["us"] / row["floor_us"]
    row["tflop_per_s"], row["tb_per_s"] = case.flops() / row["us"] / 1e6, case.nbytes() / row["us"] / 1e6
    if decode:
        row["eager_us"], row["host_us"] = median(device_us(run, rounds, flush)), host_us(run)
    row["launch"] = swath.explain(op, *args, **options).launch
    return row


def worst_error(case: BenchCase, op: str, args: tuple[Any, ...], options: dict[str, Any], out: Tensor) -> float:
    """The largest relative error (norm over a head) of some rows against the float64 reference."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(SAMPLED_ROWS):
        b = int(torch.randint(case.batch, (), generator=generator))
        i = int(torch.randint(case.q_len, (), generator=generator))
        truth = _one_row(case, op, args, options, b, i).double()
        mine = (out if out.dim() == 3 else out.flatten(0, 1))[b * case.q_len + i].double()
        worst = max(worst, float(((mine - truth).norm(dim=-1) / truth.norm(dim=-1)).max()))
    return worst


def _one_row(case: BenchCase, op: str, args: tuple[Any, ...], options: dict[str, Any], b: int, i: int) -> Tensor:
    """Row i of sequence b by the reference: the same keys, one query with its position given."""
    position = torch.tensor([case.kv_len - case.q_len + i], dtype=torch.int32, device="cuda")
    keep = {name: options[name] for name in ("window", "sink") if name in options}
    q = args[0] if args[0].dim() == 3 else args[0].flatten(0, 1)
    one = q[b * case.q_len + i][None]
    if op == "paged_attention":
        _, cache, table, lens = args
        out: Tensor = swath.paged_attention(  # type: ignore[assignment]
            one, cache, table[b : b + 1], lens[b : b + 1], q_start=position, impl="reference", **keep
        )
        return out[0]
    k, v = (x[b * case.kv_len : (b + 1) * case.kv_len] for x in args[1:3])
    ends = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    dense: Tensor = swath.attention(  # type: ignore[assignment]
        one, k, v, ends, ends * case.kv_len, q_start=position, impl="reference", **keep
    )
    return dense[0]


def write(rows: Iterator[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Append each row to a file of JSON lines as it comes, so that an interrupted run keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row
