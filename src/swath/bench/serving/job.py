"""Jobs in processes of their own: an engine keeps its memory and its state for as long as its process lives."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection

import torch

from swath.bench.machine import describe
from swath.bench.results import Row
from swath.bench.serving.engine import Job, Load, Runner
from swath.bench.serving.measure import Tell, measure, new_row

REASON_LENGTH = 300


def in_process(job: Job, load: Load, runner: Runner, commit: str | None, command: str, tell: Tell) -> Row:
    """The row of a job that runs in a copy of this process, which must not have touched the GPU yet.

    Raises:
        RuntimeError: the process died before it knew its machine.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, job, load, runner, commit, command, tell))
    process.start()
    theirs.close()
    row: Row | None = None
    try:
        while True:
            row = ours.recv()
    except EOFError:
        process.join()
    if row is None:
        raise RuntimeError(f"the process of {job.case}, {job.backend}, ended with {process.exitcode}")
    if row.status == "failed" and row.reason is None:
        row.reason = f"its process ended with {process.exitcode}"
    return row


def _run(
    results: Connection, job: Job, load: Load, runner: Runner, commit: str | None, command: str, tell: Tell
) -> None:
    """Send a row that says nothing, then the one that counts."""
    origin = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"), commit, command)
    row = new_row(job, load, origin)
    results.send(row)
    try:
        row.version = runner.prepare()
        row = measure(job, load, runner.start, origin, tell)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is a result, stored and printed
        traceback.print_exc()
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:REASON_LENGTH]}"
    results.send(row)
