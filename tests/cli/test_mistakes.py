"""A user's mistake is one line that says what and which file, and no file is lost."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from bench_rows import ORIGIN, row
from cli_calls import invoke

from swath.bench import plot, report
from swath.bench.results import append
from swath.cli.files import marks

HUGE = 10**20
ROW = row("B64 8k p16", "swath-triton", 500.0)


def mistake(*args: object) -> str:
    """The one line that a mistake prints, whatever came before it on standard output."""
    result = invoke(*args, code=2)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("swath: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def line(**changes: Any) -> str:
    """A row of results as a file has it, with fields changed; None leaves one out."""
    flat = asdict(ROW) | asdict(ORIGIN) | changes
    return json.dumps({name: value for name, value in flat.items() if value is not None and name != "origin"})


BAD = {
    "binary": (b"\x89PNG\r\n\x1a\n\xff\xfe", "other bytes at 0"),
    "no JSON": (b"some notes\n", "line 1: wanted a row as JSON, got 'some notes'"),
    "a number": (b"3\n", "line 1: wanted a row as JSON"),
    "deep": (b"[" * 100_000, "line 1: wanted a row as JSON"),
    "digits": (b"9" * 10_000 + b"\n", "line 1: wanted a row as JSON"),
    "empty object": (b"{}\n", "line 1, torch: wanted a text, got nothing"),
    "no time": (line(us=None), "line 1, us: wanted a positive number, got nothing"),
    "no case": (line(case=None), "line 1, case: wanted a text, got nothing"),
    "a string": (line(us="500"), "line 1, us: wanted a positive number, got '500'"),
    "a truth": (line(us=True), "line 1, us: wanted a positive number, got True"),
    "no time at all": (line(floor_us=0.0), "line 1, floor_us: wanted a positive number, got 0.0"),
    "infinite": (line(x_floor=float("inf")), "line 1, x_floor: wanted a positive number, got inf"),
    "beyond": (line(us=10**400), "line 1, us: wanted a positive number"),
    "no rounds": (line(rounds_us=[]), "line 1, rounds_us: wanted a list of positive numbers, got []"),
    "string rounds": (line(rounds_us=["1"]), "line 1, rounds_us: wanted a list of positive numbers"),
    "a fraction": (line(nbytes=1.5), "line 1, nbytes: wanted a number, got 1.5"),
    "another status": (line(status="odd"), "line 1, status: wanted one of ok, unable, refused, failed, got 'odd'"),
    "another op": (line(op="sort"), "line 1, op: wanted one of decode, steps, prefill, mixed, serve, got 'sort'"),
    "no day": (line(date="yesterday"), "line 1, date: wanted a day as YYYY-MM-DD, got 'yesterday'"),
    "second": (line() + "\n" + line(us="1"), "line 2, us: wanted a positive number"),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    append(tmp_path / "good.jsonl", [ROW])
    return tmp_path / "good.jsonl"


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_holds_no_rows(kind: str, good: Path, tmp_path: Path) -> None:
    contents, said = BAD[kind]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    before = bad.read_bytes()
    # A sample of the commands for each kind of file: all of them read by the same function.
    commands: list[tuple[object, ...]] = [("compare", good, bad), ("compare", bad, good), ("plot", bad)]
    commands += [("run", "--output", bad), ("run", "--resume", bad)]
    chosen = commands if kind in ("binary", "no time") else commands[len(kind) % 2 :: 3]
    for command in chosen:
        message = mistake("bench", *command)
        assert str(bad) in message
        assert said in message
    assert bad.read_bytes() == before, "a file that is no file of results is not written to"


NO_FILES = ("{tmp}", "{tmp}/good.jsonl/below", "{tmp}/absent.jsonl")


@pytest.mark.parametrize(
    ("command", "path"),
    [
        *((command, path) for command in ("compare", "plot") for path in NO_FILES),
        *((command, path) for command in ("run --resume", "run --output") for path in NO_FILES[:2]),  # a run makes one
    ],
)
def test_a_path_that_is_no_file(command: str, path: str, good: Path, tmp_path: Path) -> None:
    given = path.format(tmp=tmp_path)
    words = command.split()
    message = mistake("bench", *words, *([good] if words == ["compare"] else []), given)
    assert given.removesuffix("/below") in message
    assert any(text in message for text in ("Is a directory", "No such file", "Not a directory", "no folder"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(good: Path) -> None:
    good.chmod(0)
    assert mistake("bench", "plot", good) == f"swath: {good}: Permission denied\n"


def test_a_last_line_cut_short_counts_as_none(good: Path) -> None:
    good.write_text(line()[:100])
    assert mistake("bench", "plot", good) == "swath: no rows in good.jsonl\n"


def test_files_of_the_same_name(good: Path, tmp_path: Path) -> None:
    append(tmp_path / "deep" / "good.jsonl", [ROW])
    assert "same name" in mistake("bench", "plot", good, tmp_path / "deep" / "good.jsonl")


PLACES = ["{tmp}/good.jsonl", "{tmp}/good.jsonl/x", "/dev/null/x"]
"""Where no folder can be."""


@pytest.mark.parametrize("place", PLACES)
def test_plots_to_an_impossible_place(place: str, good: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    message = mistake("bench", "plot", good, "--output", place.format(tmp=tmp_path))
    assert place.format(tmp=tmp_path).removesuffix("/x") in message


@pytest.mark.parametrize("option", ["--png", "--svg"])
@pytest.mark.parametrize("place", ["{tmp}", "{tmp}/no/such/x.png", "/dev/null/x.png"])
def test_figures_to_an_impossible_place(place: str, option: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra 'bench'")
    before = sorted(tmp_path.iterdir())
    assert place.format(tmp=tmp_path) in mistake("show", "--kv-len", 3, option, place.format(tmp=tmp_path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "args",
    [
        ["show", "--window", HUGE],
        ["show", "--global-tokens", HUGE],
        ["show", "--kv-len", HUGE],
        ["show", "--q-len", HUGE],
        ["show", "--q-start", HUGE],
        ["show", "--q-start", -HUGE],
        ["show", "--flash", f"{HUGE},0"],
        ["show", "--mojo", f"1,{HUGE}"],
        ["explain", "--batch", HUGE],
        ["explain", "--kv-len", HUGE],
        ["explain", "--window", HUGE],
        ["explain", "--global-tokens", HUGE],
        ["explain", "--head-dim", HUGE],
        ["explain", "--page-size", HUGE],
        ["explain", "--page-size", 2**31 - 16],
        ["explain", "--q-len", 2**31 - 1],
        ["explain", "--softcap", "nan"],
        ["explain", "--target", "sm_90", "--q-len", 2**31 - 1, "--batch", 1000],
        ["explain", "--target", "sm_90", "--q-heads", 2**31 - 1, "--kv-heads", 2**31 - 1, "--head-dim", 2**31 - 1],
    ],
    ids=lambda args: " ".join(map(str, args)),
)
def test_numbers_out_of_reach(args: list[object]) -> None:
    mistake(*args)


def test_a_page_of_more_than_all_keys_is_one_page() -> None:
    assert "1 of 1 pages" in invoke("show", "--page-size", HUGE).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``report`` has plots to lose."""
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / report.IMAGES).mkdir(parents=True)
    (tmp_path / report.PAGE).write_text("the old page")
    (tmp_path / report.README).write_text("\n".join(marks(report.MARKS)))
    for name in ("bench-floor-decode.png", "bench-floor-decode.svg", "bench-gone.png", "window.png"):
        (tmp_path / report.IMAGES / name).write_text(f"the old {name}")
    append(tmp_path / "benchmarks" / "results" / "x.jsonl", [ROW])
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_report_replaces_what_it_draws_and_removes_what_it_does_not(checkout: Path) -> None:
    invoke("bench", "report")
    now = contents(checkout / report.IMAGES)
    assert now.keys() == {"bench-floor-decode.png", "bench-floor-decode.svg", "window.png"}
    assert now["bench-floor-decode.png"].startswith(b"\x89PNG")
    assert now["window.png"] == b"the old window.png"


