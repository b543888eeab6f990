"""``swath bench tune``: rows around the present one, that they are what is launched, and what it prints."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="rows are of kernels in Triton")
pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from bench_rows import timed_row
from compile_rows import OPTIONS
from compile_variants import problem_of
from typer.testing import CliRunner

from conftest import SmallClock, plan_for
from swath.backends.hopper.heuristics import HOPPER, HopperHeuristics, HopperLaunch
from swath.backends.triton.heuristics import TRITON, Heuristics
from swath.backends.triton.heuristics.launch import SplitLaunch, TileLaunch, fitting
from swath.backends.triton.runtime import KernelCall
from swath.backends.triton.work import Work
from swath.bench import cases, tune
from swath.bench.case import BenchCase, Groups
from swath.bench.clock import GpuClock
from swath.bench.machine import describe
from swath.bench.results import Origin, Row, Timed, timed
from swath.bench.tune import DECIDED_BY_CALL, Candidate, Search, candidates_of, search_case, source_of
from swath.cli import app
from swath.problem import Problem
from swath.target import Target, interpreting

H200 = Target("sm_90", 132)
SOURCE = "A GPU, torch 2"
ORIGIN = describe(torch.device("cpu"), "abc", "swath bench tune")
CALLS = {
    "splits": ({"queries": "decode"}, "triton"),
    "tiles": ({"queries": "dense"}, "triton"),
    "hopper": ({"queries": "dense", "storage": "bf16"}, "hopper"),
}
"""A call that uses each schedule, and whose tiles."""


def problem(**row: str) -> Problem:
    return problem_of({name: values[0] for name, values in OPTIONS.items()} | row)


def found(schedule: str) -> tuple[list[Candidate], Any]:
    """The rows of a schedule, and the launch that heuristics make; of None, the backend's own."""
    row, tiles = CALLS[schedule]
    call = problem(**row)

    def launched(heuristics: Heuristics | None = None) -> KernelCall:
        return plan_for(tiles, call, H200, heuristics).calls[0]

    return candidates_of(call, H200, schedule, tiles, SOURCE), launched


def hopper_row(row: Candidate) -> HopperLaunch:
    """The row that a candidate has for Hopper's tiles."""
    assert isinstance(row.heuristics, HopperHeuristics)
    return row.heuristics.hopper_launch(Work(problem(), H200))


@pytest.mark.parametrize("schedule", CALLS)
def test_the_first_row_is_the_present_one(schedule: str) -> None:
    rows, launched = found(schedule)
    assert str(launched(rows[0].heuristics)) == str(launched())
    assert launched(rows[0].heuristics).args == launched().args
    assert [row.name.endswith("present") for row in rows] == [True] + [False] * (len(rows) - 1)
    assert len({row.name for row in rows}) == len(rows) > 10


@pytest.mark.parametrize("schedule", ["splits", "tiles"])
def test_a_row_is_what_is_launched(schedule: str) -> None:
    rows, launched = found(schedule)
    for row in rows:
        said = dict(pair.split(" ") for pair in row.name.removesuffix(", present").split(", "))
        call = launched(row.heuristics)
        values = {"block_n": call.args["BLOCK_N"], "warps": call.options["num_warps"], "stages": call.args["STAGES"]}
        values |= {"num_splits": call.args.get("num_splits"), "block_m": call.args["BLOCK_M"]}
        assert said == {field: str(values[field]) for field in said}


def test_a_hopper_row_is_what_is_launched() -> None:
    rows, launched = found("hopper")
    for row in rows:
        assert launched(row.heuristics).args["LAUNCH"] == hopper_row(row)
    paged = problem(queries="ragged", storage="bf16")
    boxes = {hopper_row(row).box_rows for row in candidates_of(paged, H200, "hopper", "hopper", SOURCE)}
    assert boxes == {16}, "pages of 16, whatever the tile"


def test_a_hopper_line_has_the_fields_that_differ() -> None:
    rows = candidates_of(problem(queries="dense", head_dim="64", window="both sides"), H200, "hopper", "hopper", SOURCE)
    present = hopper_row(rows[0])
    differing = {f.name for f in fields(present) if getattr(present, f.name) != f.default}
    by_place, by_call = {"block_n", "stages", "q_stages"}, {*DECIDED_BY_CALL}
    assert set(re.findall(r"(\w+)=", rows[0].line)) == differing - by_place - by_call
    again = from_line(rows[0], "hopper")
    assert isinstance(again, HopperHeuristics)
    assert again.hopper_launch(Work(problem(), H200)) == present


