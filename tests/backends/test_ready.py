"""Calls launched from their arguments: all that Triton specialises a kernel for is in their signature, and each of them
launches with its own tensors, whatever the first one's were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from compile_rows import OPTIONS
from compile_variants import StandIn, problem_of, tiles_of
from launches import Recorder, fresh_arguments, recording
from torch import Tensor

from conftest import plan_for
from swath import KVQuant, PagedKV, PageTable, Window, append_kv, paged_attention, quantise_q, target
from swath.engines.common import Layer, Step
from swath.ops import append as append_call
from swath.ops import attention as attention_call
from swath.ops import paged as paged_call
from swath.ops import quantise as quantise_call
from swath.ops.operator import Operator
from swath.ops.signature import Memory
from swath.problem import Problem
from swath.target import Target
from swath.testing import pairwise

pytestmark = [
    pytest.mark.skipif(not target.has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(target.interpreting(), reason="the interpreter has no compiled kernels to remember"),
]
H200 = Target("sm_90", 132)
INT8 = KVQuant(torch.int8, "token")


class Gpu(Recorder):
    """CPU tensors stand for those of a GPU."""

    current: int | None = None
    """The current device; the index of a CPU is None."""

    def __init__(self) -> None:
        super().__init__()
        self.cases: list[Any] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Calls on CPU tensors are launched, on a recorder that keeps the cases that are made; no call was met before."""
    gpu = Gpu()
    recording(monkeypatch, gpu)
    from swath.backends.hopper import attention as hopper
    from swath.backends.triton import append, attention, quantise

    for module in (append, attention, quantise):
        monkeypatch.setattr(module, "why_no_triton", lambda device: None)
    for module in (attention, quantise):
        monkeypatch.setattr(module, "target_of", lambda device: H200)
    monkeypatch.setattr(hopper, "why_not", lambda problem: hopper.why_not_tiles(problem, H200.num_sms))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.current)
    for module in (append_call, attention_call, paged_call, quantise_call):
        (operator,) = (x for x in vars(module).values() if isinstance(x, Operator))
        stages = replace(operator.stages, case=kept(operator.stages.case, gpu.cases), memory=Memory())
        monkeypatch.setattr(module, "STAGES", stages)
        monkeypatch.setattr(operator, "stages", stages)
    return gpu


def kept(make: Callable[..., Any], cases: list[Any]) -> Callable[..., Any]:
    """``make``, whose results are kept in a list."""

    def case(*args: Any) -> Any:
        cases.append(make(*args))
        return cases[-1]

    return case


def decode(**changes: Any) -> dict[str, Any]:
    """The arguments of a decode call in two launches, all tensors new."""
    pool = torch.zeros(4, 2, 16, 64)
    arguments: dict[str, Any] = dict(
        q=torch.zeros(3, 4, 64), cache=PagedKV(pool, pool.clone()), block_table=torch.zeros(3, 80, dtype=torch.int32),
        seq_lens=torch.full((3,), 100, dtype=torch.int32),
    )  # fmt: skip
    return arguments | changes


def expected(case: Problem) -> list[tuple[Any, ...]]:
    """What the launches of a decode call must pass on."""
    return fresh_arguments(case, H200.arch, "triton")


