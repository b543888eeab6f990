"""A run in processes of its own: one that dies or hangs is a finding, and the others go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized

import torch

from swath.testing.fuzz.calls import call_of
from swath.testing.fuzz.sweep import DeviceLostError, Finding, Settings, Tally, quick_interpreter, seed_at, sweep
from swath.testing.fuzz.verdict import Verdict

CALLS_A_PROCESS = 5000
"""Then a new process takes over, so that caches of compiled kernels and of signatures are freed."""
POLL_S = 0.2
REPORT_S = 30.0
LOST = 3
"""How a process ends that has sent a finding after which its device is of no use."""

Lot = tuple[int, int]
"""The calls ``start .. end - 1`` of a run."""


@dataclass(frozen=True)
class Run:
    """What is asked for: the first seed, how many calls until when, and how they are spread.

    until: of ``time.monotonic``. patience_s: a process that has been at one call for longer is ended.
    """

    seed: int
    calls: int
    per_variant: int
    processes: int
    settings: Settings
    until: float = float("inf")
    patience_s: float = 600.0

    def lots(self) -> Iterator[Lot]:
        """Calls for one process after the other: whole variants, something for every process."""
        share = min(CALLS_A_PROCESS, -(-self.calls // self.processes))
        step = max(share // self.per_variant, 1) * self.per_variant
        for start in range(0, self.calls, step):
            yield start, min(start + step, self.calls)

    def seed_at(self, n: int) -> int:
        """The seed of call ``n``."""
        return seed_at(n, self.seed, self.per_variant)


def work(run: Run, lot: Lot, at: Synchronized[int], sender: Connection) -> None:
    """Judge the calls of a lot and send what comes: findings as they are found, the tally at the end."""
    torch.set_num_threads(1)

    def watch(_seed: int, finding: Finding | None) -> None:
        if finding is None:
            at.value += 1
        else:
            sender.send(finding)

    seeds = takewhile(lambda _: time.monotonic() < run.until, map(run.seed_at, range(*lot)))
    try:
        with quick_interpreter():
            tally = sweep(seeds, run.settings, watch)
    except DeviceLostError:
        sys.exit(LOST)
    tally.findings = []
    sender.send(tally)


@dataclass
class Worker:
    """A process at work on a lot; ``at`` is the call that it is at, one before the first until it begins."""

    process: SpawnProcess
    receiver: Connection
    at: Synchronized[int]
    lot: Lot
    since: float = field(default_factory=time.monotonic)
    last: int = -1
    finished: bool = False

    def is_stuck(self, patience_s: float) -> bool:
        """Whether it has been at one call for too long."""
        if self.at.value != self.last:
            self.last, self.since = self.at.value, time.monotonic()
        return time.monotonic() - self.since > patience_s

    def begun(self) -> int:
        """Calls that it has begun."""
        return max(self.at.value - self.lot[0] + 1, 0)


class Team:
    """The processes of a run."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self.run, self.tell, self.tally = run, tell, Tally()
        self.context = get_context("spawn")
        self.workers: list[Worker] = []
        self.lots, self.again = run.lots(), list[Lot]()
        self.began = self.told = time.monotonic()

    def finish(self) -> Tally:
        """Run to the end: of the calls, of the time, or of patience with findings."""
        try:
            self._hire()
            while self.workers and len(self.tally.findings) < self.run.settings.most:
                time.sleep(POLL_S)
                for worker in self.workers:
                    self._look_after(worker)
                self.workers = [worker for worker in self.workers if not worker.finished]
                self._hire()
                self._report()
        finally:
            for worker in self.workers:
                worker.process.kill()
                self.tally.calls += worker.begun()
        return self.tally

    def _hire(self) -> None:
        while len(self.workers) < self.run.processes and time.monotonic() < self.run.until:
            lot = self.again.pop() if self.again else next(self.lots, None)
            if lot is None:
                return
            at = self.context.Value("q", lot[0] - 1)
            receiver, sender = self.context.Pipe(duplex=False)
            process = self.context.Process(target=work, args=(self.run, lot, at, sender), daemon=True)
            process.start()
            sender.close()
            self.workers.append(Worker(process, receiver, at, lot))

    def _look_after(self, worker: Worker) -> None:
        """Take what a process has sent; one that ended without a tally leaves the rest of its lot to another."""
        ended = not worker.process.is_alive()  # asked first: what it sent before its end is read below
        try:
            while worker.receiver.poll():
                self._take(worker, worker.receiver.recv())
        except EOFError:
            ended = True
        if worker.finished:
            worker.process.join()
        elif ended:
            worker.process.join()
            code = worker.process.exitcode
            self._give_up(worker, None if code == LOST else f"the process ended with exit code {code}")
        elif worker.is_stuck(self.run.patience_s):
            worker.process.kill()
            worker.process.join()
            self._give_up(worker, f"no answer in {self.run.patience_s:g} s")

    def _take(self, worker: Worker, sent: Finding | Tally) -> None:
        if isinstance(sent, Finding):
            self._found(sent)
        else:
            worker.finished = True
            self.tally.add(sent)

    def _give_up(self, worker: Worker, fault: str | None) -> None:
        """End with a worker whose process is gone; a new one goes on after the call that it was at."""
        if worker.begun() == 0:
            raise RuntimeError(f"{fault}, before its first call")
        n, settings = worker.at.value, self.run.settings
        if fault is not None:
            seed = self.run.seed_at(n)
            call = call_of(seed, settings.sizes, settings.extreme, settings.impl)
            self._found(Finding(call, Verdict(settings.impl, "end", fault), call, settings.command(seed)))
        self.tally.calls += worker.begun()
        worker.finished = True
        if n + 1 < worker.lot[1]:
            self.again.append((n + 1, worker.lot[1]))

    def _found(self, finding: Finding) -> None:
        self.tally.findings.append(finding)
        self.tell(str(finding))

    def _report(self) -> None:
        now = time.monotonic()
        if now - self.told > REPORT_S:
            self.told = now
            calls = self.tally.calls + sum(worker.begun() for worker in self.workers)
            rate = calls / (now - self.began)
            self.tell(f"{calls:,} calls in {now - self.began:.0f} s, {rate:.1f}/s; {len(self.tally.findings)} findings")
