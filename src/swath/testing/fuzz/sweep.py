"""Many calls, one after another: what ran, and what was found."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch

from swath.target import interpreting
from swath.testing.fuzz.calls import call_of
from swath.testing.fuzz.draw import CALLS_A_VARIANT, Call
from swath.testing.fuzz.judge import judge
from swath.testing.fuzz.promises import PROMISES
from swath.testing.fuzz.shrink import shrunk
from swath.testing.fuzz.verdict import Verdict


@dataclass(frozen=True)
class Settings:
    """What a seed does not say: where calls run, how large they are, and how long a failing one is shrunk.

    impl: the backend, or "auto". device: of the tensors. sizes: a name of ``draw.SIZES``. extreme: numbers at the ends
    of their types too. tries: calls that may be spent on a simpler one. most: findings after which a sweep ends.
    """

    impl: str = "auto"
    device: str = "cpu"
    sizes: str = "medium"
    extreme: bool = False
    tries: int = 60
    most: int = 20

    def command(self, seed: int) -> str:
        """What repeats one call."""
        parts = ["python -m swath.testing.fuzz", f"--seed {seed} --calls 1 --backend {self.impl}"]
        parts += [f"--device {self.device} --sizes {self.sizes}", *(["--extreme"] if self.extreme else [])]
        return " ".join(parts)


@dataclass(frozen=True)
class Finding:
    """A call that failed, and the simplest one found that fails in the same way."""

    call: Call
    verdict: Verdict
    simplest: Call
    command: str

    def __str__(self) -> str:
        lines = [f"seed {self.call.seed} on {self.verdict.backend}: {self.verdict.kind}: {self.verdict.fault}"]
        lines.append(f"  call      {self.call}")
        if self.simplest != self.call:
            lines.append(f"  simplest  {self.simplest}")
        lines.append(f"  repeat    {self.command}")
        return "\n".join(lines)


@dataclass
class Tally:
    """What a sweep did. options: calls that ran, by option and value. worst: used of a budget, and its seed."""

    calls: int = 0
    refused: int = 0
    backends: Counter[str] = field(default_factory=Counter)
    options: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    worst: tuple[float, int] = (0.0, 0)

    def add(self, other: Tally) -> None:
        """Count another sweep in."""
        self.calls += other.calls
        self.refused += other.refused
        self.backends += other.backends
        self.options += other.options
        self.findings += other.findings
        self.worst = max(self.worst, other.worst)

    def count(self, call: Call, verdict: Verdict) -> None:
        """Count one call."""
        self.calls += 1
        if not verdict.backend:
            self.refused += 1
            return
        self.backends[verdict.backend] += 1
        self.options.update(described(call))
        self.worst = max(self.worst, (verdict.used, call.seed))


class DeviceLostError(Exception):
    """A call has left the device unusable for this process."""


def seed_at(n: int, first: int, per_variant: int) -> int:
    """The seed of call ``n`` of a run: ``per_variant`` numbers of each variant, from ``first`` on."""
    return first + n // per_variant * CALLS_A_VARIANT + n % per_variant


def sweep(
    seeds: Iterable[int], settings: Settings, watch: Callable[[int, Finding | None], None] | None = None
) -> Tally:
    """Judge the calls of these seeds.

    ``watch`` is told of each seed before its call, and of each finding.

    Raises:
        DeviceLostError: after a finding that left the device unusable.
    """
    tally = Tally()
    for seed in seeds:
        if watch is not None:
            watch(seed, None)
        call = call_of(seed, settings.sizes, settings.extreme, settings.impl)
        verdict = judge(call, settings.impl, settings.device)
        tally.count(call, verdict)
        if verdict.kind:
            finding = examined(call, verdict, settings)
            tally.findings.append(finding)
            if watch is not None:
                watch(seed, finding)
            if is_lost(settings.device):
                raise DeviceLostError
            if len(tally.findings) >= settings.most:
                break
    return tally


def examined(call: Call, verdict: Verdict, settings: Settings) -> Finding:
    """A failing call as a finding, with a simpler one where the device still works."""

    def fails(other: Call) -> bool:
        return not is_lost(settings.device) and judge(other, settings.impl, settings.device).kind == verdict.kind

    return Finding(call, verdict, shrunk(call, fails, settings.tries), settings.command(call.seed))


def is_lost(device: str) -> bool:
    """Whether a GPU answers no more, as after a stray access."""
    if not device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Patches that make Triton's interpreter bearable, where the tests' module that has them is on the path."""
    if not interpreting():
        yield
        return
    found = find_spec("interpreter") is not None
    patches = import_module("interpreter").hastened() if found else nullcontext()
    with patches, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN that is there on purpose
        yield


def described(call: Call) -> Iterator[tuple[str, str]]:
    """The options of a call and their values, as the report counts them."""
    case = call.case
    yield "function", call.op
    yield "dtype", _word(case.dtype)
    if not case.dense and call.op != "merge_states":
        storage = case.storage
        yield "cache", _word(storage.dtype)
        yield "scales of K, V", f"{storage.k}, {storage.v_granularity}"
        yield from (("layout", case.layout), ("page_size", str(case.page_size)), ("table", case.table))
    yield from (("head_dim", str(case.head_dim)), ("kv heads", str(case.num_kv_heads)), ("group", str(case.group)))
    if not call.op.endswith("attention"):
        return
    yield "queries", "ragged" if case.ragged else "decode" if case.q_lens == 1 else "n-step"
    leading = "tensor" if isinstance(case.global_tokens, tuple) else "int" if case.global_tokens else "none"
    yield "window", str(case.ranges) or ("none" if case.size is None else "empty" if case.size == 0 else "sized")
    yield "leading tokens", leading if case.max_global_tokens is None else "tensor, bounded"
    yield from (("causal", str(case.causal)), ("gqa", case.gqa), ("sink", case.sink), ("bounds", case.bounds))
    yield "soft cap", "yes" if case.softcap else "no"
    yield "scale", "given" if case.scale is not None else "default"
    yield "q_start", "given" if case.q_start is not None else "none"
    yield "split_size", str(case.split_size)
    yield "compute", case.compute
    yield "q_scale", case.q_scale
    for name in ("strided", "spiked", "holes"):
        if getattr(case, name):
            yield "malice", name
    if case.tail:
        yield "malice", "tail"
    yield from (("promises" if name in PROMISES else "malice", name) for name in call.twists)


def _word(value: object) -> str:
    return str(value).removeprefix("torch.")
