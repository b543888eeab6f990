"""swath: attention for serving language models, over sliding windows and paged, quantised key/value caches.

A name is imported when it is first asked for, and torch with it: ``swath --help`` takes no seconds. The operators are
in ``torch.ops.swath`` from then on; a process that only loads an exported program imports ``swath.ops``.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swath import bounds as bounds
    from swath.cache import PagedKV
    from swath.ops.append import append_kv
    from swath.ops.attention import attention
    from swath.ops.check import check
    from swath.ops.explain import explain, warmup
    from swath.ops.merge import merge_states
    from swath.ops.paged import paged_attention
    from swath.ops.quantise import quantise_q
    from swath.ops.slots import slots
    from swath.pages import PageTable
    from swath.quant import KVQuant
    from swath.window import Window

__version__ = "0.2.0"

__all__ = [
    "KVQuant",
    "PageTable",
    "PagedKV",
    "Window",
    "append_kv",
    "attention",
    "check",
    "explain",
    "merge_states",
    "paged_attention",
    "quantise_q",
    "slots",
    "warmup",
]

_HOMES = {
    "KVQuant": "quant",
    "PageTable": "pages",
    "PagedKV": "cache",
    "Window": "window",
    "append_kv": "ops.append",
    "attention": "ops.attention",
    "check": "ops.check",
    "explain": "ops.explain",
    "merge_states": "ops.merge",
    "paged_attention": "ops.paged",
    "quantise_q": "ops.quantise",
    "slots": "ops.slots",
    "warmup": "ops.explain",
}

if not TYPE_CHECKING:  # else a type checker would take any name

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            found = getattr(import_module(f"swath.{_HOMES[name]}"), name)
            globals()[name] = found
            return found
        if not name.startswith("_") and find_spec(f"swath.{name}") is not None:
            return import_module(f"swath.{name}")
        raise AttributeError(f"module 'swath' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
