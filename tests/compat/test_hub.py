"""The kernel for the Hugging Face Hub: its layout, and a model of Transformers that loads it and generates."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import python_environment
from swath import hub
from swath.compat import flash_attn_func
from swath.hub import lay_out


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    lay_out(folder)
    return folder


def build_of(kernel: Path, backend: str = "cpu") -> Path:
    return kernel / "build" / f"torch-{backend}"


def metadata_of(build: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((build / "metadata.json").read_text(encoding="utf-8"))
    return found


def load(build: Path) -> ModuleType:
    """As ``kernels`` loads it."""
    name = metadata_of(build)["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_modules_import_one_another_and_little_else(kernel: Path) -> None:
    modules = sorted(build_of(kernel, "cuda").rglob("*.py"))
    assert len(modules) > 50
    assert not {"hf", "bench", "cli", "demo", "testing", "hub.py"} & {p.name for p in build_of(kernel).iterdir()}
    for path in modules:
        assert {name.split(".")[0] for name in hub.imported(path)} <= hub.OUTSIDE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert folder.is_dir() or folder.with_suffix(".py").exists(), f"{path}: {ast.unparse(node)}"


def test_metadata(kernel: Path) -> None:
    ids = set()
    for backend in hub.BACKENDS:
        build = build_of(kernel, backend)
        metadata = metadata_of(build)
        assert re.fullmatch(rf"_swath_{backend}_[0-9a-f]{{7}}", metadata["id"])
        assert f'NAMESPACE = "{metadata["id"]}"' in (build / "ops" / "torch_ops.py").read_text(encoding="utf-8")
        assert metadata["backend"]["type"] == backend
        assert ("9.0" in metadata["backend"].get("archs", ())) is (backend == "cuda")
        assert {p.relative_to(build).as_posix() for p in build.rglob("*.py")} == set(metadata["digest"]["files"])
        ids.add(metadata["id"].removeprefix(f"_swath_{backend}_"))
    assert len(ids) == 1


def test_the_library_reads_the_metadata(kernel: Path) -> None:
    data = pytest.importorskip("kernels_data", reason="the library `kernels` is not installed")
    build = build_of(kernel, "cuda")
    metadata = data.Metadata.read_from_file(build / "metadata.json")
    assert (metadata.id, str(metadata.name), metadata.version) == (metadata_of(build)["id"], "swath", 1)
    digest = data.Digest.hash_variant(data.DigestAlgorithm.SHA256, build)
    assert digest.files == metadata_of(build)["digest"]["files"]


def test_versions_load_side_by_side(kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has operators of its own, which torch.compile finds, and gives the package's results."""
    monkeypatch.setattr("swath.__version__", "0.0.0")
    lay_out(tmp_path / "other", "swath-2")
    q, k = torch.randn(1, 5, 4, 32), torch.randn(1, 20, 2, 32)
    wanted = flash_attn_func(q, k, k, causal=True)
    for build in (build_of(kernel), build_of(tmp_path / "other")):
        module, name = load(build), metadata_of(build)["id"]
        assert module.__all__ == ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
        assert torch.equal(module.flash_attn_func(q, k, k, causal=True), wanted)
        assert hasattr(getattr(torch.ops, name), "paged_attention")
        traced = torch.compile(module.flash_attn_func, backend="aot_eager", fullgraph=True)
        assert torch.equal(traced(q, k, k, causal=True), wanted)


def test_a_kernel_needs_no_swath(kernel: Path) -> None:
    """A fresh interpreter without swath loads it, also from where old releases of the library look."""
    build = build_of(kernel)
    program = f"""
import sys
sys.modules["swath"] = None
import importlib.util
spec = importlib.util.spec_from_file_location("swath_kernel", {str(build / "swath" / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
q = torch.ones(1, 1, 2, 8)
print(module.flash_attn_func(q, q, q).sum().item(), [n for n in sys.modules if n.partition(".")[0] == "swath"])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=python_environment())
    assert ran.stdout.strip() == "16.0 ['swath']", ran.stderr[-2000:]


def test_what_cannot_be_a_kernel_is_refused(kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^folder: wanted one that is empty"):
        lay_out(kernel)
    with pytest.raises(ValueError, match=r"^name: wanted lower-case letters"):
        lay_out(tmp_path / "a", "My_Kernel")
    monkeypatch.setattr(hub, "OUTSIDE", hub.OUTSIDE - {"triton"})
    with pytest.raises(ValueError, match=r"\.py: wanted imports of torch, triton and the standard library, got triton"):
        lay_out(tmp_path / "b")
    whole = tmp_path / "whole.py"
    whole.write_text("import swath.cache\n", encoding="utf-8")
    monkeypatch.setattr(hub, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match=r"^whole\.py: wanted imports of the form"):
        hub.relative_imports(whole)
    with pytest.raises(ValueError, match=r"^ops/torch_ops\.py: wanted one line"):
        hub.in_namespace("", "x")


SIZES = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_it_and_generates(kernel: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Transformers' own loader, from a folder that stands for a repository."""
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    if not transformers.utils.import_utils.is_kernels_available():
        pytest.skip("no release of the library `kernels` that this Transformers takes is installed")
    from transformers import modeling_flash_attention_utils as flash

    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/swath={kernel}")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    prompt, mask = torch.randint(3, 100, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    padded = mask.clone()
    padded[0, :9] = 0
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    eager = [model.generate(prompt, attention_mask=m, **options) for m in (mask, padded)]
    model.set_attn_implementation("someone/swath")
    module = sys.modules[metadata_of(build_of(kernel))["id"]]
    assert flash._flash_fn is module.flash_attn_func
    assert flash._flash_varlen_fn is module.flash_attn_varlen_func
    for m, wanted in zip((mask, padded), eager, strict=True):
        assert torch.equal(model.generate(prompt, attention_mask=m, **options), wanted)
    if kind == "llama":
        generation = transformers.GenerationConfig(**options)
        batching = transformers.ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=64)
        results = model.generate_batch(
            prompt.tolist(), generation_config=generation, continuous_batching_config=batching
        )
        assert [r.generated_tokens for r in results.values()] == eager[0][:, 40:].tolist()
