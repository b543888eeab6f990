"""What only a GPU can show: graph replay, memory, no synchronisation and no compilation in later calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pools import in_a_large_pool

from conftest import PORTABLE, Capture, Prepare, check, each_backend
from swath import KVQuant, attention, paged_attention
from swath.testing import Case, Inputs, make
from swath.testing.fuzz import Call, judge

INT8_TOKEN, INT8_CHANNEL = KVQuant(torch.int8, "token"), KVQuant(torch.int8, "channel")
MIB = 2**20

pytestmark = [pytest.mark.gpu, each_backend("attention", but=PORTABLE)]


@pytest.mark.parametrize("q_lens", [1, 3, (40, 3, 1)], ids=str)
def test_graph_replay_with_other_lengths_leaves_the_tail_unchanged(
    q_lens: int | tuple[int, ...], prepare: Prepare, impl: str, captured: Capture
) -> None:
    """Captured at the longest lengths, replayed as they change: right rows, and no byte elsewhere."""
    inputs = prepare(Case((300, 200, 250), q_lens, tail=0 if isinstance(q_lens, int) else 3, dtype=torch.bfloat16))
    canary = inputs.canary()
    with captured(lambda: inputs.run(impl, out=canary.out)) as graph:
        for lengths in ((300, 200, 250), (299, 0, 64), (7, 130, 1)):
            inputs.seq_lens.copy_(torch.tensor(lengths))
            graph.replay()
            shorter = replace(inputs, case=replace(inputs.case, kv_lens=lengths))
            shorter.check(canary.out, None)
            assert canary.broken() == 0


def extra_bytes(inputs: Inputs, impl: str) -> int:
    """Peak GPU memory of a call beyond what was there before and its results."""
    results = inputs.run(impl)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = inputs.run(impl)
    torch.cuda.synchronize()
    made = sum(x.untyped_storage().nbytes() for x in again)
    del results
    return torch.cuda.max_memory_allocated() - before - made


def test_int8_prefill_takes_memory_for_referenced_pages_only(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((2000, 1500), (500, 1500), quant=INT8_CHANNEL, head_dim=128))
    assert extra_bytes(in_a_large_pool(inputs, 40_000), impl) == extra_bytes(inputs, impl)


@pytest.mark.parametrize(
    "case", [Case((200_000,)), Case((8192,) * 4, 4, group=16), Case((30_000, 10), (8192, 10))], ids=str
)
@pytest.mark.parametrize("quant", [None, INT8_TOKEN], ids=["bf16", "int8"])
def test_extra_memory_is_bounded(case: Case, quant: KVQuant | None, prepare: Prepare, impl: str) -> None:
    """512 MiB at most for a dequantised prefill, and the partial results of splits."""
    assert extra_bytes(prepare(replace(case, quant=quant, head_dim=128)), impl) <= 640 * MIB


def test_scratch_is_given_back(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case((5000, 3000), (100, 1), quant=INT8_TOKEN))
    inputs.run(impl)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    inputs.run(impl)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_million_keys_in_4096_partitions(prepare: Prepare, impl: str) -> None:
    check(prepare(Case((2**20,), num_kv_heads=1, group=64, split_size=256)), impl)


@pytest.mark.parametrize(
    "case",
    [
        Case(size=20),
        Case(q_lens=3, quant=INT8_TOKEN),
        Case(q_lens=(60, 1, 2), table="flat"),
        Case(q_lens=(60, 1, 2), dense=True),
    ],
    ids=str,
)
def test_no_call_synchronises(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(case)
    public = attention if case.dense else paged_attention
    options = inputs.options
    public(*inputs.args, **options, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        public(*inputs.args, **options, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_calls_alike_on_two_streams(prepare: Prepare, impl: str) -> None:
    """Each is launched on the stream that it is made on, with tensors and scratch of its own."""
    pairs = [(prepare(Case((3000, 200, 250), quant=INT8_TOKEN), seed), torch.cuda.Stream()) for seed in range(2)]
    torch.cuda.synchronize()
    made = []
    for _ in range(10):
        for inputs, stream in pairs:
            with torch.cuda.stream(stream):
                made.append((inputs, inputs.run(impl)))
    torch.cuda.synchronize()
    for inputs, results in made:
        inputs.check(*results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_calls_alike_on_two_devices(impl: str) -> None:
    """Whichever is the current one."""
    both = [make(Case((3000, 200, 250), q_lens, group=4), f"cuda:{i}") for i in (0, 1) for q_lens in (1, 40)]
    for current in (0, 1, 0, 1):
        with torch.cuda.device(current):
            for inputs in both:
                if inputs.why_not(impl) is None:
                    check(inputs, impl)


def test_no_recompile_for_another_length_batch_or_window(prepare: Prepare, impl: str) -> None:
    from swath.backends.triton.kernels.reduce import reduce_kernel
    from swath.backends.triton.kernels.split import split_kernel

    def variants() -> int:
        kernels = (split_kernel, reduce_kernel)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    first = Case((300, 200), 2, size=50, global_tokens=3)
    check(prepare(first), impl)
    before = variants()
    for lengths in ((300, 200), (17, 1000), (1, 1, 64), (4096,)):
        for steps in (2, 3):
            for size in (1, 16, 50, 64, 333):
                check(prepare(replace(first, kv_lens=lengths, q_lens=steps, size=size)), impl)
    assert variants() - before <= 4, "at most one variant for each of the four row tiles"


FOUND = [
    Case((-2, 193, 5), 20, group=3, page_size=64, quant=INT8_TOKEN, causal=False, spiked=True),
    Case((-2, 193, 5), 20, group=3, page_size=64, quant=INT8_TOKEN, causal=False, spiked=True, unit="token"),
    Case((0, 1, 64), 8, group=7, head_dim=256, quant=KVQuant(torch.int8, "head", "tensor"), compute="int8",
         ranges="random", global_tokens=4, softcap=5.0, spiked=True),
    Case((156, 896), (1, 716), group=5, head_dim=8, quant=KVQuant(torch.int8, "tensor"), compute="int8"),
]  # fmt: skip
"""Calls that were wrong on an H200, or did not compile for it, and right in the interpreter
(docs/notes/reliability.md)."""


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_what_was_wrong_on_a_gpu(case: Case, prepare: Prepare, impl: str) -> None:
    check(prepare(case), impl)


NARROW = Case((488,), 385, num_kv_heads=1, group=8, v_head_dim=8, layout="padded", gqa="interleaved")
FOUND_DRAWN = [
    Call("paged_attention", case, 2200135012, ("odd-addresses",))
    for case in (NARROW, replace(NARROW, ranges="prefix"), replace(NARROW, v_head_dim=32, ranges="prefix"))
]
"""The same, of calls that the fuzzer drew: narrow values at addresses that no asynchronous copy takes."""


@pytest.mark.parametrize("call", FOUND_DRAWN, ids=lambda call: str(call.case))
def test_what_was_drawn_wrong_on_a_gpu(call: Call, impl: str) -> None:
    assert not judge(call, impl, "cuda").fault
