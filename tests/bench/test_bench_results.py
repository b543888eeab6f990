"""What becomes of benchmark results: comparing, goals, plots, the report, and the commands around them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from bench_rows import row, write
from cli_calls import output_of
from typer.testing import CliRunner

from conftest import SmallClock
from swath.bench import cases, run
from swath.bench.case import BenchCase, Groups
from swath.bench.cases import BY_NAME, CASES
from swath.bench.compare import changes
from swath.bench.goals import GOALS, X_FLOOR, X_PEER
from swath.bench.judge import best, by_case, outcomes, verdict
from swath.bench.key import KEY
from swath.bench.results import Row, Timed, read
from swath.bench.table import case_table, unsteady
from swath.bench.units import in_words
from swath.cli import app, bench_session
from swath.cli.bench import command_of

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def test_changes_are_told_from_ties() -> None:
    before = [row("B64 8k p16", "swath-triton", 100), row("llama 8k full", "swath-triton", 100)]
    before += [row("B8 4k p32", "fa3", 100), row("B1 128k p16", "swath-triton", 100), row("gemma 16k", "fa3", 1)]
    after = [row("B64 8k p16", "swath-triton", 98), row("llama 8k full", "swath-triton", 102)]
    after += [row("B8 4k p32", "fa3", 200), row("B1 128k p16", "swath-triton", None)]
    found = changes(before, after)
    assert [change.verdict for change in found] == ["faster", "same", "slower", "gone"]
    assert [change.loses(0.05) for change in found] == [False, False, False, True]
    assert found[1].loses(0.01)


def test_compare_fails_beyond_the_threshold(tmp_path: Path) -> None:
    before = write(tmp_path / "a.jsonl", [row("B64 8k p16", "swath-triton", 100.0)])
    after = write(tmp_path / "b.jsonl", [row("B64 8k p16", "swath-triton", 107.0)])
    assert "1.070 slower" in output_of("bench", "compare", before, after, code=1)
    assert "1.070 slower" in output_of("bench", "compare", before, after, "--threshold", "0.1")
    assert "0.935 faster" in output_of("bench", "compare", after, before)
    other = write(tmp_path / "c.jsonl", [row("B8 4k p32", "swath-triton", 1.0)])
    assert "nothing in common" in output_of("bench", "compare", before, other, code=2).replace(
        "no case and provider", "nothing"
    )


def test_the_verdict_is_against_the_best_peer_and_the_goals() -> None:
    ours = row("B64 8k p16", "swath-triton", 500.0)
    rows = [ours, row("B64 8k p16", "swath-hopper", 480.0), row("B64 8k p16", "scalar", 100.0)]
    rows += [row("B64 8k p16", "fa3", 540.0), row("B64 8k p16", "flashinfer", 484.0), row("B64 8k p16", "vllm", None)]
    assert best(rows) is rows[2]
    assert verdict(rows) == "1.01 x flashinfer (a tie); x0.98 of the floor, goal x1.03"
    assert verdict([ours]) == "x1.02 of the floor, goal x1.03"
    assert verdict(rows[3:]) == ""
    assert "behind, goal 1" in verdict([row("llama 8k full", "swath-triton", 2), row("llama 8k full", "fa3", 1)])


def test_ratios_are_taken_within_a_round() -> None:
    ours = row("gemma 16k", "swath-triton", 20.0, rounds_us=[10.0, 20.0, 40.0])
    peer = row("gemma 16k", "fa3", 40.0, rounds_us=[20.0, 40.0, 80.0])
    assert verdict([ours, peer]).startswith("2.00 x fa3")


def test_goals_name_cases_that_exist() -> None:
    named = {name for goal in GOALS for name in (goal.case, *goal.others)}
    assert named | X_FLOOR.keys() | X_PEER.keys() <= BY_NAME.keys()
    assert len({goal.name for goal in GOALS}) == len(GOALS)


def test_goals_are_judged() -> None:
    scalar, ours = row("000a p32", "scalar", 100.0), row("000a p32", "swath-triton", 9.0)
    (found,) = outcomes([scalar, ours])
    assert (found.ratio, found.reached) == (pytest.approx(0.09), True)
    (found,) = outcomes([scalar, replace(ours, us=11.0, rounds_us=[11.0])])
    assert not found.reached
    assert outcomes([ours]) == outcomes([scalar]) == []


def test_a_mixed_batch_is_judged_against_its_parts() -> None:
    whole, *parts = (
        row("mixed 2 x 2k + 62 at 16k", "swath-triton", 22.0, rounds_us=[20.0, 22.0, 92.0]),
        row("mixed, chunks alone at 16k", "swath-hopper", 12.0, rounds_us=[10.0, 12.0, 50.0]),
        row("mixed, decodes alone at 16k", "swath-triton", 8.0, rounds_us=[10.0, 8.0, 30.0]),
    )
    others = [row(parts[0].case, "swath-triton", 13.0), row(parts[1].case, "fa3", 1.0)]
    (found,) = outcomes([whole, *parts, *others])
    assert (found.ratio, found.reached) == (pytest.approx(1.1), True), "the fastest of ours, within a round"
    (found,) = outcomes([replace(whole, rounds_us=[40.0, 24.0, 92.0]), *parts])
    assert not found.reached
    assert outcomes([whole, parts[0], *others]) == []


def test_the_parts_of_a_mixed_batch_make_it_up() -> None:
    by_name = {case.name: case for case in cases.select(tag=("mixed",))}
    goals = [goal for goal in GOALS if len(goal.others) > 1]
    assert by_name.keys() == {name for goal in goals for name in (goal.case, *goal.others)}
    for goal in goals:
        whole, parts = by_name[goal.case], [by_name[name] for name in goal.others]
        assert whole.draw == Groups(tuple(group for part in parts for group in part.draw.groups))
        assert {replace(part, name=whole.name, op="mixed", draw=whole.draw) for part in parts} == {whole}


TINY = tuple(
    BenchCase(
        name=f"tiny {n}",
        op="decode",
        draw=Groups(((1, 1, n),)),
        num_kv_heads=1,
        dtype=torch.float32,
        tags=("cpu", "quick"),
    )
    for n in (20, 30, 40)
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three tiny cases on a small clock, and the file for their results."""
    monkeypatch.setattr(cases, "CASES", TINY)
    monkeypatch.setattr("swath.bench.clock.CpuClock", SmallClock)
    return tmp_path / "rows.jsonl"


