"""Calls that must agree: parts with their whole, a batch with its members, one shape with another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import Prepare
from swath import PagedKV, Window, merge_states, paged_attention
from swath.quant import KVQuant
from swath.testing import Case, Inputs

INT8_TOKEN = KVQuant(torch.int8, "token")
WINDOWS = {
    "full": Case(),
    "local": Case(size=50),
    "leading": Case(size=0, global_tokens=70),
    "both": Case(size=20, global_tokens=70),
    "per-sequence": Case(size=20, global_tokens=(3, 70, 64)),
    "both-sides": Case(size=40, causal=False),
}


def in_two_parts(inputs: Inputs, pages: int, impl: str) -> tuple[Tensor, Tensor]:
    """The first ``pages`` pages of every sequence as one call, the rest as another, merged."""
    case, first_key = inputs.case, pages * inputs.case.page_size
    kv_lens = inputs.seq_lens.clamp(min=0)
    rows = torch.tensor(case.row_counts, dtype=torch.int32, device=kv_lens.device)
    q_start = kv_lens - rows
    g = inputs.global_tokens
    later = (g - first_key).clamp(min=0) if isinstance(g, Tensor) else max(g - first_key, 0)
    table = inputs.block_table
    parts = []
    for part in range(2):
        window = Window(case.size, later if part else g, case.causal)
        changes = {"window": window, "q_start": q_start - first_key * part}
        lengths = (kv_lens - first_key).clamp(min=0) if part else kv_lens.clamp(max=first_key)
        call = replace(inputs, block_table=table[:, pages:] if part else table[:, :pages], seq_lens=lengths.int())
        parts.append(call.run(impl, **changes, sink=None if part else inputs.sink))
    (out_a, lse_a), (out_b, lse_b) = parts
    return merge_states(out_a, lse_a, out_b, lse_b)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("quant", [None, INT8_TOKEN], ids=["plain", "int8"])
@pytest.mark.parametrize("q_lens", [1, 6, (2, 90, 30)], ids=str)
def test_prefix_and_suffix_make_the_whole(
    q_lens: int | tuple[int, ...], quant: KVQuant | None, name: str, prepare: Prepare, impl: str
) -> None:
    """A cascade: a subset of the keys from k0 on is asked with ``q_start - k0`` and ``max(g - k0, 0)``.

    In fp32, so that two roundings of the parts do not blur it; the sink goes to one part only.
    """
    shape = Case((150, 100, 64), q_lens, dtype=torch.float32, quant=quant, sink="fp32", spiked=True)
    w = WINDOWS[name]
    inputs = prepare(replace(shape, size=w.size, global_tokens=w.global_tokens, causal=w.causal))
    inputs.check(*in_two_parts(inputs, 4, impl))


def test_shared_prefix(prepare: Prepare, impl: str) -> None:
    """Many sequences over one prefix: one call with all their queries as rows of one sequence, one for the rest."""
    inputs = prepare(Case((100, 100, 100, 100), size=None, dtype=torch.float32, spiked=True))
    inputs.block_table[:, :4] = inputs.block_table[0, :4]
    cu = torch.tensor([0, 4], dtype=torch.int32, device=inputs.q.device)
    common = {"cu_seqlens_q": cu, "window": Window(causal=False), "return_lse": True, "impl": impl}
    prefix = paged_attention(inputs.q, inputs.cache, inputs.block_table[:1, :4], (cu * 16)[1:], **common)
    rest = replace(inputs, block_table=inputs.block_table[:, 4:], seq_lens=inputs.seq_lens - 64).run(impl)
    inputs.check(*merge_states(*prefix, *rest))


def member(inputs: Inputs, b: int) -> Inputs:
    """Sequence ``b`` as a batch of its own."""
    case = inputs.case
    start = sum(case.row_counts[:b])
    rows = slice(start, start + case.row_counts[b]) if case.ragged else slice(b, b + 1)
    lens = (case.kv_lens[b],)
    q_lens = (case.row_counts[b],) if case.ragged else case.q_lens
    cu = torch.tensor([0, case.row_counts[b]], dtype=torch.int32, device=inputs.q.device) if case.ragged else None
    return replace(
        inputs, case=replace(case, kv_lens=lens, q_lens=q_lens), q=inputs.q[rows], cu_seqlens_q=cu,
        block_table=inputs.block_table[b : b + 1], seq_lens=inputs.seq_lens[b : b + 1],
    )  # fmt: skip


@pytest.mark.parametrize("bounds", ["none", "tight", "loose"])
@pytest.mark.parametrize("q_lens", [1, 4, (1, 70, 5)], ids=str)
@pytest.mark.parametrize("size", [None, 100])
def test_split_size_frees_a_row_of_its_batch(
    size: int | None, q_lens: int | tuple[int, ...], bounds: str, prepare: Prepare, impl: str
) -> None:
    """With ``split_size`` not a bit of a row depends on its neighbours or on the bounds."""
    inputs = prepare(Case((70, 330, 129), q_lens, size=size, split_size=64, bounds=bounds))
    together, lse = inputs.run(impl)
    inputs.check(together, lse)
    start = 0
    for b in range(3):
        one = member(inputs, b)
        # A backend may leave a row alone to another one that in the batch is its own to run.
        alone, alone_lse = one.run("auto" if one.why_not(impl) else impl, max_q_len=None, max_kv_len=None)
        rows = slice(start, start + len(alone))
        assert torch.equal(together[rows], alone), b
        assert torch.equal(lse[rows], alone_lse), b
        start += len(alone)


@pytest.mark.parametrize("case", [Case(), Case(size=20, global_tokens=3, quant=INT8_TOKEN, sink="fp32")], ids=str)
def test_one_step_is_decode(case: Case, prepare: Prepare, impl: str) -> None:
    """[B, Hq, D], [B, 1, Hq, D] and [B, Hq, D] with cu_seqlens_q are one call in three shapes."""
    inputs = prepare(case)
    out, lse = inputs.run(impl)
    steps, steps_lse = replace(inputs, q=inputs.q[:, None]).run(impl)
    assert torch.equal(steps[:, 0], out)
    assert torch.equal(steps_lse[:, 0], lse)
    cu = torch.arange(4, dtype=torch.int32, device=inputs.q.device)
    inputs.check(*inputs.run(impl, cu_seqlens_q=cu))


def test_lse_is_given_only_when_asked_for(prepare: Prepare, impl: str) -> None:
    inputs = prepare(Case(size=20))
    out, lse = inputs.run(impl)
    alone = paged_attention(*inputs.args, **inputs.options, impl=impl)
    assert torch.equal(alone, out)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    "case", [Case(), Case(q_lens=(1, 0, 70), tail=3), Case(q_lens=(9, 0, 70), dense=True)], ids=str
)
def test_out_is_written_and_returned(case: Case, prepare: Prepare, impl: str) -> None:
    inputs = prepare(case)
    canary = inputs.canary()
    out, lse = inputs.run(impl, out=canary.out)
    assert out.data_ptr() == canary.out.data_ptr()
    assert out.shape == inputs.q.shape
    inputs.check(out, lse)
    assert canary.broken() == 0


@pytest.mark.parametrize(
    "case",
    [
        Case((300, 70, 129), split_size=64),
        Case(q_lens=3, quant=INT8_TOKEN),
        Case((330, 70, 129), (90, 1, 40), num_kv_heads=1, group=8, quant=INT8_TOKEN),
        Case((330, 70, 129), (90, 1, 40), head_dim=128, size=40),
        Case(q_lens=(9, 0, 70), dense=True),
    ],
    ids=str,
)
def test_out_may_be_q(case: Case, prepare: Prepare, impl: str) -> None:
    """No row of q is read once the same row of the output may have been written."""
    inputs = prepare(case)
    want, want_lse = inputs.run(impl)
    in_place = replace(inputs, q=inputs.q.clone())
    out, lse = in_place.run(impl, out=in_place.q)
    assert out.data_ptr() == in_place.q.data_ptr()
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_paged_equals_dense(prepare: Prepare, impl: str) -> None:
    """The same keys with and without pages."""
    dense = prepare(Case((90, 33), (20, 33), dense=True, size=30, global_tokens=2, spiked=True))
    lengths = torch.tensor([90, 33], dtype=torch.int32, device=dense.q.device)
    table = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, -1, -1, -1]], dtype=torch.int32, device=dense.q.device)
    pools = []
    for x in dense.keys:
        padded = x.new_full((9 * 16, *x.shape[1:]), torch.nan)
        padded[:90], padded[96 : 96 + 33] = x[:90], x[90:123]
        pools.append(padded.unflatten(0, (9, 16)))
    options = {"window": Window(30, 2), "cu_seqlens_q": dense.cu_seqlens_q, "return_lse": True, "impl": impl}
    dense.check(*paged_attention(dense.q, PagedKV.from_nhd(*pools), table, lengths, **options))
