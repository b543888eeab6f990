"""What a release is made of: one version, a README that stands alone, and workflows that run our own commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import swath

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_is_the_same_everywhere() -> None:
    (package,) = re.findall(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert package == cited == swath.__version__
    assert f"released as {package}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_on_a_package_index_the_readme_has_no_dead_link() -> None:
    """The substitutions of pyproject.toml, done here as hatch-fancy-pypi-readme does them."""
    found = re.findall(r"^pattern = '(.*)'\nreplacement = '(.*)'$", PYPROJECT, re.MULTILINE)
    assert len(found) == 3
    text = (ROOT / "README.md").read_text("utf-8")
    assert "](docs/" in text
    for pattern, replacement in found:
        text = re.sub(pattern, replacement, text)
    assert not re.findall(r"\]\((?!\w+:)[^)]*\)|<img|<!--", text)
    assert "Quickstart: n-step decode" in text
    assert "[tokens, Hq, D]" not in text
    assert "(q, cache, block_table, seq_lens, window=window)" in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_there_is(path: Path) -> None:
    text, makefile = path.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"bash (\S+)", text):
        assert (ROOT / script).exists()


def test_pythons_are_those_that_ci_installs_with() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    (tried,) = re.findall(r"python-version: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert re.findall(r"3\.\d+", tried) == classified
    assert f'requires-python = ">={classified[0]},<3.{int(classified[-1][2:]) + 1}"' in PYPROJECT


def test_an_extra_can_be_installed_alone() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "extra", "release"], capture_output=True, text=True, check=True
    )
    assert any(line.startswith("twine>=") for line in done.stdout.splitlines())
    assert subprocess.run([sys.executable, ROOT / ".ci" / "extra", "none"], capture_output=True, check=False).returncode


def test_the_sdist_has_every_part_of_the_repository() -> None:
    """So that the tests, the site and a wheel can be made from it."""
    section = PYPROJECT.partition("[tool.hatch.build.targets.sdist]")[2].partition("\n\n")[0]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a checkout: nothing tells which files belong to it")
    parts = {name.partition("/")[0] for name in tracked}
    # hatchling takes these by itself, and the last is of use in a checkout alone.
    parts -= {"LICENSE", "pyproject.toml", ".gitignore", ".pre-commit-config.yaml"}
    assert {f'"/{part}"' for part in parts} == set(re.findall(r'"/[^"]+"', section))
