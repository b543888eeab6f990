"""What the user of the demo chooses, and how much is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from swath.errors import bad_value


@dataclass(frozen=True)
class Budget:
    """How much is measured: tokens of text, how many of the last are scored, prefill chunk, decode steps.

    before: tokens of other text that some rows read first; 0 for no such rows.
    """

    tokens: int
    scored: int
    chunk: int
    decode_steps: int
    before: int = 0


FULL = Budget(tokens=2048, scored=1024, chunk=128, decode_steps=32, before=16_384)
QUICK = Budget(tokens=1024, scored=512, chunk=128, decode_steps=16)


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    window, global_tokens: of the generated text and of the windowed rows. kv: "none", "int8" or "fp8".
    model, text: None is the default. quick: measure fewer rows.
    """

    output: Path
    device: torch.device
    prompt: str
    max_new_tokens: int
    window: int
    global_tokens: int
    kv: str = "int8"
    model: Path | None = None
    text: Path | None = None
    quick: bool = False
    budget: Budget = FULL

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: bf16 on a GPU, fp32 on a CPU."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def json_path(self) -> Path:
        """The file of the rows, written anew after each."""
        return self.output / "demo.json"

    @property
    def plot_path(self) -> Path:
        """The file of the plot, written at the end."""
        return self.output / "demo.png"


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; None is the GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    if name not in ("cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))):
        raise bad_value(
            "device", "cpu" + (f", cuda, or cuda:0 .. cuda:{gpus - 1}" if gpus else " (no GPU is seen here)"), name
        )
    return torch.device(name)