def call_of(problem: Problem) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call that a problem was made from: its operator, operands and options."""
    names = ["window", "scale", "softcap", "sink", "gqa", "q_start", "max_q_len", "max_kv_len"]
    dense = not hasattr(problem.keys, "cache")
    names += [] if dense else ["cu_seqlens_q", "q_scale", "compute", "split_size"]
    options = {name: getattr(problem, name) for name in names} | {"return_lse": problem.lse is not None}
    keys: Any = problem.keys
    if dense:
        return attention_call.ATTENTION, (problem.q, keys.k, keys.v, problem.cu_seqlens_q, keys.cu_seqlens), options
    return paged_call.PAGED_ATTENTION, (problem.q, keys.cache, keys.table, keys.seq_lens), options


def new(x: Any) -> Any:
    """The same tensor elsewhere, or a noun of such tensors; anything else as it is."""
    if isinstance(x, Tensor):
        return torch.empty_like(x)
    if isinstance(x, PagedKV):
        return PagedKV(*map(new, x.tensors))
    if isinstance(x, PageTable):
        return replace(x, entries=new(x.entries), indptr=new(x.indptr), rows=new(x.rows))
    if isinstance(x, Window):
        return replace(x, global_tokens=new(x.global_tokens), bounds=new(x.bounds))
    return x


@pytest.mark.parametrize("row", pairwise(OPTIONS), ids=lambda row: " ".join(row.values()))
def test_a_later_call_launches_with_its_own_tensors(row: dict[str, str], gpu: Gpu) -> None:
    made = problem_of(row)
    operator, operands, options = call_of(made)
    for tiles in tiles_of(made, H200.arch):
        gpu.cases.clear()
        operator(tuple(map(new, operands)), {name: new(x) for name, x in options.items()}, tiles)
        assert not gpu.launches, "the first run compiles"
        assert len(gpu.cases) == 1
        operands, options = tuple(map(new, operands)), {name: new(x) for name, x in options.items()}
        result = operator(operands, options, tiles)
        assert len(gpu.cases) == 1, "the later ones need no case"
        out, lse = result if options["return_lse"] else (result, None)
        later = operator.prepare(*operands, **options)
        later.out, later.lse = out, lse
        assert gpu.taken() == fresh_arguments(later, H200.arch, tiles)


@pytest.mark.parametrize("quant", [torch.bfloat16, INT8], ids=["bf16", "int8"])
def test_a_later_append_launches_with_its_own_tensors(quant: Any, gpu: Gpu) -> None:
    cache, k, slots = PagedKV.empty(quant, 4, 2, 16, 64), torch.zeros(3, 2, 64), torch.arange(3)
    append_kv(cache, k, k.clone(), slots, impl="triton")
    cache, k, v, slots = new(cache), new(k), new(k), new(slots)
    append_kv(cache, k, v, slots, impl="triton")
    assert len(gpu.cases) == 1
    ((grid, *values),) = gpu.taken()
    tensors = [x if x is None else x.data_ptr() for x in (k, v, *cache.tensors, slots)]
    assert (grid, values[:7]) == (1, tensors), "a program has more than these six rows"


@pytest.mark.parametrize("scale", [None, torch.ones(())], ids=["own", "static"])
def test_queries_are_quantised_later_from_and_into_their_own_tensors(scale: Tensor | None, gpu: Gpu) -> None:
    q = torch.zeros(3, 2, 64)
    quantise_q(q, scale, impl="triton")
    q, scale = new(q), new(scale)
    made = quantise_q(q, scale, impl="triton")
    assert len(gpu.cases) == 1
    ((_, *values),) = gpu.taken()
    assert values[:4] == [x if x is None else x.data_ptr() for x in (q, scale, *made)]


def test_a_subclass_is_dispatched_where_plain_tensors_are_ready(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(paged_call.PAGED_ATTENTION, "dispatched", seen.append)
    for made in (decode(), decode(), decode(q=torch.zeros(3, 4, 64).as_subclass(type("Own", (Tensor,), {})))):
        paged_attention(**made, impl="triton")
    assert len(seen) == 1
    assert len(gpu.taken()) == 2, "of the second call"


def test_layers_of_a_step_launch_with_their_own_tensors(gpu: Gpu) -> None:
    call = decode()
    q, cache, lens = call["q"], call["cache"], call["seq_lens"]
    cu = torch.arange(4, dtype=torch.int32)
    step = Step(call["block_table"], lens, lens, 3, 1, 1280, cu)
    layers = [(new(q), new(cache), new(q)) for _ in range(3)]
    with torch.no_grad():
        for q, cache, out in layers:
            assert step.attend(Layer(impl="triton"), q, cache, out) is out
    assert len(gpu.cases) == 1
    launched = gpu.taken()
    count = len(launched) // 2
    assert count
    for i, (q, cache, out) in enumerate(layers[1:]):
        for _, *values in launched[i * count : (i + 1) * count][:1]:
            assert {x.data_ptr() for x in (q, cache.k, cache.v, out, cu, lens, step.block_table)} <= set(values)


def keys_of(problem: Problem, tiles: str, keys: list[Any]) -> tuple[Any, ...]:
    """What Triton would look up the kernels of a call by: all that it specialises for, and the compiler's options."""
    from swath.backends.triton.arguments import operands_of

    plan = plan_for(tiles, problem, H200)
    operands = {**operands_of(problem), **plan.scratch.tensors("cpu")}
    keys.clear()
    for call in plan.calls:
        call.compile(operands)
    return tuple(keys)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Triton looks kernels up on a device that is not there, and compiles none; the keys that it looked for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Nowhere(StandIn):
        def get_current_device(self) -> Any:
            return "nowhere"

    keys: list[Any] = []
    used: set[Any] = set()

    def look(self: Any, key: Any, *args: Any, **kwargs: Any) -> None:
        used.add(self)
        keys.append((self.fn.__name__, key))

    monkeypatch.setattr(JITFunction, "_do_compile", look)
    monkeypatch.setattr(triton.runtime.driver, "_active", Nowhere(GPUTarget("cuda", 90, 32)))
    yield keys
    for kernel in used:
        del kernel.device_caches["nowhere"]


