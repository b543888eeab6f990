"""What a process has set for torch changes no bit of a result: a call is the same under each of these states."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

from conftest import PORTABLE
from swath import KVQuant, Window, append_kv, dispatch, merge_states, slots
from swath.target import interpreting
from swath.testing import Case, Inputs

Prepare = Callable[[Case], Inputs]

E4M3 = KVQuant(torch.float8_e4m3fn, "token")
CASES = {
    "paged": Case(
        (70, 33), (20, 3), size=18, global_tokens=4, dtype=torch.float32, quant=E4M3, sink="fp32", holes=True
    ),
    "dense": Case((70, 33), (20, 3), size=18, dense=True, softcap=5.0),
    "int8": Case((70, 33), 2, quant=KVQuant(torch.int8, "channel"), compute="int8"),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[str], AbstractContextManager[object]]] = {
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "default dtype bfloat16": lambda device: default_dtype(torch.bfloat16),
    "default dtype float64": lambda device: default_dtype(torch.float64),
    "default device": lambda device: torch.device("meta"),
    "inference mode": lambda device: torch.inference_mode(),
    "no gradients": lambda device: torch.no_grad(),
    "deterministic": lambda device: deterministic(),
}


def forget() -> None:
    """Empty every cache of the package's modules, so that what they hold is made anew."""
    for name, module in list(sys.modules.items()):
        if name.startswith("swath."):
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def results(inputs: Inputs, impl: str) -> list[Tensor]:
    """Out and LSE of a case; with them, where the operators have the backend, a merge and an appended cache.

    The cache is then as it was.
    """
    made = list(inputs.run(impl))
    if impl in dispatch.backends("merge"):
        made += merge_states(made[0], made[1], made[0], made[1], impl=impl)
    if impl in dispatch.backends("append") and not inputs.case.dense:
        cache = inputs.cache
        k = torch.linspace(-3, 3, 2 * cache.num_kv_heads * cache.head_dim, dtype=torch.float32, device=cache.k.device)
        k = k.view(2, cache.num_kv_heads, cache.head_dim)
        where = slots(inputs.block_table, inputs.seq_lens, cache.page_size, num_tokens=2)
        parts = [x.view(torch.uint8) for x in cache.tensors if x is not None]
        before = [x.clone() for x in parts]
        append_kv(cache, k, k, where, impl=impl)
        made += [x.clone() for x in parts]
        for x, old in zip(parts, before, strict=True):
            x.copy_(old)
    return made


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CASES)
def test_no_state_of_torch_changes_a_result(name: str, state: str, prepare: Prepare, impl: str, device: str) -> None:
    """Nor does what a first call under it has left behind for later ones."""
    inputs = prepare(CASES[name])
    want = results(inputs, impl)
    forget()
    with STATES[state](device):
        under = results(inputs, impl)
    assert_same([x.cpu() for x in under], [x.cpu() for x in want])
    assert_same(results(inputs, impl), want)


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_meet(name: str, prepare: Prepare, impl: str) -> None:
    """Calls of several threads at once, some of which have states of their own."""
    if interpreting() and impl not in PORTABLE:
        pytest.skip("Triton's interpreter runs one kernel at a time")
    inputs = prepare(CASES[name])
    want = [x.clone() for x in inputs.run(impl)]
    forget()

    def call(i: int) -> list[Tensor]:
        with torch.autocast(inputs.q.device.type, torch.bfloat16, enabled=i % 2 == 1):
            return list(inputs.run(impl))

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(call, range(12)):
            assert_same(got, want)


def run_into(inputs: Inputs, impl: str, place: list[Tensor]) -> None:
    """In a child: fill tensors in shared memory with the results."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for x, made in zip(place, inputs.run(impl), strict=True):
        x.copy_(made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("name", CASES)
def test_a_forked_child_computes_the_same(name: str, prepare: Prepare, impl: str) -> None:
    if impl not in PORTABLE:
        pytest.skip("CUDA does not survive a fork")
    inputs = prepare(CASES[name])
    want = list(inputs.run(impl))
    place = [torch.zeros_like(x).share_memory_() for x in want]
    child = multiprocessing.get_context("fork").Process(target=run_into, args=(inputs, impl, place))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert_same(place, want)


def test_nothing_of_a_call_stays_alive(prepare: Prepare, impl: str) -> None:
    """What is remembered of calls holds no tensor, no window, and no subclass of Window."""
    inputs = prepare(Case((70, 33), 1))

    def call() -> list[weakref.ref[object]]:
        class OwnWindow(Window):
            pass

        window = OwnWindow(18, torch.ones(2, dtype=torch.int32, device=inputs.q.device))
        inputs.run(impl, window=window)
        return [weakref.ref(x) for x in (OwnWindow, window, window.global_tokens)]

    left = call()
    gc.collect()
    assert [ref() for ref in left] == [None] * 3
