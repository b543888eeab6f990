"""The command line: what it draws is what the window rule says, what it explains is what the library explains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import swath
from swath import Window, dispatch

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from cli_calls import failure, invoke

from conftest import python_environment
from swath.cli.draw import Cell, picture, spelled
from swath.cli.examine import EXTRAS
from swath.ops.explain import OPERATORS, OPS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KINDS = {"██": Cell.WINDOW, "▒▒": Cell.LEADING, "· ": Cell.SKIPPED, "  ": Cell.HIDDEN}


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = python_environment() | {"COLUMNS": "80"} | env
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, timeout=120)


def drawn_cells(text: str, kv_len: int) -> dict[int, list[Cell]]:
    """Read a drawing back: the cells of each query, by its position."""
    rows = {}
    for line in text.splitlines():
        row = re.match(r"(?:query|     ) +(-?\d+)(  [█▒· ]*)?$", line)
        if row:
            cells = (row[2] or "")[2:].ljust(2 * kv_len)
            rows[int(row[1])] = [KINDS[cells[2 * k : 2 * k + 2]] for k in range(kv_len)]
    return rows


def expected(p: int, k: int, size: int | None, g: int, causal: bool) -> Cell:
    """The rule in words, written out once more: what query p and key k are to one another."""
    if causal and k > p:
        return Cell.HIDDEN
    if size is None or abs(p - k) < size:
        return Cell.WINDOW
    return Cell.LEADING if k < g else Cell.SKIPPED


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("g", [0, 2])
@pytest.mark.parametrize("size", [None, 0, 1, 4])
def test_show_draws_the_rule(size: int | None, g: int, causal: bool) -> None:
    options = ["--global-tokens", g, "--causal" if causal else "--no-causal", "--q-len", 9, "--kv-len", 12]
    text = invoke("show", *options, *([] if size is None else ["--window", size])).stdout
    rows = drawn_cells(text, 12)
    assert list(rows) == list(range(3, 12))
    assert rows == {p: [expected(p, k, size, g, causal) for k in range(12)] for p in rows}


RANGES: dict[str, tuple[list[object], Callable[[int, int], bool]]] = {
    "chunk": (["--chunk", 4], lambda p, k: k <= p and k // 4 == p // 4),
    "prefix": (["--prefix", 5], lambda p, k: k <= p or k < 5),
    "span": (["--span", "2,5", "--span", "7,9"], lambda p, k: k <= p or 2 <= min(p, k) <= max(p, k) < 5),
    "span in a window": (
        ["--span", "2,6", "--window", 3],
        lambda p, k: 0 <= p - k < 3 or 2 <= min(p, k) <= max(p, k) < 6,
    ),
    "shard": (["--shard", "1,2", "--window", 6], lambda p, k: 0 <= p - (2 * k + 1) < 6),
}


@pytest.mark.parametrize("name", RANGES)
def test_show_draws_bounds(name: str) -> None:
    options, sees = RANGES[name]
    text = invoke("show", *options, "--kv-len", 8, "--page-size", 4).stdout
    rows = drawn_cells(text, 8)
    seen = {p: [k for k, cell in enumerate(row) if cell in (Cell.WINDOW, Cell.LEADING)] for p, row in rows.items()}
    assert seen == {p: [k for k in range(8) if sees(p, k)] for p in range(8)}
    assert text.startswith("bounds.")
    assert f"{sum(map(len, seen.values()))} query-key pairs." in text


def test_show_places_queries_anywhere() -> None:
    rows = drawn_cells(invoke("show", "--window", 3, "--q-start", -2, "--q-len", 12, "--kv-len", 6).stdout, 6)
    assert rows == {p: [expected(p, k, 3, 0, True) for k in range(6)] for p in range(-2, 10)}


def test_show_counts_what_the_last_query_sees_and_what_is_saved() -> None:
    text = invoke("show", "--window", 4, "--global-tokens", 2, "--page-size", 4).stdout
    assert "Query 11 sees 6 of 12 keys: 0-1, 8-11." in text
    seen = sum(expected(p, k, 4, 2, True) >= Cell.LEADING for p in range(12) for k in range(12))
    assert f"{seen} of 78 query-key pairs: {1 - seen / 78:.0%} less than full causal attention." in text
    assert "2 of 3 pages are still needed; 1 can be freed." in text
    assert "pages     ━━━━━━━ ╌╌╌╌╌╌╌ ━━━━━━━\n" in text
    assert "Query 2 sees no key." in invoke("show", "--window", 0, "--kv-len", 3).stdout


@pytest.mark.parametrize("window", [Window(4, global_tokens=2), Window(0, global_tokens=5), Window(1), Window()])
@pytest.mark.parametrize("q_start", [-3, 5, 14])
def test_a_page_is_held_while_a_query_to_come_sees_it(window: Window, q_start: int) -> None:
    held = picture(window, 8, 19, q_start).pages_held(4)
    to_come = window.mask(torch.arange(q_start, 40), torch.arange(19))
    for i in range(8):
        assert held[i].tolist() == [bool(page.any()) for page in to_come[i:].split(4, dim=1)]


def test_without_causality_no_page_is_freed() -> None:
    assert bool(picture(Window(2, causal=False), 8, 16).pages_held(4).all())


@pytest.mark.parametrize("kv_len", [35, 100, 4096])
def test_show_fits_the_terminal(kv_len: int) -> None:
    lines = invoke("show", "--window", 32, "--kv-len", kv_len, "--page-size", 16).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("query") for line in lines)


def test_pooling_keeps_what_any_pair_sees() -> None:
    drawn = picture(Window(2, global_tokens=1), 10, 10)
    for step in (2, 4):
        blocks = drawn.pooled(step)
        for i, j in torch.ones_like(blocks).nonzero().tolist():
            block = drawn.cells[i * step : (i + 1) * step, j * step : (j + 1) * step]
            assert blocks[i, j] == block.max()


@pytest.mark.parametrize(
    ("option", "value", "window"),
    [
        ("--flash", "3,0", Window(4)),
        ("--flash", "-1,-1", Window()),
        ("--flash", "3,3", Window(4)),
        ("--mojo", "3,2", Window(4, global_tokens=2)),
        ("--mojo", "none,2", Window(0, global_tokens=2)),
        ("--mojo", "none,none", Window()),
    ],
)
def test_show_converts_other_conventions(option: str, value: str, window: Window) -> None:
    text = invoke("show", option, value, "--kv-len", 8).stdout
    verb = "are" if "mojo" in option else "with causal=True is"
    assert text.splitlines()[0].endswith(f" {value} {verb} {spelled(window)}")
    rows = drawn_cells(text, 8)
    assert torch.tensor(list(rows.values())).equal(picture(window, 8, 8).cells.long())


@pytest.mark.parametrize(("value", "window"), [("-1,-1", Window(causal=False)), ("3,3", Window(4, causal=False))])
def test_show_takes_flash_windows_to_both_sides(value: str, window: Window) -> None:
    text = invoke("show", "--flash", value, "--no-causal", "--kv-len", 8).stdout
    assert text.splitlines()[0].endswith(f" {value} with causal=False is {spelled(window)}")
    assert torch.tensor(list(drawn_cells(text, 8).values())).equal(picture(window, 8, 8).cells.long())


@pytest.mark.parametrize(
    "window",
    [Window(), Window(0), Window(7, global_tokens=3), Window(5, causal=False), Window(None, causal=False)],
)
def test_a_spelled_window_is_that_window(window: Window) -> None:
    assert eval(spelled(window), {"Window": Window}) == window


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--window", -1], "size: wanted an int >= 0 or None, got -1"),
        (["--global-tokens", -2], "global_tokens: wanted an int >= 0 or a tensor [B], got -2"),
        (["--flash", "4,2", "--no-causal"], "right: wanted 0 (causal) or 4 (as left), got 2"),
        (["--flash", "4"], "flash: wanted L,R: two integers, such as 127,0, got '4'"),
        (["--flash", "none,0"], "flash: wanted L,R: two integers, such as 127,0, got 'none,0'"),
        (["--mojo", "4,x"], "mojo: wanted W,G: integers or 'none', such as 127,4, got '4,x'"),
        (["--flash", "4,0", "--window", 5], "window: wanted one of --flash, --mojo, or swath's own options, got"),
        (["--kv-len", 5000], "q_len x kv_len: wanted at most 16777216 cells to draw, got 25000000"),
        (["--chunk", 4, "--prefix", 3], "window: wanted one of --chunk, --prefix, --span and --shard"),
        (["--chunk", 4, "--window", 3], "window: wanted one of --chunk, --prefix, --span and --shard"),
        (["--prefix", 4, "--no-causal"], "window: wanted no --flash, --mojo or --no-causal with --chunk"),
        (["--span", "4"], "span: wanted two integers, such as 2,5, got '4'"),
        (["--span", "5,2"], "span: wanted A,B with 0 <= A < B, got 5,2"),
        (["--shard", "2,2"], "rank: wanted at most 1, got 2"),
        (["--png", "no/such/folder/x.png"], "--png: "),
    ],
)
def test_show_refuses_in_one_line(args: list[object], message: str) -> None:
    if "--png" in args:
        pytest.importorskip("matplotlib", reason="figures need the extra 'bench'")
    result = invoke("show", *args, code=2)
    assert result.stderr.startswith(f"swath: {message}")
    assert result.stderr.count("\n") == 1


def test_show_writes_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra 'bench'")
    options = ["show", "--window", 4, "--global-tokens", 2, "--page-size", 4]
    first, again, png = tmp_path / "1.svg", tmp_path / "2.svg", tmp_path / "1.png"
    invoke(*options, "--svg", first, "--png", png)
    invoke(*options, "--svg", again)
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert "<svg" in first.read_text()
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("sizes", [(1, 12, 4), (12, 1, 16), (100, 100, 1), (100, 100, 64), (3, 70, 8)])
def test_figures_of_any_size(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra 'bench'")
    q_len, kv_len, page_size = sizes
    png = tmp_path / "x.png"
    invoke("show", "--window", 8, "--q-len", q_len, "--kv-len", kv_len, "--page-size", page_size, "--png", png)
    assert png.stat().st_size > 0


def test_show_says_what_figures_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert failure("show", "--svg", tmp_path / "x.svg") == "--svg needs matplotlib: pip install 'swath[bench]'"


def test_doctor_knows_every_backend_of_every_op() -> None:
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["versions"]["swath"] == swath.__version__
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report["machine"]["cores"] >= 1
    on_cpu = [a for a in report["backends"] if a["device"] == "cpu"]
    for op in OPS:
        mine = [a for a in on_cpu if a["op"] == op]
        assert [a["backend"] for a in mine] == list(dispatch.backends(OPERATORS[op].module))
        able = [a for a in mine if a["reason"] is None]
        assert [a["backend"] for a in mine if a["chosen"]] == [able[0]["backend"]]


def test_doctor_reads_well() -> None:
    text = invoke("doctor").stdout
    assert [line for line in text.splitlines() if line and line[0] != " "][:3] == ["Machine", "Versions", "Extras"]
    assert max(map(len, text.splitlines())) <= 80
    report = json.loads(invoke("doctor", "--json").stdout)
    flat = " ".join(text.split())
    for ability in report["backends"]:
        assert ability["reason"] is None or " ".join(ability["reason"].split()) in flat


def test_doctor_and_the_package_agree_on_extras() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        own = {re.split(r"[<>=;\s]", requirement)[0] for requirement in extras[extra]}
        nested = {name for name in own if name.startswith("swath[")}
        within = [n for name in nested for n in name.removeprefix("swath[").rstrip("]").split(",")]
        return (own - nested).union(*map(packages, within))

    assert {extra: set(names) for extra, names in EXTRAS.items()} == {extra: packages(extra) for extra in EXTRAS}


HELP = """
import sys
from swath.cli import main

