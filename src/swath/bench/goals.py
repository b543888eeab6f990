"""What swath promises, or wants to tell: each goal states what it is measured against. ``judge.py`` judges them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OURS = "swath"

X_FLOOR = {
    "B8 4k p32": 1.25,
    "B64 8k p16": 1.03,
    "B64 8k p64": 1.025,
    "B16 32k p1024": 1.02,
    "B1 128k p16": 1.07,
    "B128 16k w1024 p16": 1.06,
    "B128 16k w128 p16": 1.8,
    "B128 16k w128 p16 sinks": 1.8,
    "B64 8k p16 int8 channel": 1.06,
    "B64 8k p16 int8 token": 1.08,
    "B64 8k p16 fp8 e4m3": 1.06,
    "B128 16k w1024 p16 int8 channel": 1.15,
    "B128 16k w1024 p16 int8 token": 1.15,
    "B128 16k w1024 p16 e4m3 tensor": 1.15,
    "4 steps, B32 16k p16": 1.035,
    "4 steps, B64 16k w4096 p16": 1.08,
    "gemma 4 B4 16k D512": 1.1,
}
"""By case, the largest time over the floor that is good."""

X_PEER = {
    "llama 8k full": 1.0,
    "llama 16k full": 1.0,
    "mistral 16k": 1.05,
    "gemma 16k": 1.2,
    "gpt-oss 16k": 3.2,
    "gpt-oss 16k sinks": 3.2,
    "gpt-oss 8k full": 1.0,
    "stream 16k": 1.7,
    "paged 2k at 16k": 1.0,
    "paged 2k at 16k w1024": 1.15,
    "paged 2k at 16k int8 channel": 10.0,
    "paged 2k at 16k int8 channel w1024": 10.0,
    "paged 2k at 16k int8 token": 10.0,
    "paged 2k at 16k int8 token w1024": 10.0,
    "B128 16k w128 p16": 1.8,
    "B128 16k w128 p16 sinks": 1.8,
}
"""By case, the smallest time of the best peer over ours that is good."""


@dataclass(frozen=True)
class Goal:
    """A case's time over that of others together. most: the largest ratio that is good.

    against: the provider of the others; the case's own is our fastest.
    """

    name: str
    case: str
    others: tuple[str, ...]
    most: float
    against: str = OURS


def _seeds() -> Iterable[Goal]:
    """The headlines of 000a, 000b and 001, against the same kind of kernel on the same card."""
    for what, times, name in (
        ("decode", 10, "000a p32"),
        ("int8 window prefill", 45, "000b B2 16/4 D96 2048+0 p128"),
        ("int8 full prefill", 100, "001 B2 8/1 D128 4096+8192 p128"),
    ):
        yield Goal(f"{what}, {times}x a scalar kernel", name, (name,), 1 / times, "scalar")


def _table() -> Iterable[Goal]:
    """Row 004: a window never costs."""
    for n in (1024, 2048, 4096, 8192):
        for s in (127, 256, 512):
            yield Goal(f"ragged N {n}, S {s} against no window", f"004 N{n} S{s}", (f"004 N{n} S-1",), 1.0)


def _mixed() -> Iterable[Goal]:
    """A mixed batch costs little more than its chunks and its decodes, each in a call of their own."""
    for kind in ("", " w1024", " int8 channel"):
        parts = f"mixed, chunks alone at 16k{kind}", f"mixed, decodes alone at 16k{kind}"
        yield Goal(f"mixed batch{kind} against its parts", f"mixed 2 x 2k + 62 at 16k{kind}", parts, 1.15)


def _groups() -> Iterable[Goal]:
    """Groups of 9, 12 and 16 cost as much as groups of 8, 10 % apart: prefill for each pair, decode for each byte."""
    for name, other, size in (
        ("laguna 72/8 w512", "64/8 w512", 9),
        ("step 96/8 w512", "64/8 w512", 12),
        ("muse 32/2 w2048", "16/2 w2048", 16),
    ):
        most = 1.1 * size / 8  # as many times more pairs of the same keys
        yield Goal(f"groups of {size} against 8, prefill", f"{name}, 16k", (f"{other}, 16k",), most)
        yield Goal(f"groups of {size} against 8, decode", f"{name}, B128 16k", (f"{other}, B128 16k",), 1.1)


def _eight_bits() -> Iterable[Goal]:
    """8-bit caches and queries, their passes included, against the same call over a cache of 16 bits."""
    for shape, form, most in (
        ("8k", "int8 products", 0.88), ("8k", "int8 fast", 0.82), ("8k", "fp8 q fast", 0.76),
        ("16k", "int8 products", 0.88), ("16k", "int8 fast", 0.82), ("8k D256", "int8 fast", 0.63),
        ("2k at 16k", "int8 products", 0.88), ("16k w4096", "int8 fast", 0.88), ("16k w1024", "fp8 q fast", 0.86),
        ("8k D64", "fp8 q fast", 0.86),
    ):  # fmt: skip
        case, base = f"8-bit {shape}, {form}", f"8-bit {shape}, bf16"
        yield Goal(f"{shape}, {form} against bf16", case, (base,), most)


GOALS = (
    Goal("paged against dense prefill", "paged 2k at 16k", ("2k at 16k dense",), 1.05),
    Goal("leading tokens against none", "stream 16k", ("stream 16k, no leading",), 1.08),
    Goal("int8 against bf16 prefill", "paged 2k at 16k int8 channel", ("paged 2k at 16k",), 1.08),
    Goal("int8 token against bf16 prefill", "paged 2k at 16k int8 token", ("paged 2k at 16k",), 1.08),
    *_mixed(),
    *_eight_bits(),
    *_groups(),
    *_seeds(),
    *_table(),
    Goal("cpu decode at 32k against 4k", "cpu B16 32k w1024", ("cpu B16 4k w1024",), 1.3),
    Goal("cpu int8 token against fp32", "cpu B16 32k w1024 int8 token", ("cpu B16 32k w1024",), 1.5),
    Goal("cpu int8 channel against fp32", "cpu B16 32k w1024 int8 channel", ("cpu B16 32k w1024",), 1.5),
    Goal("cpu prefill against SDPA, band mask", "cpu prefill 8k w512", ("cpu prefill 8k w512",), 0.25, "torch"),
)
"""Ratios of cases, which the run, the report and the tests look at where all rows are there."""
