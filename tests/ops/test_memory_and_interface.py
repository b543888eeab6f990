"""What the library was asked for, line by line: memory (21 to 30), interface (31 to 39), performance (40, 41).

Each test is named after its line; test_requirements.py holds lines 1 to 20, test_requirements_gpu.py
what only a GPU can show. No test here measures time: what lines 40
and 41 ask of the clock is a benchmark's business, what they ask of the work done is tested.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from options import DENSE, PAGED, alone, in_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from wrong_calls import WRONG

import swath
from conftest import impls
from swath import KVQuant, PagedKV, Window, append_kv, attention, merge_states, paged_attention, slots
from swath.testing import Case, Inputs, make

Prepare = Callable[[Case], Inputs]

INT8_TOKEN, INT8_CHANNEL = KVQuant(torch.int8, "token"), KVQuant(torch.int8, "channel")
SOURCE = Path(swath.__file__).parent
serving = pytest.mark.parametrize("impl", [name for name in impls("attention") if name != "reference"], indirect=True)


def check(inputs: Inputs, impl: str) -> None:
    inputs.check(*inputs.run(impl))


class Memory(TorchDispatchMode):
    """Bytes of the storages that torch makes meanwhile: the largest, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
        result = op(*args, **(kwargs or {}))
        for made in tensors_in(result):
            if made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
                self.total += made.untyped_storage().nbytes()
        return result


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from tensors_in(part)
    elif isinstance(x, dict):
        yield from tensors_in(tuple(x.values()))


def memory_of(inputs: Inputs, impl: str) -> Memory:
    """What the cpu backend allocates (Triton's interpreter copies for itself; test_requirements_gpu.py asks the GPU).

    The mode stands inside the public function, which would pass its call on to the dispatcher.
    """
    from swath.dispatch import choose
    from swath.ops import paged as call

    problem = call.prepare(*inputs.args, **inputs.options)
    backend = choose("attention", problem, impl)
    with Memory() as memory:
        backend.run(problem)
    return memory


@pytest.mark.parametrize("case", [Case(), Case(q_lens=5), Case(q_lens=(5, 0, 40)), Case(q_lens=(5, 0, 40), dense=True)],
                         ids=str)  # fmt: skip