for args in ([], ["doctor"], ["explain"], ["show"], ["demo"], ["bench"], *(["bench", c] for c in sys.argv[1].split())):
    sys.argv[1:] = [*args, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
sys.argv[1:] = ["--version"]
try:
    main()
except SystemExit:
    print(sorted({"torch", "triton", "matplotlib", "transformers"} & sys.modules.keys()))
"""


def test_help_needs_no_torch_and_names_no_types() -> None:
    ran = python("-c", HELP, "list run compare plot report tune")
    assert (ran.returncode, ran.stderr) == (0, "")
    *pages, version, imported = ran.stdout.splitlines()
    assert (version, imported) == (f"swath {swath.__version__}", "[]")
    text = "\n".join(pages)
    assert text.count("Usage: swath") == 12
    assert not re.search("<(bool|str|int|float)", text)
    for command in ("doctor", "explain", "show", "demo", "bench"):
        assert re.search(rf"^\W*{command} ", text, re.MULTILINE)


def test_as_a_module_in_ascii() -> None:
    shown = python("-m", "swath", "show", "--window", "2", "--kv-len", "3", PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.isascii()
    assert "query 0  ##\n      1  ####\n      2  . ####\n" in shown.stdout


def test_without_typer_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from swath.cli import main; main()"
    ran = python("-c", code)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "swath: the command line needs typer: pip install 'swath[bench]'\n"
