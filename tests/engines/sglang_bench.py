"""``swath bench serve`` with the real SGLang on a CPU, in a process of its own.

    python sglang_bench.py MODEL BACKEND ROW.json

The model is tiny, the traffic little, and pages have one token: for larger ones SGLang allocates with kernels for GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from swath.bench.machine import describe
from swath.bench.serving import check, measure, models, sglang, traffic
from swath.bench.serving.engine import Job, Load
from swath.bench.serving.models import MODELS

LOAD = Load(prompts=2, prompt_len=192, sequences=4, context=128, new_tokens=60)
TINY = dict(hidden_size=256, intermediate_size=256, dtype="bfloat16", max_position_embeddings=4096)


def main(name: str, backend: str, row: Path) -> None:
    """Run one job and write its row."""
    torch.set_num_threads(1)
    sglang.PAGE, check.LENGTHS = 1, (5, 33, 150, 100)
    measure.MOST_GRAPHED = sglang.MOST_GRAPHED = 8
    sglang.MOST_REQUESTS = 16
    traffic.VOCABULARY = models.COMMON["vocab_size"] = 512
    model = MODELS[name]
    experts = dict(num_local_experts=4, num_experts_per_tok=2) if "num_local_experts" in model.own else {}
    model = replace(model, num_q_heads=4, num_kv_heads=2, head_dim=64, window=64, own=model.own | TINY | experts)
    job = sglang.served(Job(model, model.period * 2, "bf16", backend))
    sglang.prepare()
    for module in list(sys.modules.values()):  # SGLang asks for backends of its own whether Triton is there
        if module.__name__.startswith("sglang.") and hasattr(module, "support_triton"):
            module.support_triton = lambda backend: False
    made = measure.measure(job, LOAD, sglang.start, describe(torch.device("cpu"), None, "test"), print)
    row.write_text(json.dumps(asdict(made)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # the scheduler's thread does not end