def names_in(path: Path) -> list[str]:
    return list(by_case(read(path))) if path.exists() else []


CPU = ("run", "--device", "cpu", "--provider", "swath", "--rounds", 1)


def test_a_run_writes_rows_that_say_where_they_come_from(tiny: Path) -> None:
    said = output_of("bench", *CPU, "--quick", "--output", tiny, "--commit", "abc123")
    assert "3 cases written" in said
    assert names_in(tiny) == ["tiny 20", "tiny 30", "tiny 40"]
    for one in read(tiny):
        assert isinstance(one, Timed)
        assert one.origin.cpu
        assert one.origin.command.split()[0] == "swath"
        assert one.budget_used is not None


def test_rounds_that_spread_get_a_warning() -> None:
    steady = row("B64 8k p16", "swath-triton", 500.0, rounds_us=[480.0, 500.0, 570.0])
    spread = row("B64 8k p16", "fa3", 500.0, rounds_us=[480.0, 500.0, 590.0])
    (said,) = unsteady([steady, spread, row("B64 8k p16", "vllm", None)])
    assert said.startswith("fa3: its rounds spread by 22%")
    shown = case_table([steady, spread])  # the column has the warning's figure
    assert [*shown.columns[2].cells] == ["18%", "22%"]


@pytest.mark.parametrize(
    ("us", "said"),
    [(7.942, "7.942 us"), (481.84, "481.8 us"), (999.6, "999.6 us"), (3037.2, "3.037 ms"), (2e7, "20000 ms")],
)
def test_times_are_in_the_unit_that_suits(us: float, said: str) -> None:
    assert in_words(us) == said


