"""``swath bench serve`` with the real SGLang, on a CPU: run by ``make test-sglang`` in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).parent


@pytest.mark.parametrize(("model", "backend"), [("mistral-7b", "swath"), ("gpt-oss-20b", "swath")])
def test_the_benchmark_serves(model: str, backend: str, tmp_path: Path) -> None:
    """SGLang's scheduler, run by the benchmark, is checked and timed."""
    command = [sys.executable, str(HERE / "sglang_bench.py"), model, backend, str(tmp_path / "row")]
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=900, check=False, cwd=tmp_path)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    row = json.loads((tmp_path / "row").read_text())
    print(f"{row['case']}, {row['provider']}: {row['status']}, error {row['error']:.1e}")
    assert row["status"] == "ok", row["reason"]
    assert row["checked_calls"] > 4
    assert row["decode_tokens_per_s"] > 0
