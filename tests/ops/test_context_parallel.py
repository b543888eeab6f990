"""The example of a context that ranks share: it compares itself with one pass over the whole context."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from conftest import python_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "context_parallel.py"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_ranks_together_are_one_pass() -> None:
    environment = {**python_environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("2 ranks on cpu: 4 steps, ")
