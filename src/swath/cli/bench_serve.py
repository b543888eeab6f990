"""``swath bench serve``: models of real shapes on a real engine, with swath and with the engine's own attention."""

from __future__ import annotations

import sys
import time
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swath.cli.output import console, fail, one_line_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from swath.bench.results import Row
    from swath.bench.serving.engine import Job, Runner


class Name(str, Enum):
    """Engines."""

    vllm = "vllm"
    sglang = "sglang"


MODELS_OF = {
    "vllm": (
        ("mistral-7b", "bf16", ("swath", "FLASH_ATTN", "TRITON_ATTN")),
        ("mistral-7b", "int8_per_token_head", ("swath", "TRITON_ATTN")),
        ("mistral-7b", "fp8", ("swath", "FLASH_ATTN")),
        ("gpt-oss-20b", "bf16", ("swath", "FLASH_ATTN")),
        ("gemma-3-12b", "bf16", ("swath", "FLASH_ATTN", "TRITON_ATTN")),
    ),
    "sglang": (
        ("mistral-7b", "bf16", ("swath", "fa3", "triton")),
        ("mistral-7b", "fp8", ("swath", "fa3", "triton")),
        ("gpt-oss-20b", "bf16", ("swath", "fa3", "triton")),
        ("gemma-3-12b", "bf16", ("swath", "fa3", "triton")),
    ),
}
DEFAULT = {
    engine: tuple(f"{model}/{cache}/{backend}" for model, cache, backends in models for backend in backends)
    for engine, models in MODELS_OF.items()
}
"""Jobs, by engine."""


def serve(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL/CACHE/BACKEND", show_default="some ten", help="mistral-7b/bf16/swath, ..."),
    ] = None,
    engine: Annotated[Name, typer.Option(help="What serves.")] = Name.vllm,
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="Layers, rounded to the model's period.")] = 8,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="With vLLM's compilation of models, which is off otherwise.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Begin no job that may not end within this.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Append here.")] = Path("swath-bench.jsonl"),
    commit: Annotated[
        str | None, typer.Option(metavar="NAME", envvar="SWATH_COMMIT", help="The commit, where git does not tell.")
    ] = None,
) -> None:
    """Serve models with random weights on an engine, and time prefill and decode with swath and the engine's backends.

    Models are mistral-7b, gpt-oss-20b and gemma-3-12b; mistral-7b:32 has 32 layers. Caches are bf16 and the engine's
    names, such as fp8 and vLLM's int8_per_token_head. Backends are swath and the engine's names, such as vLLM's
    FLASH_ATTN and SGLang's fa3. Before a job is timed, rows of its attention are held to float64.
    """
    with one_line_errors():
        wanted = [job_of(text, layers, compiled) for text in jobs or DEFAULT[engine.value]]
    if compiled and engine is not Name.vllm:
        raise fail(f"--compiled is for vllm, not {engine.value}")
    if find_spec(engine.value) is None:
        raise fail(f"serve needs {engine.value}, which is not installed: pip install 'swath[{engine.value}]'")
    from swath.bench.serving.engine import Load
    from swath.bench.serving.job import in_process
    from swath.cli.bench import command_of

    out, command = console(), command_of(sys.argv[1:])
    runner: Runner = import_module(f"swath.bench.serving.{engine.value}")
    if runner.FORKS:
        runner.prepare()

    def measure(job: Job) -> Row:
        def tell(text: str) -> None:
            out.print(f"{engine.value}, {job.case}, {job.backend}: {text}", style="dim", markup=False)

        return in_process(runner.served(job), Load(), runner, commit, command, tell)

    run_all(wanted, measure, output, budget)


def job_of(text: str, layers: int, compiled: bool = False) -> Job:
    """A job by its three names, of which the model's may say how many layers it has.

    Raises:
        ValueError: there are not three of them, the model is unknown, or its layers are no number.
    """
    from swath.bench.serving.engine import Job
    from swath.bench.serving.models import MODELS
    from swath.errors import bad_value

    named, cache, backend, *more = [*text.split("/"), "", ""]
    if not (cache and backend) or any(more) or text.count("/") != 2:
        raise bad_value("job", "MODEL/CACHE/BACKEND", text)
    name, _, own = named.partition(":")
    if name not in MODELS:
        raise bad_value("model", f"one of {', '.join(MODELS)}", name)
    if own and not (own.isdecimal() and int(own)):
        raise bad_value("layers", "a number of layers behind the colon", own)
    model = MODELS[name]
    return Job(model, model.layers_near(min(int(own or layers), model.depth)), cache, backend, compiled)


def run_all(jobs: list[Job], measure: Callable[[Job], Row], output: Path, budget: float | None) -> None:
    """Measure jobs one by one; each row is in the file before the next begins."""
    from swath.bench.results import append
    from swath.bench.serving.table import in_words

    out, begin = console(), time.monotonic()
    rows: list[Row] = []
    slowest = 0.0
    for job in jobs:
        began = time.monotonic()
        if budget is not None and began - begin + slowest > budget:
            break
        row = measure(job)
        with one_line_errors((OSError,)):
            append(output, [row])
        rows.append(row)
        out.print(f"{row.case}, {row.provider}", style="bold", markup=False)
        out.print(f"  {in_words(row)}", markup=False)
        slowest = max(slowest, time.monotonic() - began)
    left = len(jobs) - len(rows)
    typer.echo(
        f"{len(rows)} row{'s' * (len(rows) != 1)} written to {output}{f'; no time for {left} more' if left else ''}"
    )
    bad = [f"{row.case}, {row.reason}" for row in rows if row.provider == "swath" and row.status != "ok"]
    if bad:
        raise fail(f"swath itself was refused or failed: {'; '.join(bad)}")