def test_a_report_of_nothing_loses_nothing(checkout: Path) -> None:
    before = contents(checkout)
    (checkout / "partial.jsonl").write_text(line(status="failed", reason="?"))
    assert "no measured case" in mistake("bench", "report", "partial.jsonl")
    (checkout / "partial.jsonl").write_text(line(us="500"))
    assert "partial.jsonl" in mistake("bench", "report", "partial.jsonl")
    (checkout / "partial.jsonl").unlink()
    assert contents(checkout) == before


def test_a_readme_without_marks_loses_nothing(checkout: Path) -> None:
    (checkout / report.README).write_text("no marks")
    before = contents(checkout)
    assert "readme: wanted a text with" in mistake("bench", "report")
    assert contents(checkout) == before


def test_without_matplotlib_nothing_is_lost(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(checkout)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "plots need matplotlib" in mistake("bench", "report")
    assert contents(checkout) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_while_drawing_loses_nothing(
    error: type[BaseException], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_args: object) -> None:
        raise error

    before = contents(checkout)
    monkeypatch.setattr(plot, "_cache", failing)
    invoke("bench", "report", code=130 if error is KeyboardInterrupt else 1)
    assert contents(checkout) == before


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_disk_that_fails_leaves_each_file_old_or_new(
    step: str, after: int, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, done = contents(checkout), []
    real = getattr(Path, step)

    def failing(self: Path, *args: Any) -> Any:
        if len(done) == after:
            raise OSError(28, "No space left on device")
        done.append(self)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, failing)
        assert "No space left on device" in mistake("bench", "report")
    now = contents(checkout)
    assert now.keys() == before.keys(), "no file is lost, and nothing is left beside them"
    changed = sum(now[name] != before[name] for name in before)
    assert changed == (after if step == "replace" else 0)


def test_a_run_says_at_once_that_it_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "swath.bench.run.measure_case", lambda *_args: pytest.fail("measured before the file was tried")
    )
    assert "/dev/null/x" in mistake("bench", "run", "--device", "cpu", "--quick", "--output", "/dev/null/x/rows.jsonl")
