"""Fixtures: every operator test runs once for each backend that exists, on the device that suits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

import interpreter
import swath
from swath import dispatch, target
from swath.backends.triton.heuristics import Heuristics
from swath.bench.clock import CpuClock
from swath.errors import bad_value
from swath.problem import Problem
from swath.target import Target
from swath.testing import Case, Inputs, make

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("steady")

OPS = ("attention", "append", "quantise", "merge")
"""Operators that have backends, by the names of their modules."""

PORTABLE = ("reference", "cpu")
"""Backends that must run every case, so that a skip of theirs is a failure."""


def impls(op: str) -> list[str]:
    """The backends of an operator, slowest first: those with a module for it, so that a new one joins by itself.

    Raises:
        ValueError: ``op`` is not in ``OPS``. Tests parametrised by an empty list would be skipped in silence.
    """
    if op not in OPS:
        raise bad_value("op", f"one of {', '.join(OPS)}", repr(op))
    return [name for name in reversed(dispatch.BACKENDS) if find_spec(f"swath.backends.{name}.{op}")]


def each_backend(op: str, but: Collection[str] = ()) -> pytest.MarkDecorator:
    """Run a test, or as ``pytestmark`` a file of tests, with ``impl`` each backend of ``op`` except those in ``but``.

    A test that takes ``impl`` without this runs for each backend of attention.
    """
    return pytest.mark.parametrize("impl", [name for name in impls(op) if name not in but], indirect=True)


def plan_for(backend: str, problem: Problem, target: Target, heuristics: Heuristics | None = None) -> Any:
    """The launches of a call by a backend that has kernels, on a target that need not be here; by its own heuristics
    or by others."""
    runner = import_module(f"swath.backends.{backend}.attention").runner
    return runner.plan_for(problem, target, heuristics or runner.heuristics)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--variants", choices=("suite", "pairs", "all"), default="suite", help="which kernel variants to compile"
    )


@pytest.fixture
def which_variants(request: pytest.FixtureRequest) -> str:
    """Which kernel variants the run asks for."""
    return str(request.config.getoption("--variants"))


LONGEST = (
    "test_kernels_compile", "test_every_pair_of_values_is_read_by_triton", "test_every_case_is_right",
    "test_on_the_real_model", "test_the_pages_pass_strict", "test_calls_that_were_wrong_on_an_h200",
)  # fmt: skip
"""How the names of tests begin that take a core ten seconds to a minute each: begun last, one of them would keep a
process busy while the others have nothing left."""


def longest_first(items: list[Any], is_long: Callable[[Any], bool], processes: int) -> list[Any]:
    """The tests in an order that xdist cuts into shares of one length: each share begins with as many long tests.

    When a process is done with its share, it takes the last half of what another one has left, but not its last two
    tests: a minute each, if one share had all the long ones.
    """
    long, others = ([item for item in items if is_long(item) == wanted] for wanted in (True, False))
    ordered: list[Any] = []
    for i in range(processes):
        share, own = (len(items) - len(ordered)) // (processes - i), long[i::processes]
        room = max(share - len(own), 0)
        ordered += own + others[:room]
        del others[:room]
    return ordered


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = longest_first(items, lambda item: item.name.startswith(LONGEST), processes)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


class SmallClock(CpuClock):
    """A clock that is quick to make: its own ceilings take no time."""

    matmul_size = 64
    stream_bytes = 1 << 16


@pytest.fixture(scope="session", autouse=True)
def hasten_triton_interpreter() -> Iterator[None]:
    """Tests under TRITON_INTERPRET=1 take a tenth of their time so."""
    with interpreter.hastened() if target.interpreting() else nullcontext():
        yield


@pytest.fixture(params=impls("attention"))
def impl(request: pytest.FixtureRequest) -> str:
    """The name of a backend: of paged attention, unless a test file says otherwise."""
    name: str = request.param
    if name not in PORTABLE and not (torch.cuda.is_available() or target.interpreting()):
        pytest.skip(f"{name} needs a GPU, or TRITON_INTERPRET=1")
    return name


@pytest.fixture
def device(impl: str) -> str:
    """Where the backend's tensors live."""
    return "cuda" if impl not in PORTABLE and torch.cuda.is_available() else "cpu"


Prepare = Callable[..., Inputs]
"""What the fixture ``prepare`` gives: a function of a case, and of a seed."""


@pytest.fixture
def prepare(impl: str, device: str) -> Prepare:
    """``make`` for this backend; skips with the backend's own reason where it cannot run the case."""

    def prepare(case: Case, seed: int = 0) -> Inputs:
        inputs = make(case, device, seed)
        skip_unless_able(impl, inputs.why_not(impl))
        return inputs

    return prepare


def check(inputs: Inputs, impl: str) -> None:
    """Run a backend and hold every element to its error budget."""
    inputs.check(*inputs.run(impl))


def skip_unless_able(impl: str, reason: str | None) -> None:
    """Skip with the backend's reason; the portable backends may have none."""
    if reason is not None:
        if impl in PORTABLE:
            pytest.fail(f"{impl} must run every case, but says: {reason}")
        pytest.skip(f"{impl}: {reason}")


def truncates_bf16(impl: str, device: str) -> bool:
    """Triton's interpreter cuts fp32 to bf16 where every GPU rounds: its last bit may differ by one."""
    return impl not in PORTABLE and device == "cpu"


def python_environment() -> dict[str, str]:
    """The environment of a fresh interpreter that finds the same swath, installed or not."""
    source = str(Path(swath.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}


Capture = Callable[[Callable[[], Any]], AbstractContextManager[Any]]
"""What the fixture ``captured`` gives: from a call to its CUDA graph."""


@pytest.fixture
def captured() -> Capture:
    """Captures a call that has run twice before on a side stream."""

    @contextmanager
    def captured(call: Callable[[], Any]) -> Iterator[torch.cuda.CUDAGraph]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        yield graph

    return captured