def test_r21_strides_come_from_the_tensors(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(replace(case, strided=True))
    assert not inputs.q.is_contiguous()
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


@pytest.mark.parametrize("layout", ["padded", "packed", "nhd"])
@pytest.mark.parametrize("quant", [None, INT8_TOKEN], ids=["bf16", "int8"])
@pytest.mark.parametrize("q_lens", [1, (60, 1, 2)], ids=str)
def test_r22_cache_views_with_other_strides(
    q_lens: int | tuple[int, ...], quant: KVQuant | None, layout: str, prepare: Prepare, impl: str
) -> None:
    check(prepare(Case(q_lens=q_lens, quant=quant, layout=layout, size=30)), impl)


@pytest.mark.parametrize("steps", [3, 5, 6, 7])
def test_r23_steps_that_are_no_power_of_two(steps: int, prepare: Prepare, impl: str) -> None:
    """Loads and stores are masked: the rows around out survive."""
    inputs = prepare(Case(q_lens=steps, group=3, size=20))
    canary = inputs.canary()
    inputs.check(*inputs.run(impl, out=canary.out))
    assert canary.broken() == 0


@pytest.mark.parametrize("entry", [-1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("q_lens", [1, 4, (60, 1, 2)], ids=str)
def test_r25_hostile_entries_are_never_read(
    q_lens: int | tuple[int, ...], entry: int, prepare: Prepare, impl: str
) -> None:
    """Pages without a visible key are poison, and every entry that names none of the pool is ``entry``."""
    inputs = prepare(Case((170, 33, 129), q_lens, size=30))
    table = inputs.block_table
    table[(table < 0) | (table >= inputs.cache.num_pages)] = entry
    check(inputs, impl)


def in_a_large_pool(inputs: Inputs, num_pages: int) -> Inputs:
    """The same pages at the end of a pool of others, all poison."""
    own, table = inputs.cache.num_pages, inputs.block_table
    exists = (table >= 0) & (table < own)
    moved = torch.where(exists, table + num_pages - own, -1)
    return replace(inputs, keys=at_the_end(inputs.cache, num_pages), block_table=moved)


def at_the_end(cache: PagedKV, num_pages: int) -> PagedKV:
    """The pages of a cache, and their token scales, after others to make ``num_pages``."""

    def enlarged(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() < 3:
            return x
        pool = torch.full((num_pages, *x.shape[1:]), -128, dtype=x.dtype, device=x.device)
        pool[-cache.num_pages :] = x
        return pool

    return PagedKV(*map(enlarged, (cache.k, cache.v, cache.k_scale, cache.v_scale)))


@serving
def test_r26_int8_prefill_touches_the_referenced_pages_only(prepare: Prepare, impl: str) -> None:
    """The same memory in a pool of 4,000 pages as in its own; all other pages are poison."""
    inputs = prepare(Case(q_lens=(60, 1, 100), quant=INT8_CHANNEL))
    huge = in_a_large_pool(inputs, 4000)
    check(huge, impl)
    if impl == "cpu":
        assert memory_of(huge, impl).total == memory_of(inputs, impl).total


@serving
@pytest.mark.parametrize("q_lens", [1, 4, (30,)], ids=str)
def test_r27_extra_memory_is_bounded(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    """Behind a window nothing that a call allocates grows with the context."""
    short, long = (prepare(Case((n,), q_lens, size=100, quant=INT8_TOKEN, bounds="tight")) for n in (1000, 64_000))
    check(long, impl)
    if impl == "cpu":
        assert memory_of(long, impl).largest <= memory_of(short, impl).largest + 64_000 // 16 * 8


def test_r28_no_public_function_takes_scratch() -> None:
    """Scratch comes from the caching allocator; nobody passes or keeps a workspace."""
    for function in (attention, paged_attention, append_kv, merge_states, slots):
        names = inspect.signature(function).parameters
        assert not [name for name in names if "scratch" in name or "workspace" in name or "buffer" in name]


@serving
def test_r29_a_million_keys_behind_a_window(prepare: Prepare, impl: str) -> None:
    check(prepare(Case((2**20, 5), 2, size=1000, num_kv_heads=1, group=64, split_size=256, bounds="tight")), impl)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("q_lens", [1, 2, (20,)], ids=str)
def test_r30_64_query_heads_on_one_kv_head(
    q_lens: int | tuple[int, ...], head_dim: int, prepare: Prepare, impl: str
) -> None:
    check(prepare(Case((90,), q_lens, num_kv_heads=1, group=64, head_dim=head_dim)), impl)


def test_r30_nothing_autotunes() -> None:
    """Launches come from tables: no search at import, in the serving path or under capture."""
    assert not [path for path in SOURCE.rglob("*.py") if "triton.autotune" in path.read_text(encoding="utf-8")]


def test_r31_limits_hold_under_optimised_python() -> None:
    """``test_bad_input`` makes every wrong call under ``python -O``; here the wheel of it turns once."""
    program = "import swath; swath.Window(-1)"
    environment = {"PYTHONPATH": str(SOURCE.parent)}
    ran = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert "ValueError: size: wanted an int >= 0 or None, got -1" in ran.stderr


@pytest.mark.parametrize(
    "change", [{"softcap": -1.0}, {"compute": "int8"}, {"split_size": 5}, {"impl": "cuda"}], ids=str
)
def test_r32_unsupported_is_an_error_before_anything_runs(change: dict[str, Any]) -> None:
    inputs = make(Case())
    out = torch.full_like(inputs.q, 7.0)
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: wanted"):
        paged_attention(*inputs.args, **{**inputs.options, "out": out, **change})
    assert (out == 7).all()


def test_r33_decode_and_n_step_share_one_implementation(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(size=20, quant=INT8_TOKEN, sink="fp32"))
    out, lse = inputs.run(impl)
    steps, steps_lse = replace(inputs, q=inputs.q[:, None]).run(impl)
    assert torch.equal(steps[:, 0], out)
    assert torch.equal(steps_lse[:, 0], lse)


@pytest.mark.parametrize("case", [Case(), Case(q_lens=3), Case(q_lens=(3, 1, 40)), Case(q_lens=(3, 1, 40), dense=True)],
                         ids=str)  # fmt: skip
def test_r34_empty_rows_follow_one_rule(case: Case, prepare: Prepare, impl: str) -> None:
    """Zero, and the LSE of nothing, in every shape: sequence 1 has no keys."""
    inputs = prepare(replace(case, kv_lens=(20, 0, 64)))
    out, lse = inputs.run(impl)
    inputs.check(out, lse)
    rows = slice(1, 2) if isinstance(inputs.case.q_lens, int) else slice(3, 4)
    assert not out[rows].any()
    assert (lse[rows] == -torch.inf).all()


ALTERED: dict[str, dict[str, Any]] = {
    "window": {"window": Window(3)},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 1.0},
    "gqa": {"gqa": "interleaved"},
    "q_start": {"q_start": (10, 20, 30)},
    "sink": {"sink": (1.0, 2.0, 3.0, 4.0)},
}


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.parametrize("dense", [False, True], ids=["paged", "dense"])
def test_r37_every_parameter_counts(name: str, dense: bool, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(q_lens=(1, 2, 3), dense=dense))
    (value,) = ALTERED[name].values()
    if isinstance(value, tuple):
        value = torch.tensor(value, dtype=torch.int32 if name == "q_start" else torch.float32, device=inputs.q.device)
    plain, _ = inputs.run(impl)
    altered, _ = inputs.run(impl, **{name: value})
    assert not torch.equal(plain, altered)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_r37_the_scale_of_fp8_queries_counts(scale: float, prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(dtype=torch.float8_e4m3fn, quant=KVQuant(torch.float8_e4m3fn)))
    unit = torch.tensor(scale, device=inputs.q.device)
    check(replace(inputs, q_scale=unit), impl)
    assert torch.equal(inputs.run(impl, q_scale=unit)[0], inputs.run(impl)[0]) == (scale == 1)


def test_r38_test_ids_are_unique() -> None:
    for ids in (
        [*alone(PAGED)],
        [*in_pairs(PAGED)],
        [*alone(DENSE, dense=True)],
        [*in_pairs(DENSE, dense=True)],
        WRONG,
    ):
        names = [str(x) for x in ids]
        assert len(set(names)) == len(names)


def test_r39_no_failure_is_swallowed() -> None:
    """No handler of everything, none that does nothing; test_testing.py shows that the error budget can fail."""
    silent = []
    for path in (*SOURCE.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or isinstance(node.body[0], ast.Pass)):
                silent.append(f"{path.name}:{node.lineno}")
    assert not silent


@pytest.mark.parametrize("size", [1024, 1025, 5000])
def test_r40_a_window_that_covers_the_context_adds_no_work(size: int) -> None:
    """The same key ranges as without a window, for every tile of a prefill of 1024."""
    for first in range(0, 1024, 64):
        assert Window(size).key_ranges(first, first + 63, 1024) == Window().key_ranges(first, first + 63, 1024)


@serving
@pytest.mark.parametrize("q_lens", [1, (30,)], ids=str)
def test_r41_what_is_skipped_is_not_loaded(q_lens: int | tuple[int, ...], prepare: Prepare, impl: str) -> None:
    """All the memory that a windowed call goes through is the same in a context 32 times as long."""
    short, long = (prepare(Case((n,), q_lens, size=100, global_tokens=4, bounds="tight")) for n in (2000, 64_000))
    check(long, impl)
    if impl == "cpu":
        pages = 64_000 // 16 * 8  # the table row itself, as int64
        assert memory_of(long, impl).total <= memory_of(short, impl).total + 4 * pages
