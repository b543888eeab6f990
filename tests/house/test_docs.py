"""The documentation: its code runs, its links lead somewhere, and what is generated is up to date."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import impls
from swath import dispatch
from swath.cli import support
from swath.target import has_triton

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
UNFINISHED = re.compile(
    r"\b(placeholder|coming soon|stay tuned|work in progress|to be (?:done|written|added|continued)|insert \w+ here"
    r"|your[-_ ](?:name|org|repo|text)|t\.b\.d|example\.(?:com|org))\b|\?\?\?|<!--\s*-->|\]\(\s*\)|\]\(#\)",
    re.IGNORECASE,
)

needs_triton = pytest.mark.skipif(not has_triton(), reason="the page speaks of Triton, which is not installed")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, contents) of the fenced blocks."""
    return BLOCK.findall(text)


def prose(text: str) -> str:
    """The text without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def run(text: str, name: str) -> None:
    """Run the Python blocks in one namespace, in order; what each prints is what the ``text`` block after it says."""
    namespace: dict[str, object] = {"__name__": "page"}
    found = blocks(text)
    for (language, code), (next_language, wanted) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, name, "exec"), namespace)
            assert printed.getvalue() == (wanted if next_language == "text" else "")


@pytest.mark.parametrize("path", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=name_of)
def test_code_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name in ("transformers.md", "long-chats.md"):
        pytest.importorskip("transformers", reason="the page is about transformers")
    if path.name == "quickstart.md" and not has_triton():
        pytest.skip("the page prints why Triton cannot run a call, and Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    run(path.read_text(encoding="utf-8"), name_of(path))


def test_pages_with_code_are_found() -> None:
    with_code = {p.name for p in PAGES if any(language == "python" for language, _ in blocks(p.read_text("utf-8")))}
    assert {"README.md", "quickstart.md", "semantics.md", "transformers.md", "adding-an-op.md"} <= with_code


def test_code_that_fails_or_prints_something_else_is_noticed() -> None:
    run("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n", "sample")
    with pytest.raises(AssertionError):
        run("```python\nprint(2)\n```\n\n```text\n1\n```\n", "sample")
    with pytest.raises(AssertionError):
        run("```python\nprint(2)\n```\n", "sample")
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n", "sample")


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = HEADING.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in filter(None, (link for pair in LINK.findall(prose(path.read_text("utf-8"))) for link in pair)):
        if re.match(r"\w+:", target):
            continue
        file, _, fragment = target.partition("#")
        page = path.parent / file if file else path
        if not page.exists() or (fragment and fragment not in anchors(page)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert not dead_links(path)


def test_dead_links_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('# A heading\n[a](none.md) [b](#a-heading) [c](#none) <img src="none.png"> [d](https://x.y)\n')
    assert dead_links(page) == ["none.md", "#none", "none.png"]


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            links = (link.partition("#")[0] for pair in LINK.findall(page.read_text("utf-8")) for link in pair if link)
            ahead += [(page.parent / link).resolve() for link in links if link and not re.match(r"\w+:", link)]
    assert {p for p in PAGES if p.parent.name == "docs"} <= seen


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_nothing_is_unfinished(path: Path) -> None:
    assert not [match.group() for match in UNFINISHED.finditer(path.read_text(encoding="utf-8"))]


@needs_triton
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_the_support_matrix_is_up_to_date(interpret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    committed = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert support.page() == committed, "run: python -m swath.cli.support > docs/support.md"


@needs_triton
def test_the_support_matrix_asks_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: object) -> str | None:
        head_dim: int = problem.head_dim  # type: ignore[attr-defined]
        return "no head_dim of 96 here" if head_dim == 96 else None

    for name in impls("attention"):
        if name not in support.HOST_BACKENDS:
            monkeypatch.setattr(dispatch.backends("attention")[name], "why_not", refuse)
    text = support.page()
    number = re.search(r"^(\d+)\. no head_dim of 96 here$", text, re.MULTILINE)
    assert number is not None
    refused = f"not 96 [{number[1]}]"
    assert f"| head_dim | 64, 80, 96, 128, 192, 256, 512 | yes | yes | {refused} | {refused} |" in text


def test_the_readme_has_the_demos_table() -> None:
    readme = pytest.importorskip("swath.demo.readme", reason="the table is made with the demo's packages")
    text, report = README.read_text(encoding="utf-8"), (ROOT / readme.JSON).read_text(encoding="utf-8")
    assert readme.with_table(text, report) == text, "run: python -m swath.demo.readme"
    assert readme.with_table(text, report.replace("full attention", "half attention")) != text


def test_the_page_of_commands_has_all_of_them() -> None:
    pytest.importorskip("typer", reason="the command line needs typer")
    from typer.main import get_command

    from swath.cli import app

    commands = dict(get_command(app).commands)  # type: ignore[attr-defined]
    names = {f"swath {name}" for name in commands if name != "bench"}
    names |= {f"swath bench {name}" for name in commands["bench"].commands}
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(swath [a-z ]+)`", text.partition("\n## ")[0])) == names
    for line in blocks(text)[0][1].splitlines():
        asked = typer_runner().invoke(app, line.split()[1:])
        assert asked.exit_code == 0, asked.output


def typer_runner() -> Any:
    from typer.testing import CliRunner

    return CliRunner()


def test_the_drawn_window_is_what_show_draws() -> None:
    typer = pytest.importorskip("typer.testing", reason="the command line needs typer")
    from swath.cli import app

    options = ["--window", "4", "--global-tokens", "2", "--kv-len", "16", "--page-size", "4"]
    shown = typer.CliRunner().invoke(app, ["show", *options])
    assert shown.exit_code == 0
    text = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    assert f"swath show {' '.join(options)}" in text
    (drawn,) = [contents for language, contents in blocks(text) if "query  0" in contents]
    assert drawn in shown.output
