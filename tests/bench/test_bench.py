"""The benchmark's cases, gate, providers and runs, on the CPU and in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SmallClock
from swath import KVQuant, Window, bounds
from swath.bench import providers, results, run
from swath.bench.case import BenchCase, Extend, Groups, LogUniform, UniformKeys, visible_pairs, work_of
from swath.bench.cases import BY_NAME, CASES, select
from swath.bench.clock import GpuClock
from swath.bench.gate import Gate
from swath.bench.inputs import Inputs, make_inputs
from swath.bench.machine import describe
from swath.bench.masks import Chunks, Images
from swath.bench.providers import PROVIDERS, Provider, choose
from swath.bench.results import Timed
from swath.target import interpreting
from swath.testing.ranges import Rule

CPU = torch.device("cpu")
SMALL = BenchCase(
    name="small", op="decode", draw=Groups(((2, 1, 70),)), dtype=torch.float32, size=20, global_tokens=3
)  # fmt: skip
ORIGIN = describe(CPU, "abc", "swath bench run")
WINDOWS = (Window(), Window(1), Window(5), Window(5, 3), Window(100, 2), Window(0, 3))


def inputs_of(case: BenchCase, seed: int = 0) -> Inputs:
    return make_inputs(case.drawn(CPU), CPU, seed)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pairs_are_what_the_mask_leaves(window: Window) -> None:
    for first, kv_len in ((0, 20), (7, 20), (19, 20), (0, 1), (2, 4), (20, 20)):
        mask = window.mask(torch.arange(first, kv_len), torch.arange(kv_len))
        assert visible_pairs(window, first, kv_len) == int(mask.sum())


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("leading", [0, 3, 40])
def test_work_counts_what_some_query_sees(window: int | None, leading: int) -> None:
    groups = ((1, 1, 70), (1, 9, 33), (1, 30, 30))
    case = replace(SMALL, op="mixed", size=window, global_tokens=leading, draw=Groups(groups)).drawn(CPU)
    masks = [case.window.mask(torch.arange(kv - q, kv), torch.arange(kv)) for _, q, kv in groups]
    work = work_of(case)
    assert work.flops == 4 * 64 * 4 * sum(int(mask.sum()) for mask in masks)
    keys = sum(int(mask.any(0).sum()) for mask in masks)
    assert work.nbytes == keys * 2 * 2 * 64 * 4 + 2 * 40 * 4 * 64 * 4
    kept = 0
    for kv in case.kv_lens:
        seen_next = case.window.mask(torch.tensor([kv]), torch.arange(kv))[0]
        kept += sum(bool(page.any()) for page in seen_next.split(16))
    assert work.cache_bytes == kept * 16 * 2 * 2 * 64 * 4


def test_work_of_narrow_values() -> None:
    shape: dict[str, Any] = dict(size=None, global_tokens=0, head_dim=192, v_head_dim=128)
    case = replace(SMALL, op="prefill", draw=Groups(((1, 30, 30),)), **shape).drawn(CPU)
    work = work_of(case)
    assert work.flops == 2 * (192 + 128) * 4 * 30 * 31 // 2
    assert work.nbytes == 30 * (2 + 4) * (192 + 128) * 4, "two kv heads, four query heads"
    assert work.cache_bytes == 32 * 2 * (192 + 128) * 4


@pytest.mark.parametrize("rule", [Chunks(8), Images(5, 12, 9), Images(5, 12)], ids=str)
def test_work_counts_what_ranges_show(rule: Rule) -> None:
    """By the bounds that ``swath.bounds`` makes of the same mask."""
    groups = ((1, 9, 33), (1, 30, 30))
    case = replace(SMALL, op="prefill", size=None, global_tokens=0, ranges=rule, draw=Groups(groups)).drawn(CPU)
    pairs = keys = 0
    for q_len, kv_len in ((9, 33), (30, 30)):
        p = torch.arange(kv_len - q_len, kv_len)[None]
        if isinstance(rule, Images):
            spans = torch.tensor([[(7, 12), (19, 24), (31, min(36, kv_len))]])
            made = bounds.blocks(p, spans, size=rule.size)
        else:
            made = bounds.chunked(p, 8)
        assert [tuple(row) for row in made[0].tolist()] == case.ranges_of(case.kv_lens.index(kv_len))
        mask = Window(bounds=made[0]).mask(p[0], torch.arange(kv_len))
        pairs, keys = pairs + int(mask.sum()), keys + int(mask.any(0).sum())
    work = work_of(case)
    assert work.flops == 4 * 64 * 4 * pairs
    assert work.nbytes == keys * 2 * 2 * 64 * 4 + 2 * 39 * 4 * 64 * 4
    assert str(rule) in case.shape


def test_floors_are_those_of_the_peers_page() -> None:
    """In us, at 4.49 TB/s and 730 TFLOP/s or so: figures that were worked out apart from this code."""
    floors = {
        "B8 4k p32": 29.9, "B64 8k p16": 478, "B1 128k p16": 119.5, "B128 16k w1024 p16": 120,
        "B128 16k w128 p16": 7.9, "B64 8k p16 int8 channel": 239, "B128 16k w1024 p16 int8 channel": 60,
        "4 steps, B64 16k w4096 p16": 240,
    }  # fmt: skip
    for name, want in floors.items():
        work = work_of(BY_NAME[name].drawn(CPU))
        assert work.nbytes / 4.49e6 == pytest.approx(want, rel=0.01)
    flops = {name: work_of(BY_NAME[name].drawn(CPU)).flops for name in ("llama 8k full", "mistral 16k")}
    assert flops["mistral 16k"] / flops["llama 8k full"] == pytest.approx(2492 / 712, rel=0.01)


def test_cases_are_told_apart_and_can_be_drawn() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 100
    for case in CASES:
        lengths = case.draw.lengths(CPU)
        assert len(lengths.q) == len(lengths.kv)
        assert all(0 < q <= kv for q, kv in zip(lengths.q, lengths.kv, strict=True))
        assert lengths == case.draw.lengths(CPU)
        assert (case.op == "decode") == (set(lengths.q) == {1})
        assert case.op != "steps" or len(set(lengths.q)) == 1
        assert case.drawn(CPU).row_counts == lengths.q
        assert case.shape


def test_draws_stay_in_their_range() -> None:
    keys = LogUniform(200, 128, 4096).lengths(CPU).kv
    assert min(keys) >= 128
    assert max(keys) <= 4096
    assert sum(n < 724 for n in keys) / 200 == pytest.approx(0.5, abs=0.12)  # the middle of the logarithms
    assert set(UniformKeys(500, 1, 5).lengths(CPU).kv) == {1, 2, 3, 4, 5}
    lengths = Extend(1024).lengths(CPU)
    assert max(lengths.q) < 512
    assert all(kv - q in range(1, 512) for q, kv in zip(lengths.q, lengths.kv, strict=True))


@pytest.mark.gpu
def test_the_ragged_table_has_its_authors_lengths() -> None:
    sums = {n: sum(Extend(n).lengths(torch.device("cuda")).q) for n in (1024, 2048, 4096, 8192)}
    assert sums == {1024: 7126, 2048: 15084, 4096: 28463, 8192: 58023}


def test_selection() -> None:
    assert {case.name for case in select(("b64 8K p16 int8 t", "mqa"))} == {"B64 8k p16 int8 token", "MQA, B64 8k p16"}
    assert {case.op for case in select(op="mixed")} == {"mixed"}
    assert all({"cpu", "quick"} <= set(case.tags) for case in select(tag=("cpu", "quick")))
    both = {case.name for on_gpu in (True, False) for case in select(on_gpu=on_gpu)}
    assert both == {case.name for case in CASES}
    for wrong in ({"match": ("no such case",)}, {"tag": ("no such tag",)}, {"op": "mixed", "on_gpu": False}):
        with pytest.raises(ValueError, match="swath bench list"):
            select(**wrong)


FORMS = {
    "decode": SMALL,
    "steps": replace(SMALL, op="steps", draw=Groups(((2, 3, 70),))),
    "prefill": replace(SMALL, op="prefill", draw=Groups(((1, 30, 70), (1, 33, 33)))),
    "dense": replace(SMALL, op="prefill", draw=Groups(((1, 30, 70), (1, 33, 33))), dense=True),
    "mixed": replace(SMALL, op="mixed", draw=Groups(((1, 20, 40), (2, 1, 70)))),
    "int8 channel": replace(SMALL, quant=KVQuant(torch.int8, "channel")),
    "int8 token": replace(SMALL, quant=KVQuant(torch.int8, "token")),
    "e4m3": replace(SMALL, quant=KVQuant(torch.float8_e4m3fn, "tensor")),
    "bf16": replace(SMALL, dtype=torch.bfloat16, size=None, global_tokens=0),
    "sink": replace(SMALL, sink="q"),
    "odd sizes": replace(SMALL, head_dim=80, page_size=48, num_kv_heads=1, group=6),
}
FORMS["images"] = replace(FORMS["dense"], size=None, global_tokens=0, ranges=Images(5, 12, 9))
FORMS["chunks"] = replace(FORMS["prefill"], size=None, global_tokens=0, ranges=Chunks(8))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["swath-cpu", "torch", "scalar-triton"])
def test_providers_pass_the_gate(name: str, form: str) -> None:
    case, provider = FORMS[form], PROVIDERS[name.removesuffix("-triton")]
    if provider.name == "scalar" and not interpreting():
        pytest.skip("the kernel needs a GPU, or TRITON_INTERPRET=1")
    reason = provider.why_not(case)
    if reason is not None:
        ranges = ("images", "chunks")
        assert form in {"torch": ("sink",), "scalar": ("dense", *ranges), "swath-cpu": ()}[provider.name]
        return
    inputs = inputs_of(case)
    verdict = Gate(inputs).check(provider.prepare(inputs)())
    assert verdict.passed, verdict


@pytest.mark.parametrize("form", FORMS)
def test_the_gate_sees_what_is_wrong(form: str) -> None:
    case = FORMS[form]
    inputs = inputs_of(case)
    gate, good = Gate(inputs), PROVIDERS["swath-cpu"].prepare(inputs)()
    off_by_one = replace(inputs, call=replace(inputs.call, case=replace(inputs.call.case, size=(case.size or 70) - 1)))
    if case.ranges:
        off_by_one = replace(inputs, call=replace(inputs.call, ranges=inputs.call.ranges + torch.tensor([1, 0])))
    assert not gate.check(PROVIDERS["swath-cpu"].prepare(off_by_one)()).passed
    assert not gate.check(good * torch.nan).passed
    assert not gate.check(good.roll(1, -1)).passed


def test_the_gate_always_takes_the_last_row_and_one_at_a_window_edge() -> None:
    case = FORMS["dense"]
    rows = Gate(inputs_of(case)).rows
    assert 30 + 33 - 1 in rows
    assert 30 + 20 in rows, "of the second sequence, the first query that key 0 is hidden from"
    assert len(rows) == len(set(rows))


def test_input_sets_differ_and_pages_are_shuffled() -> None:
    one, other = inputs_of(SMALL), inputs_of(SMALL, seed=1)
    assert not torch.equal(one.q, other.q)
    assert not torch.equal(one.pages, other.pages)
    ids, bounds, last = one.flat_pages
    assert sorted(ids.tolist()) == list(range(10))
    assert (bounds.tolist(), last.tolist()) == ([0, 5, 10], [6, 6])


def test_providers_are_chosen_by_name_and_family() -> None:
    assert {p.name for p in choose(("sdpa", "fa3"))} == {"sdpa-cudnn", "sdpa-flash", "fa3", "fa3-fp8", "fa3-fp8-dense"}
    assert {p.name for p in choose(("swath",))} == {name for name in PROVIDERS if name.startswith("swath-")}
    assert len(choose()) == len(PROVIDERS)
    with pytest.raises(ValueError, match="fa3"):
        choose(("fa",))


def test_providers_say_why_not() -> None:
    """Of every case, without their libraries."""
    said = {name: [provider.why_not(case) for case in CASES] for name, provider in PROVIDERS.items()}
    for name, reasons in said.items():
        assert None in reasons, f"{name} can do nothing"
        assert all(reason is None or (reason and "\n" not in reason) for reason in reasons)
    for name in ("fa3", "fa4", "flashinfer"):
        by_case = dict(zip((case.name for case in CASES), said[name], strict=True))
        assert by_case["stream 16k"] == "has no leading tokens"
        assert by_case["B64 8k p16 int8 token"] == "has no cache of int8 token"
        assert by_case["B64 8k p16"] is None


def _measure(case: BenchCase, chosen: tuple[Provider, ...]) -> dict[str, results.Row]:
    rows = run.measure_case(case, chosen, SmallClock(), 3, lambda _text: None, ORIGIN)
    return {row.provider: row for row in rows}


def test_a_run_times_who_passes_and_says_why_not_the_others() -> None:
    def wrong(inputs: Inputs) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros_like(inputs.q)

    def broken(_inputs: Inputs) -> Callable[[], torch.Tensor]:
        raise RuntimeError("no such\nkernel")

    def unable(_inputs: Inputs) -> Callable[[], torch.Tensor]:
        raise NotImplementedError("too large")

    made: list[Any] = [("wrong", wrong), ("broken", broken), ("unable", unable)]
    others = [Provider(name, lambda _case: None, prepare) for name, prepare in made]
    rows = _measure(SMALL, (PROVIDERS["swath-cpu"], PROVIDERS["torch"], *others))
    assert {name: row.status for name, row in rows.items()} == {
        "swath-cpu": "ok", "torch": "ok", "wrong": "refused", "broken": "failed", "unable": "unable"
    }  # fmt: skip
    assert rows["broken"].reason == "RuntimeError: no such kernel"
    assert "error budget" in str(rows["wrong"].reason)
    assert not isinstance(rows["wrong"], Timed)
    figures = rows["swath-cpu"]
    assert isinstance(figures, Timed)
    assert len(figures.rounds_us) == 3
    assert figures.us > 0
    floors = [t / figures.x_floor for t in figures.rounds_us]
    assert 0 < min(floors) <= max(figures.floor_us, max(floors))
    assert figures.budget_used is not None
    assert figures.budget_used <= 1
    assert str(figures.launch).startswith("torch, float32")


def test_the_spread_of_few_runs_lies_within_them() -> None:
    class Uneven(SmallClock):
        def times_us(self, run: run.Run, count: int) -> list[float]:
            run()
            return [9e3, 9e4][:count]

    (row,) = run.measure_case(SMALL, (PROVIDERS["swath-cpu"],), Uneven(), 1, lambda _text: None, ORIGIN)
    assert isinstance(row, Timed)
    low, high = row.us_p10_p90
    assert 9e3 <= low < high <= 9e4


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["decode", "steps", "prefill"])
def test_a_gpu_run_has_all_its_figures(op: str) -> None:
    case = replace(FORMS[op], name=op, op=op, quant=KVQuant(torch.int8, "token"), dtype=torch.bfloat16)
    chosen = choose(("swath", "scalar", "torch"))
    here = tuple(provider for provider in chosen if provider.missing(torch.device("cuda")) is None)
    rows = run.measure_case(case, here, GpuClock(), 3, lambda _text: None, ORIGIN)
    # hopper leaves decode and few rows over 8-bit keys to triton.
    able = [row for row in rows if (row.provider, row.status) != ("swath-hopper", "unable")]
    assert {row.provider for row in able} == {"swath-triton", "scalar", "torch"}
    assert {row.status for row in able} == {"ok"}, rows
    for row in able:
        assert isinstance(row, Timed)
        assert None not in (row.extra_bytes, row.error)
        assert (None not in (row.host_us, row.eager_us, row.read_us)) == (op != "prefill")
        assert row.method == ("eager" if op == "prefill" else "graph")


def test_results_can_be_read_again_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = list(_measure(SMALL, (PROVIDERS["swath-cpu"], PROVIDERS["fa3"])).values())
    assert [row.status for row in rows] == ["ok", "unable"]
    assert results.done(path, ORIGIN) == set()
    results.append(path, rows)
    with path.open("a") as file:
        file.write('{"case": "sma')  # cut short by a crash
    assert results.read(path) == rows
    assert results.done(path, ORIGIN) == {"small"}
    with pytest.raises(ValueError, match="commit"):
        results.done(path, replace(ORIGIN, commit="other"))
    results.append(path, rows[:1])
    assert results.read(path) == [*rows, rows[0]], "what was cut short makes room"
    path.write_text(path.read_text().rstrip("\n"))
    results.append(path, rows[1:])
    assert results.read(path) == [*rows, *rows], "a whole line without its end stays"


def test_every_provider_file_is_registered() -> None:
    folder = Path(providers.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "provider"}
    assert files == {module.__name__.rpartition(".")[2] for module in providers.MODULES}