@pytest.mark.parametrize("row", pairwise(OPTIONS), ids=lambda row: " ".join(row.values()))
def test_calls_of_a_signature_need_the_same_kernels(row: dict[str, str], keys: list[Any]) -> None:
    made = problem_of(row)
    operator, operands, options = call_of(made)
    again = operator.prepare(*map(new, operands), **{name: new(x) for name, x in options.items()})
    once = operator.prepare(*operands, **options)
    assert again.memo is once.memo
    for tiles in tiles_of(made, H200.arch):
        assert keys_of(again, tiles, keys) == keys_of(once, tiles, keys)


def at(offset: int, x: Any) -> Any:
    """The same tensor, beginning ``offset`` elements into an allocation of its own."""
    room = torch.zeros(x.numel() + offset, dtype=x.dtype)
    return room[offset:].view(x.shape)


def attacks() -> dict[str, dict[str, Any]]:
    """Changes of a decode call that Triton may compile other kernels for, by name."""
    found: dict[str, dict[str, Any]] = {"as it is": {}}
    base = decode(q_start=torch.zeros(3, dtype=torch.int32), sink=torch.zeros(4), out=torch.zeros(3, 4, 64))
    for name, x in base.items():
        if isinstance(x, Tensor):
            found |= {f"{name} {n} elements on": base | {name: at(n, x)} for n in (1, 2, 3, 4, 8)}
    cache = base["cache"]
    for n in (1, 2, 4):
        found[f"k {n} elements on"] = base | {"cache": PagedKV(at(n, cache.k), cache.v)}
        found[f"v {n} elements on"] = base | {"cache": PagedKV(cache.k, at(n, cache.v))}
    for num_seqs in (1, 16, 17):
        lens = torch.zeros(num_seqs, dtype=torch.int32)
        table = torch.zeros(num_seqs, 80, dtype=torch.int32)
        found[f"{num_seqs} sequences"] = decode(q=torch.zeros(num_seqs, 4, 64), seq_lens=lens, block_table=table)
    for pages, heads, size in ((1, 2, 16), (16, 2, 16), (17, 2, 16), (4, 1, 16), (4, 4, 16), (4, 2, 1), (4, 2, 8)):
        found[f"pool {pages, heads, size}"] = decode(cache=PagedKV(*torch.zeros(2, pages, heads, size, 64)))
    for width in (1, 16, 17, 79):
        found[f"{width} pages"] = decode(block_table=torch.zeros(3, width, dtype=torch.int32))
    for window in (Window(1), Window(16), Window(17), Window(17, 1), Window(17, 16), Window(17, causal=False)):
        found[str(window)] = decode(window=window)
    for name in ("block_table", "seq_lens"):
        found[f"{name} int64"] = decode(**{name: base[name].long()})
    found["dtype"] = decode(q=base["q"].half(), cache=PagedKV(cache.k.half(), cache.v.half()))
    found["stored"] = decode(cache=PagedKV.empty(INT8, 4, 2, 16, 64))
    found["scale"], found["softcap"] = decode(scale=1.0), decode(softcap=1.0)
    found["padded rows"] = decode(q=torch.zeros(3, 4, 65)[..., :64])
    found["padded pages"] = decode(cache=PagedKV(*torch.zeros(2, 4, 2, 16, 72)[..., :64]))
    return found


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_what_triton_specialises_for_is_in_the_signature(grad: bool, keys: list[Any]) -> None:
    """Addresses by 16 bytes, numbers that are 1 or multiples of 16, dtypes: a kernel for others would be wrong."""
    with torch.set_grad_enabled(grad):
        calls = {name: paged_call.prepare(**(decode() | change)) for name, change in attacks().items()}
    needed = {name: keys_of(problem, "triton", keys) for name, problem in calls.items()}
    by_memo: dict[int, set[Any]] = {}
    for name, problem in calls.items():
        by_memo.setdefault(id(problem.memo), set()).add(needed[name])
    assert [len(found) for found in by_memo.values()] == [1] * len(by_memo)
    assert len(set(needed.values())) > 20, "the changes do ask for other kernels"
    assert len(by_memo) < len(calls), "and some calls do share a signature"


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_what_triton_specialises_appends_for_is_in_the_signature(grad: bool, keys: list[Any]) -> None:
    from swath.backends.triton import append

    k, slots = torch.zeros(4, 2, 64, dtype=torch.bfloat16), torch.arange(4)
    caches = [PagedKV.empty(quant, n, 2, p, 64) for quant in (torch.bfloat16, INT8) for n in (1, 3) for p in (1, 16)]
    pool = torch.zeros(3, 2, 16, 64, dtype=torch.bfloat16)
    caches += [PagedKV(at(4, pool), pool), PagedKV(pool, at(4, pool)), PagedKV(at(8, pool), pool)]
    with torch.set_grad_enabled(grad):
        cases = [
            append_call.prepare(cache, at(n, k), at(m, k), s)
            for cache in caches
            for n, m in ((0, 0), (4, 0), (0, 4), (8, 8), (1, 0))
            for s in (slots, slots.int(), at(1, slots))
        ]
    by_memo: dict[int, set[Any]] = {}
    for case in cases:
        keys.clear()
        for call in append.plan_for(case, H200).calls:
            call.compile(append.operands_of(case))
        by_memo.setdefault(id(case.memo), set()).add(tuple(keys))
    assert [len(found) for found in by_memo.values()] == [1] * len(by_memo)
    assert len(set().union(*by_memo.values())) > 20
    assert len(by_memo) < len(cases)


