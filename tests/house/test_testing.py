"""The testing kit itself: its truth, its budget's power, its poison and its covering sets."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from options import DENSE, PAGED, alone, in_pairs
from wrong_calls import WRONG

from conftest import each_backend, impls, longest_first
from swath.quant import KVQuant
from swath.testing import Arithmetic, Canary, Case, Inputs, Truth, budget_used, check_budget, make, pairwise, visible

BF16 = Case(kv_lens=(300, 65, 1030), head_dim=64, group=3)


def rounded_kernel(inputs: Inputs, window: int | None, p_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A plain decode kernel: fp32 scores, p rounded to ``p_dtype``, fp32 sums, the result rounded once."""
    case, cache = inputs.case, inputs.cache
    outs, lses = [], []
    for b, kv_len in enumerate(case.kv_lens):
        first = 0 if window is None else max(kv_len - window, 0)
        positions = torch.arange(first, kv_len)
        page, slot = inputs.block_table[b].long()[positions // case.page_size], positions % case.page_size
        k, v = (pool[page, :, slot].float().repeat_interleave(case.group, 1) for pool in (cache.k, cache.v))
        s = case.score_scale * torch.einsum("hd,nhd->hn", inputs.q[b].float(), k)
        p = torch.exp(s - s.amax(1, keepdim=True))
        total = p.sum(1)
        most = 2.0**8 if p_dtype == torch.float8_e4m3fn else 1.0  # of e4m3, so that few p are among its last steps
        p = (most * p).to(p_dtype).float() / most
        outs.append(torch.einsum("hn,nhd->hd", p, v) / total[:, None])
        lses.append(total.log() + s.amax(1))
    return torch.stack(outs).to(case.out_dtype), torch.stack(lses)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", [BF16, replace(BF16, spiked=True), replace(BF16, dtype=torch.float16)], ids=str)
def test_budget_lets_rounded_p_pass(case: Case, seed: int) -> None:
    inputs = make(case, seed=seed)
    used = inputs.check(*rounded_kernel(inputs, None, case.dtype))
    assert 0.05 < used < 0.75


@pytest.mark.parametrize("p_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [17, 64, 250])
def test_budget_catches_a_key_lost_at_the_edge(size: int, p_dtype: torch.dtype) -> None:
    inputs = make(replace(BF16, size=size, spiked=True))
    inputs.check(*rounded_kernel(inputs, size, p_dtype))
    for wrong in (size - 1, size + 1):
        out, lse = rounded_kernel(inputs, wrong, p_dtype)
        assert budget_used(out, None, inputs.truth()) > 10
        assert budget_used(out, lse, inputs.truth()) > 1000


def test_budget_catches_a_lost_key_among_a_thousand_without_spikes() -> None:
    inputs = make(replace(BF16, kv_lens=(1000, 1000), size=900))
    inputs.check(*rounded_kernel(inputs, 900, torch.bfloat16))
    assert budget_used(*rounded_kernel(inputs, 899, torch.bfloat16), inputs.truth()) > 10


def test_budget_is_tight_for_fp32() -> None:
    inputs = make(replace(BF16, dtype=torch.float32))
    inputs.check(*rounded_kernel(inputs, None, torch.float32))
    assert budget_used(*rounded_kernel(inputs, None, torch.bfloat16), inputs.truth()) > 100


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", [BF16, replace(BF16, spiked=True), replace(BF16, kv_lens=(4000, 70))], ids=str)
def test_budget_lets_p_in_e4m3_pass_where_it_may_be(case: Case, seed: int) -> None:
    """And nowhere else; a factor of what three mantissa bits are off all together, and a lost key, are still caught."""
    inputs = make(case, seed=seed)
    out, lse = rounded_kernel(inputs, None, torch.float8_e4m3fn)
    truth = inputs.truth()
    assert 0.05 < check_budget(out, lse, truth, Arithmetic(p_e4m3=True)) < 0.75
    assert budget_used(out, lse, truth) > 1
    assert budget_used(1.6 * out, None, truth, Arithmetic(p_e4m3=True)) > 1
    if case.spiked:
        out, _ = rounded_kernel(inputs, max(case.kv_lens) - 1, torch.float8_e4m3fn)
        assert budget_used(out, None, truth, Arithmetic(p_e4m3=True)) > 1


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.003)])
def test_budget_catches_a_factor(dtype: torch.dtype, error: float) -> None:
    inputs = make(replace(BF16, dtype=dtype))
    out, lse = rounded_kernel(inputs, None, torch.float32)
    for factor in (1 - error, 1 + error):
        assert budget_used((out * factor).to(out.dtype), lse, inputs.truth()) > 1


