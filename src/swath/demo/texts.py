"""The texts a model is judged on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swath.errors import bad_value


@dataclass(frozen=True)
class Text:
    """Token ids, int64 [N] on the CPU, and where they come from."""

    name: str
    ids: Tensor

    def take(self, first: int, count: int) -> Tensor:
        """``count`` tokens from ``first`` on.

        Raises:
            ValueError: the text ends before.
        """
        if len(self.ids) < first + count:
            raise bad_value("text", f"at least {first + count} tokens", f"{len(self.ids)} in {self.name}")
        return self.ids[first : first + count]


def topics(tokenizer: Any) -> Text:
    """The help texts that come with Python, in their own order, a blank line between two."""
    from pydoc_data.topics import topics as texts

    return Text(
        f"pydoc_data.topics of Python {platform.python_version()}", _ids(tokenizer, "\n\n".join(texts.values()))
    )


def from_file(tokenizer: Any, path: Path) -> Text:
    """A text file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
    """
    try:
        return Text(path.name, _ids(tokenizer, path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise bad_value("text", "a text file in UTF-8", f"other bytes at {error.start} of {path}") from None


def _ids(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: a text longer than the model's context is cut later, and needs no warning.
    return torch.tensor(tokenizer(text, verbose=False).input_ids)
