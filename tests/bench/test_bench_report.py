"""Plots, the report and the README's table, from results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

import typer
from bench_rows import ORIGIN, row, write
from cli_calls import output_of

from swath.bench import plot, readme, report
from swath.bench.cases import CASES
from swath.bench.providers import PROVIDERS
from swath.bench.results import Row, read
from swath.cli.files import marks
from swath.cli.palette import LOOKS

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def sweep_rows() -> list[Row]:
    rows = []
    for case in CASES:
        if "cpu" not in case.tags:
            floor = row(case.name, "x", 1.0).floor_us
            rows += [
                row(case.name, name, floor * x + 5) for name, x in (("swath-triton", 1.1), ("fa3", 1.3), ("scalar", 60))
            ]
    return rows


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """The plots of a run of every case."""
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    found = plot.figures(sweep_rows())
    for figure in found.values():
        figure.draw_without_rendering()
    return found


def test_every_plot_is_drawn_of_a_run_of_every_case(figures: dict[str, Any]) -> None:
    assert figures.keys() == report.PLOTS.keys()


def test_logarithmic_axes_have_ticks(figures: dict[str, Any]) -> None:
    for name, figure in figures.items():
        (ax,) = figure.axes
        axes = [(axis, limits()) for axis, limits in ((ax.xaxis, ax.get_xlim), (ax.yaxis, ax.get_ylim))]
        logarithmic = [(axis, limits) for axis, limits in axes if axis.get_scale() == "log"]
        assert logarithmic
        for axis, (low, high) in logarithmic:
            labels = [label.get_text() for label in axis.get_ticklabels()]
            shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
            assert len(shown) > 3, name
            assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(("low", "high"), [(0.95, 1.35), (1, 7), (40, 60), (3, 8e5), (99, 101)])
def test_ticks_are_within_their_axis(low: float, high: float) -> None:
    ticks = plot.ticks_within(low, high)
    assert ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)
    assert len(ticks) > (1 if high / low > 1.1 else 0)


def test_letters_are_readable_on_a_phone(figures: dict[str, Any]) -> None:
    """Of a page 360 pixels wide: letters have 10 pixels, those of a caption 8."""
    for figure in figures.values():
        texts = [artist for artist in figure.findobj() if hasattr(artist, "get_size") and artist.get_text()]
        pixels = {text: text.get_size() / 72 / figure.get_figwidth() * 360 for text in texts}
        assert min(size for text, size in pixels.items() if text is not figure._supxlabel) > 10
        assert pixels[figure._supxlabel] > 8


def test_a_provider_looks_the_same_in_every_plot(figures: dict[str, Any]) -> None:
    assert LOOKS.keys() == PROVIDERS.keys()
    assert len({tone for tone, _ in LOOKS.values()}) == len({marker for _, marker in LOOKS.values()}) == len(LOOKS)
    for name, figure in figures.items():
        if name != "cache":
            legend = figure.axes[0].get_legend()
            looks = [(h.get_color(), h.get_marker()) for h in legend.legend_handles]
            assert looks == [LOOKS[text.get_text()] for text in legend.get_texts()]
            drawn = {
                (line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_marker() != "None"
            }
            assert drawn == set(looks)


def test_arithmetic_names_no_driver(figures: dict[str, Any]) -> None:
    assert "A GPU, driver 1" in " ".join(figures["context-decode"]._supxlabel.get_text().split())
    assert figures["cache"]._supxlabel.get_text() == "Arithmetic, not measured: 8 kv heads of 128, pages of 16."


def test_plots_are_written_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    one = write(tmp_path / "one.jsonl", [row("B64 8k p16", "swath-triton", 500.0)])
    names = ["bench-floor-decode.png", "bench-floor-decode.svg"]
    printed = output_of("bench", "plot", one, "--output", tmp_path / "few")
    written = {path.name: path.read_bytes() for path in (tmp_path / "few").iterdir()}
    assert sorted(written) == names
    assert all(name in printed for name in names)
    assert written[names[0]].startswith(PNG)
    assert b"</svg>" in written[names[1]]
    assert plot.draw_all([[row("B64 8k p16", "swath-triton", 500.0)]]) == written


def test_each_plot_is_of_the_first_run_that_has_rows_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    chosen: list[Any] = []
    monkeypatch.setattr(plot, "figures", lambda run: dict.fromkeys(run))
    monkeypatch.setattr(plot, "_rendered", lambda figure, _form: chosen.append(figure) or b"")
    monkeypatch.setattr(plot, "figures", lambda run: {name: run[0] + name for name in run[1:]})
    plot.draw_all([["first ", "a", "b"], ["second ", "b", "c"]])
    assert sorted(set(chosen)) == ["first a", "first b", "second c"]


def test_plots_leave_baselines_out_and_draw_nothing_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    results = write(tmp_path / "rows.jsonl", [row("B64 8k p16", "swath-triton", None)])
    assert "no measured case" in output_of("bench", "plot", results, "--output", tmp_path, code=2)


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
    page = "before\n{}\nold\n{}\nafter\n".format(*marks(report.MARKS))
    once = report.with_plot(page, rows, ["bench-floor-decode.png"])
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
    shown = readme.in_order(found.values())[0]
    text = (ROOT / report.README).read_text(encoding="utf-8")
    assert report.with_plot(text, shown, images) == text, again


def test_the_readme_shows_the_newest_run_of_most_of_its_table() -> None:
    table = [row(case, "swath-triton", 500.0) for case in readme.LABELS]
    other = [row(case.name, "swath-triton", 500.0) for case in CASES if case.name not in readme.LABELS]
    later = [replace(r, origin=replace(ORIGIN, date="2027-01-01")) for r in table]
    assert readme.in_order([other, table[1:], table, later]) == [later, table, table[1:], other]
    assert readme.in_order([table, table + other])[0] == table + other


def test_the_readmes_table_has_times_and_why_there_are_none() -> None:
    case = "gpt-oss 16k"
    rows = [row(case, "swath-hopper", 220.94, rounds_us=[200.0, 220.94, 240.0]), row(case, "swath-triton", 3000.0)]
    rows += [row(case, "fa3", 640.0, rounds_us=[600.0, 662.82, 720.0], version="3.1"), row(case, "scalar", 1.0)]
    rows += [row(case, "fa4", None), row("mistral 16k", "fa3", 3093.0), row("B64 8k p16", "swath-triton", 481.8)]
    rows += [row("B64 8k p16", "flashinfer", None, status="unable"), row("B64 8k p16", "vllm", 963.6)]
    lines = readme.table(rows).splitlines()
    assert len(lines) == 2 + len(readme.LABELS)
    found = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
    assert found[readme.LABELS[case]] == ["**221 us**", "640 us", "refused", "not run", "3.00 |"]
    assert found[readme.LABELS["mistral 16k"]] == ["not run", "3.09 ms", "not run", "not run", " |"]
    assert found[readme.LABELS["B64 8k p16"]] == ["**482 us**", "not run", "not run", "cannot", "2.00 |"]
    # A peer that was not there has no column.
    alone = readme.table([row(case, "swath-hopper", 220.94), row(case, "fa4", None)]).splitlines()
    assert alone[0] == "|  | swath | FlashAttention-4 | ratio to the best peer |"
    caption = readme.caption(rows, "x.jsonl")
    for words in ("A GPU, driver 1, torch 2, Triton 3, swath 0 at abc, 2026-01-02", "FlashAttention-3 3.1", "x.jsonl"):
        assert words in caption


def test_the_readmes_table_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "README.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*marks(readme.MARKS)))
    results = write(tmp_path / "x.jsonl", [row("B64 8k p16", "swath-triton", 481.8)])
    readme.main([str(results)])
    once = page.read_text()
    readme.main([str(results)])
    assert page.read_text() == once
    assert "old" not in once
    assert "| **482 us** |" in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    twice = once + once
    with pytest.raises(ValueError, match="more than one"):
        readme.with_table(twice, read(results), "x.jsonl")
    page.write_text("no marks")
    other = write(tmp_path / "y.jsonl", [row("000a p32", "swath-triton", 5.0)])
    for argument in (results, other, tmp_path / "absent.jsonl"):
        with pytest.raises(typer.Exit):
            readme.main([str(argument)])
    assert page.read_text() == "no marks"


def test_the_committed_readme_has_the_table_of_the_run_it_shows() -> None:
    text = (ROOT / readme.README).read_text(encoding="utf-8")
    if marks(readme.MARKS)[0] not in text:
        pytest.skip("README.md has no marks for the table yet")
    found = {path.name: read(path) for path in sorted((ROOT / readme.RESULTS).glob("*.jsonl"))}
    shown = readme.in_order(found.values())[0]
    name = next(name for name, rows in found.items() if rows is shown)
    assert readme.with_table(text, shown, name) == text, "run: python -m swath.bench.readme"


def test_a_report_of_one_run_is_of_that_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "README.md").write_text("\n".join([*marks(report.MARKS), *marks(readme.MARKS)]))
    origin = replace(ORIGIN, gpu="Another GPU", date="2020-01-01")
    write(tmp_path / "benchmarks" / "results" / "x.jsonl", [row("B64 8k p16", "swath-triton", 500.0)])
    one = write(tmp_path / "one.jsonl", [row("B64 8k p16", "swath-triton", 600.0, origin=origin)])
    output_of("bench", "report", one)
    for page in ("README.md", "docs/benchmarks.md"):
        text = (tmp_path / page).read_text()
        assert "Another GPU" in text
        assert "A GPU" not in text
        assert "600 us" in text or page == "README.md"
    assert "**600 us**" in (tmp_path / "README.md").read_text()


def test_report_writes_page_plots_and_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    monkeypatch.chdir(tmp_path)
    assert "checkout" in output_of("bench", "report", code=2)
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "README.md").write_text("\n".join(marks(report.MARKS)))
    assert "no results" in output_of("bench", "report", code=2)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    write(tmp_path / "benchmarks" / "results" / "x.jsonl", [row("B64 8k p16", "swath-triton", 500.0)])
    output_of("bench", "report")
    assert "bench-floor-decode.png" in (tmp_path / "README.md").read_text()
    assert "B64 8k p16" in (tmp_path / "docs" / "benchmarks.md").read_text()