def test_check_budget_names_the_worst_element() -> None:
    inputs = make(BF16)
    out, lse = rounded_kernel(inputs, None, torch.float32)
    out[2, 4, 7] += 1
    with pytest.raises(AssertionError, match=r"out: row 2, head and element \(4, 7\) .* 1 of 1152 elements"):
        check_budget(out, lse, inputs.truth())
    out[2, 4, 7] = torch.nan
    assert budget_used(out, lse, inputs.truth()) == math.inf


def test_rows_that_see_nothing_have_no_budget() -> None:
    inputs = make(Case(kv_lens=(0, 5)))
    truth = inputs.truth()
    out, lse = inputs.run("reference")
    inputs.check(out, lse, truth)
    assert budget_used(out.index_fill(0, torch.tensor([0]), 1e-3), lse, truth) > 1e3
    assert budget_used(out, lse.index_fill(0, torch.tensor([0]), -1e30), truth) == math.inf


def test_truth_of_a_hand_computed_row() -> None:
    """Two keys with scores log 1 and log 3 and values 1 and 3 give (1 + 9) / 4; a sink of log 4 halves that."""
    q = torch.tensor([1.0]).view(1, 1, 1)
    k = torch.tensor([0.0, math.log(3)]).view(2, 1, 1)
    v = torch.tensor([1.0, 3.0]).view(2, 1, 1)
    truth = dense_truth(q, k, v)
    torch.testing.assert_close(truth.out.item(), 2.5)
    torch.testing.assert_close(truth.lse.item(), math.log(4))
    torch.testing.assert_close(truth.quadrature.item(), math.hypot(1, 9) / 4)
    torch.testing.assert_close(truth.peak.item(), 0.75)
    assert truth.keys.item() == 2
    halved = dense_truth(q, k, v, sink=torch.tensor([math.log(4)]))
    torch.testing.assert_close(halved.out.item(), 1.25)
    torch.testing.assert_close(halved.lse.item(), math.log(8))


def dense_truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> Truth:
    from swath.testing import oracle

    bounds = [torch.tensor([0, x.shape[0]], dtype=torch.int32) for x in (q, k)]
    return oracle.dense(q, k, v, *bounds, scale=1.0, **options)


def test_visible_is_the_formula() -> None:
    for size, leading, causal in (
        (None, 0, True),
        (3, 0, True),
        (3, 2, True),
        (0, 2, True),
        (3, 2, False),
        (None, 0, False),
    ):
        seen = visible(torch.arange(-3, 12), torch.arange(10), size, leading, causal)
        for i, p in enumerate(range(-3, 12)):
            for k in range(10):
                if causal:
                    wanted = k <= p and (size is None or p - k < size or k < leading)
                else:
                    wanted = size is None or abs(p - k) < size or k < leading
                assert bool(seen[i, k]) == wanted, (size, leading, causal, p, k)


def test_rows_restrict_the_truth() -> None:
    inputs = make(Case(q_lens=(20, 0, 9), tail=2, size=8))
    full, some = inputs.truth(), inputs.truth(torch.tensor([3, 19, 25]))
    for name, everything, chosen in zip(Truth._fields, full, some, strict=True):
        torch.testing.assert_close(chosen, everything[[3, 19, 25]], msg=name)
    assert full.rows.tolist() == list(range(29))


@pytest.mark.parametrize("layout", ["hnd", "nhd", "packed", "padded"])
@pytest.mark.parametrize("quant", [None, KVQuant(torch.float8_e4m3fn, "token"), KVQuant(torch.int8, "token")], ids=str)
def test_everything_unseen_is_poison(quant: KVQuant | None, layout: str) -> None:
    case = Case(kv_lens=(100, 40), size=20, quant=quant, layout=layout)
    cache = make(case).cache
    poisoned = (cache.k == -128) if cache.k.dtype == torch.int8 else cache.k.isnan()
    assert (~poisoned).any(-1).sum() == 2 * 20 * case.num_kv_heads
    if quant is not None:
        assert (~cache.k_scale.isnan()).sum() == 2 * 20 * case.num_kv_heads