@pytest.mark.parametrize("tiles", ["triton", "hopper"])
def test_other_rows_of_a_mixed_batch_stay(tiles: str) -> None:
    mixed = problem(queries="ragged", storage="bf16")
    split = candidates_of(mixed, H200, "splits", tiles, SOURCE)[5]
    plan, untuned = plan_for(tiles, mixed, H200, split.heuristics), plan_for(tiles, mixed, H200)
    assert str(plan.calls[0]) != str(untuned.calls[0])
    assert str(plan.calls[-1]) == str(untuned.calls[-1])


def test_a_row_for_tiles_over_16_bits_leaves_those_over_the_cache() -> None:
    """Where some sequences are dequantised and others have no room, a plan has tiles of both kinds."""
    mixed = problem(queries="long ragged", storage="int8 token")
    tile = candidates_of(mixed, H200, "tiles", "triton", SOURCE)[5]
    plan, untuned = (plan_for("triton", mixed, H200, given).calls[-2:] for given in (tile.heuristics, None))
    assert [call.kernel.fn.__name__ for call in plan] == ["tile_kernel"] * 2
    assert str(plan[0]) != str(untuned[0])
    assert str(plan[1]) == str(untuned[1])


@pytest.mark.parametrize("schedule", CALLS)
def test_rows_differ_in_two_fields_at_most(schedule: str) -> None:
    names = [row.name.removesuffix(", present").split(", ") for row in found(schedule)[0]]
    changes = [sum(a != b for a, b in zip(names[0], name, strict=True)) for name in names]
    assert set(changes) == {0, 1, 2}


def test_what_the_table_would_cut_is_marked() -> None:
    rows, launched = found("splits")
    F = launched().args["F"]
    assert {row.cut for row in rows} == {False, True}
    for row in rows:
        launch = row.heuristics.split_launch(Work(problem(), H200), 16)
        assert row.cut == (fitting(launch, F, 16, H200) != launch)


def from_line(row: Candidate, schedule: str) -> Heuristics:
    """What the table would launch with the line in it."""
    names = {"SplitLaunch": SplitLaunch, "TileLaunch": TileLaunch, "HopperLaunch": HopperLaunch}
    launch = eval(row.line, names)
    if schedule == "hopper":
        assert row.line.endswith(f"  # {SOURCE}")
        found = hopper_row(row)
        by_call = {name: getattr(found, name) for name in DECIDED_BY_CALL}
        launch = replace(launch, **by_call)
        return replace(HOPPER, hopper_launch=lambda _work: launch)
    assert launch.source == SOURCE
    if schedule == "tiles":
        return replace(TRITON, tile_launch=lambda _work: launch)
    return replace(TRITON, split_launch=lambda *_: launch)


@pytest.mark.parametrize("schedule", CALLS)
def test_the_line_makes_the_same_launch(schedule: str) -> None:
    rows, launched = found(schedule)
    unruly = [row for row in rows if "does not give" in row.line]
    assert bool(unruly) == (schedule == "splits")
    for row in rows:
        heuristics = from_line(row, schedule)
        if row in unruly:
            assert str(launched(heuristics)) != str(launched(row.heuristics))
            heuristics = replace(heuristics, num_splits=row.heuristics.num_splits)
        assert str(launched(heuristics)) == str(launched(row.heuristics))
        assert launched(heuristics).args.get("LAUNCH") == launched(row.heuristics).args.get("LAUNCH")


def test_a_number_of_splits_becomes_resident_programs() -> None:
    """Where the rule can be made to give it."""
    rows = candidates_of(problem(queries="decode"), Target("sm_90", 16), "splits", "triton", SOURCE)
    assert any("resident=" in row.line for row in rows)
    assert not all("resident=" in row.line for row in rows)


def test_a_schedule_that_a_call_does_not_use() -> None:
    with pytest.raises(NotImplementedError, match="launches no splits"):
        candidates_of(problem(queries="dense"), H200, "splits", "triton", SOURCE)


