"""How swath becomes a choice of SGLang's, in the releases that are supported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace

import pytest
import sglang_stub

import swath.engines.sglang
from conftest import python_environment


@pytest.fixture
def sglang() -> Iterator[SimpleNamespace]:
    """SGLang's registry and lists."""
    with sglang_stub.installed():
        homes = ("sglang.srt.layers.attention.attention_registry", "sglang.srt.arg_groups.choices")
        yield SimpleNamespace(
            **{name: getattr(import_module(path), name) for path in homes for name in sglang_stub.MODULES[path]}
        )


def test_register_is_lazy_and_may_be_called_again(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(swath.engines.sglang.STAND_IN, raising=False)
    before = dict(sglang.ATTENTION_BACKENDS)
    for _ in range(2):
        swath.engines.sglang.register()
    for name in sglang_stub.CHOICES:
        assert getattr(sglang, name).count("swath") == 1
    assert before | {"swath": swath.engines.sglang.make_backend} == sglang.ATTENTION_BACKENDS


def test_swath_serves_under_another_name_if_asked(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sglang.ATTENTION_BACKENDS, "triton", len)
    monkeypatch.setenv(swath.engines.sglang.STAND_IN, "triton")
    swath.engines.sglang.register()
    assert sglang.ATTENTION_BACKENDS["triton"] is swath.engines.sglang.make_backend


def test_a_stand_in_that_cannot_be_ends_the_server(sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would log any other exception, and serve with the backend that swath was to replace."""
    monkeypatch.setenv(swath.engines.sglang.STAND_IN, "tritonn")
    with pytest.raises(SystemExit, match="tritonn"):
        swath.engines.sglang.register()


def test_importing_the_plugin_imports_neither_sglang_nor_torch() -> None:
    """SGLang loads the entry points of every package in every process, also where swath is not asked for."""
    code = "import sys, swath.engines.sglang; assert not {'sglang', 'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=python_environment())


@pytest.mark.skipif(sglang_stub.INSTALLED, reason="the names of another release take the place of this one's")
@pytest.mark.parametrize("modules", [sglang_stub.MODULES, sglang_stub.OLD_MODULES], ids=["0.5.23", "0.5.15"])
def test_what_differs_between_releases(modules: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("sglang.", "swath.engines.sglang."))]:
        monkeypatch.delitem(sys.modules, name)
    for name, value in (("algorithm", "EAGLE"), ("eagle_topk", 1), ("num_draft_tokens", 4)):
        monkeypatch.setattr(sglang_stub.SERVER, f"speculative_{name}", value)
    with sglang_stub.installed(modules):
        versions = import_module("swath.engines.sglang.versions")
        assert [
            x is getattr(sglang_stub, name) for x, name in zip(versions.choices(), sglang_stub.CHOICES, strict=True)
        ] == [True] * 3
        assert versions.settings(SimpleNamespace(server_args=sglang_stub.SERVER)) == (False, "EAGLE", 1, 4)
        assert versions.read_to_the_end().name == "POST_REPLAY"
