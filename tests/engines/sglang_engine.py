"""One run of SGLang's ``Engine`` on a CPU, in a process of its own: ``python sglang_engine.py JOB.json ANSWERS.json``.

A job is ``{"engine": {arguments}, "calls": [[prompt, ...], ...], "new_tokens": n}``, with prompts as token ids. Each
answer is ``[tokens, logprobs of the likeliest ones at each, cached tokens]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SERVER: dict[str, Any] = dict(
    device="cpu", attention_backend="swath", skip_tokenizer_init=True, dtype="float32", disable_cuda_graph=True,
    disable_overlap_schedule=True, max_total_tokens=2048, max_running_requests=8, chunked_prefill_size=64,
    sampling_backend="pytorch", grammar_backend="none", mem_fraction_static=0.3, log_level="info", random_seed=0,
)  # fmt: skip


def main(job: Path, answers: Path) -> None:
    """Run the job and write its answers."""
    import sglang

    asked = json.loads(job.read_text())
    engine = sglang.Engine(**SERVER | asked["engine"])
    greedy = dict(temperature=0.0, max_new_tokens=asked["new_tokens"], ignore_eos=True)
    made = []
    for prompts in asked["calls"]:
        made += engine.generate(input_ids=prompts, sampling_params=greedy, return_logprob=True, top_logprobs_num=5)
    answers.write_text(json.dumps([answer(x) for x in made]))
    engine.shutdown()


def answer(made: dict[str, Any]) -> list[Any]:
    """What a test needs of an answer of ``Engine.generate``."""
    meta = made["meta_info"]
    likely = [{token: logprob for logprob, token, _ in step} for step in meta["output_top_logprobs"]]
    return [made["output_ids"], likely, meta["cached_tokens"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
