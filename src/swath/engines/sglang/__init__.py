"""SGLang runs on swath: ``python -m sglang.launch_server --attention-backend swath --page-size 64``.

SGLang calls ``register`` in each of its processes, by the entry point that is installed with swath. Nothing of SGLang
is imported before that, and nothing of swath's kernels before a model takes the backend.
"""

from __future__ import annotations

import os
from typing import Any

NAME = "swath"
STAND_IN = "SWATH_SGLANG_AS"
"""Set to the name of a backend of SGLang's: swath serves under that name too, for models whose list of names is closed
(gpt-oss). SGLang's own backend of that name is out of reach then."""


def register() -> None:
    """Make swath a choice of ``--attention-backend``; it may be called any number of times.

    Raises:
        SystemExit: swath cannot take the name that it was asked to serve under. SGLang logs other exceptions of plugins
            and goes on, here with a backend that is not swath.
    """
    stand_in = os.environ.get(STAND_IN)
    try:
        _register(stand_in)
    except Exception as error:
        if stand_in:
            raise SystemExit(f"swath cannot serve as {STAND_IN}={stand_in}: {error}") from error
        raise


def _register(stand_in: str | None) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    from swath.engines.sglang.versions import choices

    names = [NAME]
    if stand_in:
        if stand_in not in ATTENTION_BACKENDS:
            raise ValueError(f"SGLang has no attention backend of that name, but {', '.join(ATTENTION_BACKENDS)}")
        names.append(stand_in)
    for name in names:
        register_attention_backend(name)(make_backend)
    for known in choices():
        if NAME not in known:
            known.append(NAME)


def make_backend(runner: Any) -> Any:
    """The backend of a model, by SGLang's ``ModelRunner``."""
    from swath.engines.sglang.backend import SwathBackend

    return SwathBackend(runner)
