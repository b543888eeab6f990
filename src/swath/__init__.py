"""swath: attention for serving language models, over sliding windows and paged, quantised key/value caches."""

from swath.cache import PagedKV
from swath.ops.append import append_kv
from swath.ops.attention import attention
from swath.ops.check import check
from swath.ops.explain import explain, warmup
from swath.ops.merge import merge_states
from swath.ops.paged import paged_attention
from swath.ops.slots import slots
from swath.pages import PageTable
from swath.quant import KVQuant
from swath.window import Window

__version__ = "0.1.0"

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
    "slots",
    "warmup",
]