def test_freed_pages_and_holes_have_hostile_entries() -> None:
    inputs = make(Case(kv_lens=(200, 30), size=40))
    table, num_pages = inputs.block_table, inputs.cache.num_pages
    exists = (table >= 0) & (table < num_pages)
    assert exists[0].nonzero().flatten().tolist() == [10, 11, 12]
    assert exists[1].nonzero().flatten().tolist() == [0, 1]
    assert {-1, 2**31 - 1, num_pages, -(2**31)} <= set(table[0].tolist())
    holed = make(Case(kv_lens=(200, 30), size=40, holes=True))
    exists = (holed.block_table >= 0) & (holed.block_table < holed.cache.num_pages)
    assert exists.sum(1).tolist() == [2, 1]


def test_no_page_serves_twice() -> None:
    inputs = make(Case(kv_lens=(200, 30, 77), table="flat", page_size=8))
    ids = inputs.block_table[0]
    ids = ids[(ids >= 0) & (ids < inputs.cache.num_pages)]
    assert len(ids) == 25 + 4 + 10 == len(ids.unique())
    assert ids.tolist() != sorted(ids.tolist())


def test_canary_counts_writes_outside() -> None:
    canary = Canary.around(torch.zeros(6, 2, 8), 8, torch.bfloat16, owned_rows=4)
    canary.out[:4] = 0
    assert canary.broken() == 0
    canary.out[4] = 0
    canary.buffer[..., -1] = 0
    assert canary.broken() == 2 * 8 + 8 * 3


def test_edges_of_a_window() -> None:
    case = Case(kv_lens=(100,), size=20, global_tokens=3, split_size=64)
    assert case.edges(0) == [0, 2, 3, 63, 64, 79, 80, 95, 96, 98, 99]


def test_pairwise_covers_every_pair() -> None:
    options = {"a": range(5), "b": "xyz", "c": [None, 1.5], "d": range(4), "e": [True, False]}
    cases = pairwise(options)
    assert len(cases) <= 24
    assert cases == pairwise(options)
    for (first, xs), (second, ys) in combinations(options.items(), 2):
        assert {(x, y) for x in xs for y in ys} == {(case[first], case[second]) for case in cases}


def test_pairwise_of_a_few_options() -> None:
    assert pairwise({"a": [0, 1]}) == [{"a": 0}, {"a": 1}]
    assert len(pairwise({"a": [0, 1], "b": [0, 1], "c": [0, 1]})) == 4
    assert pairwise({}) == []


@pytest.mark.parametrize(
    "tests",
    [alone(PAGED), in_pairs(PAGED), alone(DENSE, dense=True), in_pairs(DENSE, dense=True), WRONG],
    ids=["paged alone", "paged pairs", "dense alone", "dense pairs", "wrong calls"],
)
def test_no_two_tests_of_a_list_have_one_name(tests: list[object]) -> None:
    names = [str(test) for test in tests]
    assert len(set(names)) == len(names)


def test_an_unknown_operator_has_no_backends_to_run_tests_for() -> None:
    assert "reference" in impls("merge")
    for parametrise in (impls, each_backend):
        with pytest.raises(ValueError, match=r"^op: wanted one of attention, append, quantise, merge, got 'atention'$"):
            parametrise("atention")


def test_case_names_what_differs() -> None:
    assert str(Case()) == "default"
    assert (
        str(Case(quant=KVQuant(torch.int8, "channel", "token"), kv_lens=(3, 4)))
        == "kv_lens=3+4,quant=int8-channel-token"
    )


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 5, 20, 101])
def test_the_shares_of_processes_begin_with_as_many_long_tests(count: int, processes: int) -> None:
    tests = list(range(count))
    ordered = longest_first(tests, lambda i: i % 10 == 0, processes)
    assert sorted(ordered) == tests
    left, longs = ordered, []
    for i in range(processes):  # as xdist cuts them
        share, left = left[: len(left) // (processes - i)], left[len(left) // (processes - i) :]
        longs.append(sum(test % 10 == 0 for test in share))
        assert share[: longs[-1]] == [test for test in share if test % 10 == 0]
    if count >= 10 * processes:
        assert max(longs) - min(longs) <= 1