def test_a_table_has_one_unit() -> None:
    rows = [row("llama 8k full", "swath-hopper", 744.7), row("llama 8k full", "torch", 35910.0)]
    columns = {column.header: list(column.cells) for column in case_table(rows).columns}
    assert columns["us"] == ["744.7", "35910"]
    rows = [row("mistral 16k", "swath-hopper", 2635.0), row("mistral 16k", "fa3", 3093.0, read_us=1500.0)]
    columns = {column.header: list(column.cells) for column in case_table(rows).columns}
    assert columns["ms"] == ["2.635", "3.093"]
    assert columns["plain read ms"] == ["", "1.5"]


def test_the_command_is_what_makes_the_rows() -> None:
    said = [
        "bench",
        "run",
        "--resume",
        "here/a file",
        "--op",
        "decode",
        "--budget=5",
        "--match",
        "B64 8k",
        "--commit",
        "x",
    ]
    assert command_of(said) == "swath bench run --op decode --match 'B64 8k'"


def test_a_budget_stops_and_resume_goes_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 10_000, 10))  # each look at the clock takes 10 s
    monkeypatch.setattr(bench_session.time, "monotonic", lambda: float(next(ticks)))
    said = output_of("bench", *CPU, "--output", tiny, "--budget", 45)
    assert f"2 left, go on with: swath bench run --resume {tiny}" in said
    assert names_in(tiny) == ["tiny 20"]
    output_of("bench", *CPU, "--resume", tiny)
    assert names_in(tiny) == ["tiny 20", "tiny 30", "tiny 40"]
    assert len(read(tiny)) == 3
    assert "0 cases written" in output_of("bench", *CPU, "--resume", tiny)
    assert "give one" in output_of("bench", *CPU, "--resume", tiny, "--output", tiny, code=2)


def test_ctrl_c_keeps_what_was_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.measure_case

    def interrupted(case: BenchCase, *others: Any) -> list[Row]:
        if case.name == "tiny 30":
            raise KeyboardInterrupt
        return real(case, *others)

    monkeypatch.setattr(run, "measure_case", interrupted)
    said = output_of("bench", *CPU, "--output", tiny, code=130)
    assert f"interrupted; 1 case written to {tiny}; 2 left" in said
    assert names_in(tiny) == ["tiny 20"]


def test_a_wrong_result_of_ours_fails_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.bench.gate.budget_used", lambda *_args, **_options: 1.5)
    assert "swath itself was refused" in output_of("bench", *CPU, "--output", tiny, "--match", "tiny 20", code=2)
    (only,) = read(tiny)
    assert only.status == "refused"
    assert not isinstance(only, Timed)


def test_list_names_cases_and_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = output_of("bench", "list", "--match", "000a p32")
    assert "000a p32" in said
    assert "001 B2" not in said
    assert all(part in said for part in KEY)
    for answer in ("swath-cpu yes", "torch yes"):
        assert answer in said
    listed = json.loads(CliRunner().invoke(app, ["bench", "list", "--match", "000a", "--json"]).stdout)
    assert [case["name"] for case in listed["cases"]] == [case.name for case in CASES if "000a" in case.name]
    assert listed["cases"][0]["shape"] == BY_NAME["000a p32"].shape
    assert {found["name"]: found["missing"] is None for found in listed["providers"]}["swath-cpu"]
    assert listed["key"] == KEY
    assert "wanted something that a case has" in output_of("bench", "list", "--match", "no such case", code=2)


def test_without_a_gpu_it_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in output_of("bench", "run", "--provider", "swath-cpu", "--rounds", 1, "--output", tiny)
    assert "needs a GPU" in output_of("bench", "run", "--device", "cuda", "--output", tiny, code=2)
    assert "one that can run here" in output_of("bench", "run", "--provider", "fa3", "--output", tiny, code=2)
    assert "provider: wanted one of" in output_of("bench", "run", "--provider", "fa9", "--output", tiny, code=2)
