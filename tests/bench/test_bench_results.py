"""What becomes of benchmark results: comparing, goals, plots, the report, and the commands around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from bench_rows import ORIGIN, row, write
from typer.testing import CliRunner

from conftest import SmallClock
from swath.bench import cases, report, run
from swath.bench.case import BenchCase, Groups
from swath.bench.cases import BY_NAME, CASES
from swath.bench.compare import changes
from swath.bench.goals import GOALS, X_FLOOR, X_PEER
from swath.bench.judge import best, by_case, outcomes, verdict
from swath.bench.results import Row, Timed, read
from swath.cli import app, bench_session
from swath.cli.bench import command_of

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in ("bench", *arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


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
    assert "1.070 slower" in invoke("compare", before, after, code=1)
    assert "1.070 slower" in invoke("compare", before, after, "--threshold", "0.1")
    assert "0.935 faster" in invoke("compare", after, before)
    other = write(tmp_path / "c.jsonl", [row("B8 4k p32", "swath-triton", 1.0)])
    assert "nothing in common" in invoke("compare", before, other, code=2).replace("no case and provider", "nothing")


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


def sweep_rows() -> list[Row]:
    rows = []
    for case in CASES:
        if "cpu" not in case.tags:
            floor = row(case.name, "x", 1.0).floor_us
            rows += [
                row(case.name, name, floor * x + 5) for name, x in (("swath-triton", 1.1), ("fa3", 1.3), ("scalar", 60))
            ]
    return rows


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    results = write(tmp_path / "rows.jsonl", sweep_rows())
    said = invoke("plot", results, "--output", tmp_path / "plots")
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"bench-{name}.{form}" for name in report.PLOTS for form in ("png", "svg")}
    assert all(name in said for name in names)
    for path in (tmp_path / "plots").iterdir():
        data = path.read_bytes()
        assert data.startswith(PNG) if path.suffix == ".png" else b"</svg>" in data
        assert len(data) > 5000
    first = (tmp_path / "plots" / "bench-cache.svg").read_bytes()
    invoke("plot", results, "--output", tmp_path / "plots")
    assert (tmp_path / "plots" / "bench-cache.svg").read_bytes() == first
    one = write(tmp_path / "one.jsonl", [row("B64 8k p16", "swath-triton", 500.0)])
    invoke("plot", one, "--output", tmp_path / "few")
    assert {path.name for path in (tmp_path / "few").iterdir()} == {"bench-floor-decode.png", "bench-floor-decode.svg"}


def test_plots_leave_baselines_out_and_draw_nothing_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    results = write(tmp_path / "rows.jsonl", [row("B64 8k p16", "swath-triton", None)])
    assert "no measured case" in invoke("plot", results, "--output", tmp_path, code=2)


def test_the_report_has_every_figure_and_its_command() -> None:
    rows = [
        row("B64 8k p16", "swath-triton", 500.0),
        row("B64 8k p16", "fa3", 540.0),
        row("B64 8k p16", "scalar", 9000.0),
    ]
    rows += [row("B64 8k p16", "vllm", None), row("000a p32", "scalar", 100.0), row("000a p32", "swath-triton", 9.0)]
    later = replace(rows[0], origin=replace(ORIGIN, date="2026-01-03"))
    text = report.page({"b.jsonl": rows, "a.jsonl": [later]}, ["bench-floor-decode.png"])
    assert text.index("a.jsonl") < text.index("b.jsonl"), "the newest first"
    cells = "| triton 500 us x1.02 | fa3 540 us x1.11 | 1.08 x fa3 (ahead); x1.02 of the floor, goal x1.03 |"
    assert f"{cells} scalar 9 ms x{rows[2].x_floor:.2f}; vllm: refused |" in text
    assert "```text\nswath bench run --op decode\n```" in text
    assert "| decode, 10x a scalar kernel | 0.09 | 0.1 |" in text
    assert "(img/bench-floor-decode.png)" in text
    assert "img/bench-cache.png" not in text
    more = report.page({"h200-2026-01-03-who.jsonl": [later]}, [])
    assert ", 2026-01-03: who\n" in more, "the heading says what the name says beyond the date"
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.with_plot(readme, rows, ["bench-floor-decode.png"])
    assert report.with_plot(once, rows, ["bench-floor-decode.png"]) == once
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    with pytest.raises(ValueError, match="readme"):
        report.with_plot("no marks", rows, [])


def test_the_committed_page_is_the_report_of_the_committed_results() -> None:
    found = {path.name: read(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))}
    images = [path.name for path in (ROOT / report.IMAGES).glob("bench-*.png")]
    again = "run: swath bench report"
    assert (ROOT / report.PAGE).read_text(encoding="utf-8") == report.page(found, images), again
    shown = report.fullest(found.values())
    readme = (ROOT / report.README).read_text(encoding="utf-8")
    assert report.with_plot(readme, shown, images) == readme, again


def test_plots_show_the_largest_file_and_of_two_as_large_the_newer() -> None:
    small, large = ([row("B64 8k p16", f"p{i}", 500.0) for i in range(n)] for n in (1, 2))
    older = [replace(r, origin=replace(ORIGIN, date="1999-01-01")) for r in large]
    assert report.fullest((small, older, large)) is large
    assert report.fullest((small, older)) is older


def test_report_writes_page_plots_and_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    monkeypatch.chdir(tmp_path)
    assert "checkout" in invoke("report", code=2)
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    assert "no results" in invoke("report", code=2)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    write(tmp_path / "benchmarks" / "results" / "x.jsonl", [row("B64 8k p16", "swath-triton", 500.0)])
    invoke("report")
    assert "bench-floor-decode.png" in (tmp_path / "README.md").read_text()
    assert "B64 8k p16" in (tmp_path / "docs" / "benchmarks.md").read_text()


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
    said = invoke(*CPU, "--quick", "--output", tiny, "--commit", "abc123")
    assert "3 cases written" in said
    assert names_in(tiny) == ["tiny 20", "tiny 30", "tiny 40"]
    for one in read(tiny):
        assert isinstance(one, Timed)
        assert one.origin.cpu
        assert one.origin.command.startswith("swath ")
        assert one.budget_used is not None


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
    said = invoke(*CPU, "--output", tiny, "--budget", 45)
    assert f"2 left, go on with: swath bench run --resume {tiny}" in said
    assert names_in(tiny) == ["tiny 20"]
    invoke(*CPU, "--resume", tiny)
    assert names_in(tiny) == ["tiny 20", "tiny 30", "tiny 40"]
    assert len(read(tiny)) == 3
    assert "0 cases written" in invoke(*CPU, "--resume", tiny)
    assert "give one" in invoke(*CPU, "--resume", tiny, "--output", tiny, code=2)


def test_ctrl_c_keeps_what_was_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.measure_case

    def interrupted(case: BenchCase, *others: Any) -> list[Row]:
        if case.name == "tiny 30":
            raise KeyboardInterrupt
        return real(case, *others)

    monkeypatch.setattr(run, "measure_case", interrupted)
    said = invoke(*CPU, "--output", tiny, code=130)
    assert f"interrupted; 1 case written to {tiny}; 2 left" in said
    assert names_in(tiny) == ["tiny 20"]


def test_a_wrong_result_of_ours_fails_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swath.bench.gate.budget_used", lambda *_args, **_options: 1.5)
    assert "swath itself was refused" in invoke(*CPU, "--output", tiny, "--match", "tiny 20", code=2)
    (only,) = read(tiny)
    assert only.status == "refused"
    assert not isinstance(only, Timed)


def test_list_names_cases_and_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = invoke("list", "--match", "000a p32")
    assert "000a p32" in said
    assert "001" not in said
    for name in ("swath-cpu: here", "torch: here"):
        assert name in said
    assert "wanted something that a case has" in invoke("list", "--match", "no such case", code=2)


def test_without_a_gpu_it_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in invoke("run", "--provider", "swath-cpu", "--rounds", 1, "--output", tiny)
    assert "needs a GPU" in invoke("run", "--device", "cuda", "--output", tiny, code=2)
    assert "one that can run here" in invoke("run", "--provider", "fa3", "--output", tiny, code=2)
    assert "provider: wanted one of" in invoke("run", "--provider", "fa9", "--output", tiny, code=2)