def test_the_source_is_as_in_the_tables() -> None:
    origin = replace(ORIGIN, gpu="NVIDIA H200", torch="2.11.0+cu130", triton="3.6.0", date="2026-11-22")
    assert source_of(origin) == "H200, torch 2.11, Triton 3.6, 2026-11-22"


SMALL = BenchCase(
    name="small", op="decode", draw=Groups(((1, 1, 90),)), num_kv_heads=1, dtype=torch.float32, size=50, global_tokens=3
)  # fmt: skip
SEARCHED = {
    "splits": SMALL,
    "tiles": replace(SMALL, op="prefill", draw=Groups(((1, 20, 40),))),
    "hopper": replace(SMALL, op="prefill", draw=Groups(((1, 300, 700),)), dtype=torch.bfloat16),
}


def search(schedule: str) -> Search:
    """Over rows with one change, on the GPU or else in the interpreter."""
    clock = GpuClock() if torch.cuda.is_available() else SmallClock()
    (only,) = search_case(SEARCHED[schedule], schedule, ORIGIN, clock, 1, lambda _text: None)
    return only


@pytest.mark.parametrize("schedule", SEARCHED)
def test_triton_rows_pass_the_gate_or_say_why_not(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (torch.cuda.is_available() or (interpreting() and schedule != "hopper")):
        pytest.skip("launches kernels: needs a GPU, or TRITON_INTERPRET=1 for those in Triton")
    if schedule == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    monkeypatch.setattr(tune, "MOST_CHANGES", 1)
    result = search(schedule)
    assert {row.status for row in result.rows} <= {"ok", "unable", "failed"}, "no right launch is refused"
    assert result.rows[0].status == "ok"
    assert sum(row.status == "ok" for row in result.rows) > 3
    for candidate, row in zip(result.candidates, result.rows, strict=True):
        assert (row.status == "unable") == candidate.cut
        if isinstance(row, Timed):
            assert row.x_present is not None
            assert row.x_present > 0
    launches = [row.launch for row in timed(result.rows)]
    assert len(set(launches)) > 3


def made(*times: float | None) -> Search:
    """A search whose rows took these times; the present one is the first, None failed to compile."""
    rows: list[Row] = []
    candidates = found("splits")[0][: len(times)]
    for candidate, us in zip(candidates, times, strict=True):
        said: dict[str, Any] = dict(case="small", op="decode", shape="2 x 1", provider=candidate.name, origin=ORIGIN)
        if us is None:
            rows.append(Row(**said, status="failed", reason="OutOfResources: shared memory"))
        else:
            share = None if times[0] is None else us / times[0]
            rows.append(timed_row(us, **said, launch="split_kernel x 1", x_present=share))
    return Search("splits", candidates, rows)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((10.0, 12.0), "the present row is the fastest"),
        ((10.0, 9.0), "x0.900 of the present row"),
        ((10.0, 9.95), "x0.995 of the present row, a tie up to 1%"),
        ((None, 9.0), "the present row has no time"),
        ((None, None), "no row has a time"),
    ],
)
def test_verdicts(times: tuple[float | None, ...], said: str) -> None:
    assert made(*times).verdict() == said


def test_it_prints_the_rows_and_the_line_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest first, failures with their reasons, and a case that uses no such schedule does not end it."""

    def searched(case: BenchCase, _schedule: None, origin: Origin, *_others: Any) -> list[Search]:
        assert origin.torch == torch.__version__
        if case.name == "other":
            raise NotImplementedError("launches no splits")
        return [made(10.0, 9.0, None)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cases, "CASES", (replace(SMALL, name="other"), SMALL))
    monkeypatch.setattr("swath.bench.clock.GpuClock", SmallClock)
    monkeypatch.setattr(tune, "search_case", searched)
    result = CliRunner().invoke(app, ["bench", "tune"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    present, faster, failing = (row.name for row in found("splits")[0][:3])
    assert "other: launches no splits" in lines
    timed = [line for line in lines if line.startswith((present, faster))]
    assert [line.split(", ")[-1] for line in timed][1].startswith("present")
    assert timed[0].endswith("0.900")
    assert f"{failing}: failed, OutOfResources: shared memory" in lines
    assert "splits: x0.900 of the present row" in lines
    assert " ".join(found("splits")[0][1].line.split()) in lines


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "tune", "--op", "decode"])
    assert result.exit_code == 2
    assert result.output == "swath: tune needs a GPU that torch can use, and Triton\n"