def test_addresses_of_one_alignment_are_one_signature(gpu: Gpu) -> None:
    """Odd addresses included: they have kernels of their own, and keep them."""
    for offset, cases in ((0, 1), (1, 2), (5, 2), (4, 2), (9, 2), (0, 2)):
        q = at(offset, torch.zeros(3, 4, 64))
        paged_attention(**decode(q=q), impl="triton")
        assert len(gpu.cases) == cases
        assert all(values[1] == q.data_ptr() for values in gpu.taken()[:1])


def test_a_tensor_that_is_two_arguments_says_nothing_of_other_calls(gpu: Gpu) -> None:
    for same in ("q and out", "lens and q_start"):
        call = decode(out=torch.zeros(3, 4, 64), q_start=torch.zeros(3, dtype=torch.int32))
        both = {"out": call["q"]} if same == "q and out" else {"q_start": call["seq_lens"]}
        for first in (both, {}):  # each compiles once where it is a signature of its own, as results over q are
            paged_attention(**(call | first), impl="triton")
        gpu.launches.clear()
        for changes in (both, {}, both, {"q": call["q"].clone()}):
            paged_attention(**(call | changes), impl="triton")
            assert gpu.taken() == expected(paged_call.prepare(**(call | changes)))


@pytest.mark.parametrize(
    "changes",
    [{"scale": -0.5}, {"seq_lens": torch.full((6,), 100, dtype=torch.int32)[::2]}, {"sink": torch.zeros(8)[::2]}],
    ids=["negated q", "strided lens", "strided sink"],
)
def test_what_is_made_from_an_argument_is_made_each_time(changes: dict[str, Any], gpu: Gpu) -> None:
    for count in (1, 2, 3):
        paged_attention(**decode(**changes), impl="triton")
        assert len(gpu.cases) == count
        assert len(gpu.taken()) == (0 if count == 1 else len(expected(gpu.cases[-1])))


def test_each_launch_asks_for_the_stream(gpu: Gpu) -> None:
    for stream in (3, 4, 5):
        gpu.stream = stream
        paged_attention(**decode(), impl="triton")
        assert {args[3] for args in gpu.launches} == (set() if stream == 3 else {stream})
        gpu.launches.clear()
    assert gpu.asked == [None, None]


def test_another_current_device_is_left_before_a_launch(gpu: Gpu) -> None:
    paged_attention(**decode(), impl="triton")
    paged_attention(**decode(), impl="triton")
    assert len(gpu.cases) == 1
    gpu.current = 1
    paged_attention(**decode(), impl="triton")
    assert len(gpu.cases) == 2


def test_a_listener_is_told_of_ready_calls_too(gpu: Gpu) -> None:
    from triton import knobs

    paged_attention(**decode(), impl="triton")
    listener = lambda metadata: None  # noqa: E731 -- the chain compares it by identity
    knobs.runtime.launch_enter_hook.add(listener)
    try:
        paged_attention(**decode(), impl="triton")
        assert not gpu.launches, "these went through Triton"
    finally:
        knobs.runtime.launch_enter_hook.remove(listener)
    paged_attention(**decode(), impl="triton")
    assert gpu.launches


def test_ready_calls_are_still_checked_where_the_signature_cannot(gpu: Gpu) -> None:
    call = decode(out=torch.zeros(3, 4, 64))
    for _ in range(2):
        paged_attention(**call, impl="triton")
    gpu.launches.clear()
    for impl in ("gpu", ["triton"], None):
        with pytest.raises(ValueError, match=r"^impl: wanted"):
            paged_attention(**call, impl=impl)
    with pytest.raises(ValueError, match=r"^out: wanted memory that is not the cache's"):
        paged_attention(**(call | {"out": call["cache"].k.view(-1)[: 3 * 4 * 64].view(3, 4, 64)}), impl="triton")
    assert not gpu.launches


def test_backends_asked_for_by_name_are_ready_apart(gpu: Gpu) -> None:
    for impl in ("triton", "auto", "reference", "triton"):
        paged_attention(**decode(), impl=impl)
    assert len(gpu.cases) == 3, "auto is triton here, and the reference makes a case each time"
