"""Colours and markers of the plots: dark enough for text on white, apart in print and for the colour-blind."""

from __future__ import annotations

INK, MUTED, FAINT = "#22303a", "#6b7a85", "#c8d1d7"
TONES = ("#0072b2", "#c44e00", "#00795a", "#a1467e", "#7a6a00")

LOOKS = {
    "swath-hopper": ("#0072b2", "o"),
    "swath-triton": ("#00795a", "s"),
    "swath-cpu": ("#4254c5", "D"),
    "fa3": ("#c44e00", "^"),
    "fa3-fp8": ("#e0661f", (4, 1, 0)),
    "fa3-fp8-dense": ("#a85a1a", (6, 1, 0)),
    "fa4": ("#a1467e", "v"),
    "flashinfer": ("#7a6a00", "P"),
    "vllm": ("#5b3a8c", "X"),
    "sglang": ("#8a1c1c", "*"),
    "flex": ("#2f6f8f", "<"),
    "sdpa-cudnn": ("#5f7f00", ">"),
    "sdpa-flash": ("#946200", "p"),
    "torch": ("#6b4a3a", "d"),
    "xformers": ("#4a4a4a", "h"),
    "scalar": ("#22303a", "8"),
}
"""The colour and the marker of a provider, the same in every plot."""
UNKNOWN = ("#6b7a85", "H")
"""A provider of results that this version does not know."""
