"""The torch.library side: opcheck, fakes, torch.compile, torch.export, fake tensors, and eager calls that pass by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import swath
from swath import KVQuant, PagedKV, PageTable, Window
from swath.testing import Case, Inputs, make

PAGED = {
    "decode": Case(size=20, global_tokens=3),
    "n-step": Case(q_lens=3, quant=KVQuant(torch.int8, "token"), sink="fp32", index_dtype=torch.int64),
    "request table": Case(table="rows", unit="token", size=20),
    "ragged": Case(q_lens=(5, 0, 40), table="flat", size=20, global_tokens=(1, 2, 3), q_start=(3, 4, 80)),
    "bounds": Case(q_lens=3, ranges="random", global_tokens=4, bounds="tight"),
    "fp8": Case(dtype=torch.float8_e4m3fn, q_scale="token", quant=KVQuant(torch.float8_e4m3fn, "channel", "head")),
}
DENSE = Case(q_lens=(5, 0, 40), dense=True, size=20, softcap=5.0, gqa="interleaved")

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FP8_CHECKS = CHECKS[1:]
"""torch's schema check multiplies its inputs, which torch cannot do in fp8 on a CPU."""


def recorded(inputs: Inputs, **changes: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The torch.library op that a public call becomes under a dispatch mode, with its arguments."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "swath":
                calls.append((op, args, kwargs or {}))
            return op(*args, **(kwargs or {}))

    with Recorder():
        inputs.run("reference", **changes)
    (call,) = calls
    return call


@pytest.mark.parametrize("with_out", [False, True], ids=["functional", "out"])
@pytest.mark.parametrize("case", [*PAGED.values(), DENSE], ids=[*PAGED, "dense"])
def test_opcheck_attention(case: Case, with_out: bool) -> None:
    inputs = make(case)
    out = torch.zeros(inputs.q.shape, dtype=case.out_dtype) if with_out else None
    op, args, kwargs = recorded(inputs, out=out)
    assert op._overloadname == ("out" if with_out else "default")
    torch.library.opcheck(op, args, kwargs, test_utils=FP8_CHECKS if case.dtype == torch.float8_e4m3fn else CHECKS)


def test_opcheck_the_other_operators() -> None:
    ops = torch.ops.swath
    inputs = make(Case(quant=KVQuant(torch.int8, "token", "tensor")))
    c = inputs.cache
    k = torch.randn(2, 2, 64)
    where = torch.tensor([5, 7])
    torch.library.opcheck(ops.append_kv.default, (c.k, c.v, c.k_scale, c.v_scale, k, k, where, "reference"))
    out, lse = inputs.run("reference")
    torch.library.opcheck(
        ops.merge_states.default, (out, lse, out.clone(), lse.clone(), "e", torch.float32, "reference")
    )
    for scale in (None, torch.tensor(0.5)):
        torch.library.opcheck(ops.quantise_q.default, (k, scale, "reference"))
    stacked = (torch.stack([out, out, out]), torch.stack([lse, lse, lse]), None, None, "2", None, "reference")
    torch.library.opcheck(ops.merge_states.default, stacked)
    flat = make(Case(table="flat")).block_table
    request_table = make(Case(table="rows", unit="token")).block_table
    tables = (
        (inputs.block_table, None, None, "page"),
        (*flat, None, "page"),
        (request_table.entries, None, request_table.rows, "token"),
    )
    for table in tables:
        torch.library.opcheck(ops.slots.default, (*table, inputs.seq_lens, 16, 3, None))


def compiled(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*args)


def same(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
        assert (g.dtype, g.shape) == (w.dtype, w.shape)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", [*PAGED.values(), DENSE], ids=[*PAGED, "dense"])
def test_compile_attention(case: Case, dynamic: bool | None) -> None:
    inputs = make(case)
    public, options = swath.attention if case.dense else swath.paged_attention, inputs.options

    def f(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = public(*args, **options, return_lse=True)
        return out * 2, lse + 1

    same(compiled(f, *inputs.args, dynamic=dynamic), f(*inputs.args))


def test_compile_with_what_is_built_inside() -> None:
    """A window and a cache made inside the compiled function, an out= of the caller's, no LSE."""
    inputs = make(Case(size=20, quant=KVQuant(torch.int8, "token")))
    c = inputs.cache

    def f(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, table: Tensor, lens: Tensor, out: Tensor) -> Tensor:
        cache = PagedKV(k, v, k_scale=ks, v_scale=vs)
        return swath.paged_attention(q, cache, table, lens, window=Window(20), out=out) + 1

    args = (inputs.q, c.k, c.v, c.k_scale, c.v_scale, inputs.block_table, inputs.seq_lens)
    outs = [torch.zeros_like(inputs.q) for _ in range(2)]
    same([compiled(f, *args, outs[0])], [f(*args, outs[1])])
    assert torch.equal(*outs)
    assert outs[0].any()


def test_compile_a_decode_step() -> None:
    """slots, append_kv, paged_attention and merge_states in one graph; the cache is written in place."""

    def step(q: Tensor, cache: PagedKV, table: Tensor, lens: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        where = swath.slots(table, lens, cache.page_size, num_tokens=3)
        swath.append_kv(cache, k, v, where)
        out, lse = swath.paged_attention(q, cache, table, lens, return_lse=True)
        return swath.merge_states(out, lse, out * 2, lse - 1)

    results = []
    for run in (step, lambda *args: compiled(step, *args)):
        inputs = make(Case(quant=KVQuant(torch.int8, "token")))
        k = torch.arange(3 * 2 * 64, dtype=torch.float32).view(3, 2, 64) / 100
        merged = run(*inputs.args, k, -k)
        results.append((*merged, inputs.cache.k, inputs.cache.v_scale.nan_to_num()))
    same(*results)


class Layer(torch.nn.Module):
    """A layer that an exported program would hold: a projection and paged attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        q = self.project(x)
        return swath.paged_attention(q, PagedKV(k, v), table, lens, window=Window(20, 2))


def test_export() -> None:
    inputs = make(Case(size=20, global_tokens=2, dtype=torch.float32))
    layer = Layer().requires_grad_(requires_grad=False)
    q, cache, table, lens = inputs.args
    args = (q, cache.k, cache.v, table, lens)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, None, None, {0: batch}, {0: batch})
    program = torch.export.export(layer, args, dynamic_shapes=shapes)
    assert torch.ops.swath.paged_attention.default in {n.target for n in program.graph.nodes}
    assert torch.equal(program.module()(*args), layer(*args))
    two = (q[:2], cache.k, cache.v, table[:2], lens[:2])
    assert torch.equal(program.module()(*two), layer(*two))


@pytest.mark.parametrize("case", [*PAGED.values(), DENSE], ids=[*PAGED, "dense"])
def test_fake_tensors_have_the_real_shapes(case: Case) -> None:
    inputs = make(case)
    want = inputs.run("reference")
    mode = FakeTensorMode()

    def fake(x: Any) -> Any:
        if isinstance(x, Tensor):
            return mode.from_tensor(x)
        if isinstance(x, PagedKV):
            return PagedKV(*(fake(t) for t in (x.k, x.v, x.k_scale, x.v_scale)))
        if isinstance(x, PageTable):
            return PageTable(fake(x.entries), rows=fake(x.rows), unit=x.unit)
        if isinstance(x, Window):
            return Window(x.size, fake(x.global_tokens), x.causal, bounds=fake(x.bounds))
        return tuple(map(fake, x)) if isinstance(x, tuple) else x

    public = swath.attention if case.dense else swath.paged_attention
    options = {name: fake(value) for name, value in inputs.options.items()}
    with mode:
        got = public(*fake(inputs.args), **options, return_lse=True)
        alone = public(*fake(inputs.args), **options)
    for g, w in zip((*got, alone), (*want, want[0]), strict=True):
        assert (g.shape, g.dtype, g.device) == (w.shape, w.dtype, w.device)


def test_fake_tensors_of_the_other_operators() -> None:
    with FakeTensorMode():
        out, lse = torch.empty(3, 4, 64, dtype=torch.bfloat16), torch.empty(3, 4)
        merged, merged_lse = swath.merge_states(out, lse, out, lse)
        assert (merged.shape, merged.dtype, merged_lse.dtype) == (out.shape, torch.bfloat16, torch.float32)
        placed = swath.slots(torch.empty(3, 4, dtype=torch.int32), torch.empty(3, dtype=torch.int32), 16, num_tokens=6)
        assert (placed.shape, placed.dtype) == ((6,), torch.int64)
        pool = torch.empty(4, 2, 16, 64, dtype=torch.bfloat16)
        new = torch.empty(3, 2, 64)
        assert swath.append_kv(PagedKV(pool, pool), new, new, torch.empty(3, dtype=torch.int64)) is None


@pytest.mark.parametrize("case", [PAGED["decode"], PAGED["ragged"], DENSE], ids=["decode", "ragged", "dense"])
def test_meta_tensors_have_the_real_shapes(case: Case) -> None:
    inputs = make(case, device="cpu")

    def meta(x: Any) -> Any:
        if isinstance(x, PagedKV):
            return PagedKV(x.k.to("meta"), x.v.to("meta"))
        return tuple(map(meta, x)) if isinstance(x, tuple) else x.to("meta")

    public = swath.attention if case.dense else swath.paged_attention
    cu = inputs.cu_seqlens_q
    options = {} if case.dense or cu is None else {"cu_seqlens_q": cu.to("meta")}
    out, lse = public(*meta(inputs.args), **options, return_lse=True)
    assert (out.shape, out.dtype, out.is_meta) == (inputs.q.shape, inputs.q.dtype, True)
    assert lse.shape == out.shape[:-1]


def test_eager_calls_pass_the_dispatcher_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher's microseconds are for those who watch."""
    from swath.ops.torch_ops import TorchOp

    inputs = make(Case())
    inputs.run()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("dispatched")

    monkeypatch.setattr(TorchOp, "__call__", refuse)
    inputs.run()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="dispatched"):
        inputs.run()


def test_wrong_input_is_named_under_the_dispatcher_too() -> None:
    inputs = make(Case())
    with pytest.raises(ValueError, match=r"^softcap: wanted"):
        recorded(inputs, softcap=-1.0)
