"""Rows of option values for which kernels are compiled, beside those in which every two values meet."""

from __future__ import annotations

from collections.abc import Iterable

OPTIONS: dict[str, list[str]] = {
    "queries": ["decode", "steps", "ragged", "dense", "many steps", "long ragged"],
    "storage": ["bf16", "fp16", "fp32", "int8 channel", "int8 token", "e4m3 head", "e5m2 tensor", "int8 compute"],
    "head_dim": ["128", "64", "80", "256"],
    "window": ["none", "size", "size+count", "size+tensor", "both sides", "bounds"],
    "scoring": ["plain", "softcap", "sink+lse", "interleaved"],
    "paging": ["16", "544", "flat 16", "split 256"],
}
ONE_PASS = [
    ("dense", "bf16", "64", "both sides", "sink+lse", "16"),
    ("ragged", "fp16", "64", "both sides", "softcap", "16"),
]
"""What pairs need not meet and a kernel of its own is compiled for: prefill of the paired target in one pass."""
BOUNDS = [
    ("decode", "bf16", "128", "bounds+count", "sink+lse", "16"),
    ("steps", "int8 token", "128", "bounds+count", "plain", "16"),
    ("ragged", "bf16", "64", "bounds+count", "softcap", "wide 16"),
    ("long ragged", "int8 token", "128", "bounds+count", "plain", "16"),
    ("dense", "bf16", "128", "bounds+count", "plain", "16"),
    ("many steps", "bf16", "64", "bounds nearby", "sink+lse", "16"),
    ("dense", "bf16", "128", "bounds", "plain", "16"),
]
"""Bounds of rows beside leading tokens, and ones that are promised to show few keys."""
EIGHT_BITS = [
    ("long ragged", "int8 compute", "128", "none", "sink+lse", "flat 16"),
    ("long ragged", "queries tensor", "64", "size+count", "softcap", "16"),
    ("long ragged", "queries head", "256", "none", "plain", "16"),
]
"""Long prefills in int8, and of fp8 queries, whose scores the paired target multiplies in 8 bits."""
FAST = [
    ("long ragged", "int8 fast", "256", "none", "plain", "64"),
    ("long ragged", "queries fast", "128", "size", "sink+lse", "flat 64"),
    ("long ragged", "queries fast", "128", "size", "softcap", "64"),
]
"""The same under ``compute="fast"``: under a window p and V of fp8 queries multiply in 8 bits too."""
IN_TURN = [
    ("full decode", "bf16", "128", "size", "sink+lse", "16"),
    ("full decode", "fp16", "128", "size+count", "softcap", "flat 64"),
]
"""Decode of as many sequences as a GPU has places for, in tiles that programs take in turn, not from a counter."""
TABLES = [
    ("decode", "bf16", "128", "size+tensor", "plain", "tokens 16"),
    ("ragged", "fp16", "64", "size", "plain", "tokens 16"),
    ("long ragged", "int8 token", "128", "none", "plain", "tokens 16"),
    ("dense", "bf16", "128", "size+tensor", "plain", "wide 16"),
    ("ragged", "bf16", "128", "size+tensor", "plain", "wide 16"),
    ("many steps", "int8 channel", "256", "size", "plain", "wide 16"),
]
"""Page tables and integers that few callers have, with every kernel that reads them: rows of token slots, 64 bits."""
HEADS = [
    ("decode", "bf16", "512", "size", "sink+lse", "16"),
    ("dense", "bf16", "512", "bounds", "softcap", "16"),
    ("dense", "bf16", "512", "size+count", "plain", "16"),
    ("steps", "int8 token", "512", "none", "softcap", "flat 16"),
    ("ragged", "int8 compute", "512", "both sides", "interleaved", "16"),
    ("ragged", "fp32", "512", "size", "plain", "16"),
    ("decode", "bf16", "192/128", "size", "sink+lse", "16"),
    ("dense", "bf16", "192/128", "none", "plain", "16"),
    ("long ragged", "int8 channel", "192/128", "size", "plain", "apart 16"),
    ("ragged", "bf16", "256/128", "size+count", "sink+lse", "flat 16"),
]
"""The largest heads, and values that are narrower than keys, or lie otherwise in memory, with every kernel."""
SEEN = [
    ("decode", "bf16", "128", "size 128", "sink+lse", "16"),
    ("decode", "fp16", "128", "bounds nearby", "softcap", "16"),
    ("decode of 12", "bf16", "128", "size 512", "sink+lse", "16"),
    ("decode", "bf16", "192/128", "none", "sink+lse", "16"),
    ("decode", "bf16", "512", "none", "softcap", "16"),
    ("decode", "bf16", "512", "size", "plain", "flat 16"),
]
"""Decode whose launch goes by how many keys a query sees, and groups that are no power of two."""
HALVES = [
    ("dense", "bf16", "512", "none", "sink+lse", "16"),
    ("ragged", "fp16", "512", "none", "softcap", "flat 16"),
    ("ragged", "bf16", "512", "bounds", "sink+lse", "16"),
    ("many steps", "bf16", "512", "wide window", "sink+lse", "16"),
    ("dense", "bf16", "512/256", "wide window", "plain", "16"),
    ("ragged", "bf16", "512", "bounds+count", "sink+lse", "16"),
    ("long ragged", "int8 channel", "512", "none", "sink+lse", "16"),
]
"""Prefill of the paired target with heads of 512, whose values are halved."""


OWN = ONE_PASS + BOUNDS + EIGHT_BITS + IN_TURN + TABLES + FAST + HALVES
"""Rows of the paired target, of which the suite compiles every variant of Hopper's tiles."""


def named(rows: Iterable[tuple[str, ...]]) -> list[dict[str, str]]:
    """Rows of values by the names of their options."""
    return [dict(zip(OPTIONS, values, strict=True)) for values in rows]
