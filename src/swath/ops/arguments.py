"""Checks of the arguments that operators share, and what other libraries call them."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from torch import Tensor

from swath.checks import check_choice, check_float, check_ints, check_rows, check_separate, check_tensor
from swath.errors import bad_type, bad_value
from swath.problem import output_dtype
from swath.quant import WIDE
from swath.window import Window

Q_DTYPES = WIDE
MAX_HEAD_DIM = 512
GQA_LAYOUTS = ("grouped", "interleaved")
COMPUTES = ("float", "int8", "fast")
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-37, 1e38
"""Of scores: what float32 holds in base 2 with all of its bits."""

OTHER_WORDS = {
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "scaling": "scale=",
    "window_size": "window=, Window.from_flash(left, right, causal=...)",
    "window_left": "window=, Window.from_flash(left, 0, causal=True)",
    "sliding_window": "window=",
    "causal": "window=, Window(size, causal=...)",
    "is_causal": "window=, Window(size, causal=...)",
    "logits_soft_cap": "softcap=",
    "logit_cap": "softcap=",
    "sinks": "sink=",
    "s_aux": "sink=",
    "block_tables": "block_table",
    "page_table": "block_table",
    "cache_seqlens": "seq_lens",
    "context_lens": "seq_lens",
    "seqused_k": "seq_lens",
    "max_seqlen_q": "max_q_len=",
    "max_seqlen_k": "max_kv_len=",
    "return_softmax_lse": "return_lse=",
    "num_splits": "split_size=, keys and not a number of splits",
    "q_descale": "q_scale=",
    "k_descale": "k_scale of the PagedKV",
    "v_descale": "v_scale of the PagedKV",
    "k_scale": "k_scale of the PagedKV",
    "v_scale": "v_scale of the PagedKV",
    "cu_seqlens": "cu_seqlens_q=",
}
"""What other libraries call an argument, and what swath does."""


def check_names(options: dict[str, Any], known: Container[str], function: str) -> None:
    """Keywords that the function has; for a word of another library the error says swath's.

    Raises:
        TypeError: naming the keyword.
    """
    for name in options:
        if name not in known:
            wanted = f"{OTHER_WORDS[name]}, as swath calls it" if name in OTHER_WORDS else f"a keyword of {function}"
            raise bad_type(name, wanted, f"{name}=")


def check_heads(q: Tensor, num_kv_heads: int, head_dim: int, v_head_dim: int) -> None:
    """Head counts divide, head sizes agree and are within the limit."""
    num_q_heads = q.shape[-2]
    if num_kv_heads < 1 or num_q_heads % num_kv_heads or num_q_heads < 1:
        raise bad_value("q", f"a number of heads that the {num_kv_heads} kv heads divide", num_q_heads)
    if q.shape[-1] != head_dim:
        raise bad_value("q", f"head_dim {head_dim}, as the keys", q.shape[-1])
    if not 1 <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise bad_value("q", f"a head_dim that is a multiple of 8, at most {MAX_HEAD_DIM}", head_dim)
    if not 1 <= v_head_dim <= head_dim or v_head_dim % 8:
        raise bad_value("v", f"a v_head_dim that is a multiple of 8, at most head_dim {head_dim}", v_head_dim)


def check_options(q: Tensor, v_head_dim: int, num_seqs: int, options: dict[str, Any]) -> dict[str, Any]:
    """The options that both attention operators have: the checked numbers and words among them, by name."""
    window, scale, sink = Window.of(options["window"]), options["scale"], options["sink"]
    if isinstance(window.global_tokens, Tensor):
        check_ints("window.global_tokens", window.global_tokens, num_seqs, q.device)
    if window.bounds is not None:
        _check_bounds(window.bounds, q)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else _check_factor("scale", scale, "None", signed=True)
    softcap = _check_factor("softcap", options["softcap"], "inf", signed=False)
    softcap = 0.0 if softcap == math.inf else softcap
    if softcap and scale and not SMALLEST_FACTOR <= abs(scale) / softcap <= LARGEST_FACTOR:
        wanted = f"scale / softcap from {SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g} in size"
        raise bad_value("softcap", wanted, f"{scale:g} / {softcap:g}")
    if sink is not None:
        _check_sink(sink, q)
    check_choice("gqa", options["gqa"], GQA_LAYOUTS)
    if options["q_start"] is not None:
        check_ints("q_start", options["q_start"], num_seqs, q.device)
    check_outputs(q, v_head_dim, options["out"], options["return_lse"])
    return {"scale": scale, "softcap": softcap, "gqa": options["gqa"]}


def _check_factor(name: str, value: object, other: str, *, signed: bool) -> float:
    """A number that scores are multiplied with (``signed``), or capped at."""
    wanted = f"0, {other}, or a float from {SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}" + signed * " in size"
    number = check_float(name, value, wanted)
    size = abs(number) if signed else number
    if number and not (SMALLEST_FACTOR <= size <= LARGEST_FACTOR or (size == math.inf and not signed)):
        raise bad_value(name, wanted, value)
    return number


def _check_bounds(bounds: Tensor, q: Tensor) -> None:
    shape = (*q.shape[:-2], 2)
    check_tensor("window.bounds", bounds, len(shape), q.device)
    if bounds.shape != shape:
        raise bad_value("window.bounds", f"shape {shape}, a range [lo, hi) for each query row", tuple(bounds.shape))


def _check_sink(sink: object, q: Tensor) -> None:
    sink = check_tensor("sink", sink, 1, q.device)
    if sink.dtype not in WIDE:
        raise bad_type("sink", "bfloat16, float16 or float32", sink.dtype)
    if sink.shape[0] != q.shape[-2]:
        raise bad_value("sink", f"shape [{q.shape[-2]}], one logit per query head", tuple(sink.shape))


def check_outputs(q: Tensor, v_head_dim: int, out: object, return_lse: object) -> None:
    """``out`` as q with rows of ``v_head_dim``, in the output's dtype, if it is given."""
    if out is not None:
        out = check_tensor("out", out, q.dim(), q.device)
        shape = (*q.shape[:-1], v_head_dim)
        if tuple(out.shape) != shape:
            raise bad_value("out", f"shape {shape}", tuple(out.shape))
        if out.dtype != output_dtype(q):
            raise bad_type("out", str(output_dtype(q)), out.dtype)
        check_rows("out", out)
        check_separate("out", out)
    if not isinstance(return_lse, bool):
        raise bad_type("return_lse", "a bool", type(return_lse).__name__)
