"""Checks that operators and caches share. They read shapes and dtypes, never the contents of device tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from swath.errors import bad_type, bad_value
from swath.quant import WIDE
from swath.window import Window

Q_DTYPES = WIDE
MAX_HEAD_DIM = 256
GQA_LAYOUTS = ("grouped", "interleaved")
COMPUTES = ("float", "int8")
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-15, 1e15
"""Of scores: a quotient of two such numbers leaves room in float32 for the product of q and k."""


def check_no_grad(**tensors: Tensor | None) -> None:
    """swath is forward only: refuse inputs whose gradient somebody expects."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise bad_value(name, "a tensor without grad (swath is forward only; use torch.no_grad())", "grad")


def check_tensor(name: str, x: object, dims: int, device: torch.device | None = None) -> Tensor:
    """A tensor with ``dims`` dimensions on ``device``."""
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    if x.dim() != dims:
        raise bad_value(name, f"{dims} dimensions", f"shape {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise bad_value(name, f"a tensor on {device}, as the others", x.device)
    return x


def check_int32(name: str, x: object, length: int | None, device: torch.device) -> None:
    """A one-dimensional int32 tensor, of ``length`` where one is given."""
    x = check_tensor(name, x, 1, device)
    if x.dtype != torch.int32:
        raise bad_type(name, "int32", x.dtype)
    if length is not None and x.shape[0] != length:
        raise bad_value(name, f"shape [{length}]", tuple(x.shape))


def check_rows(name: str, x: Tensor) -> None:
    """Any strides with the last one 1."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise bad_value(name, "a last stride of 1", f"strides {x.stride()}")


def check_alike(name: str, x: Tensor, of: str, like: Tensor) -> None:
    """The shape and dtype of the tensor ``like``, whose name is ``of``."""
    if x.shape != like.shape:
        raise bad_value(name, f"{of}'s shape {tuple(like.shape)}", tuple(x.shape))
    if x.dtype != like.dtype:
        raise bad_type(name, f"{of}'s dtype {like.dtype}", x.dtype)


def check_heads(q: Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Head counts divide, head sizes agree and are within the limit."""
    num_q_heads = q.shape[-2]
    if num_kv_heads < 1 or num_q_heads % num_kv_heads or num_q_heads < 1:
        raise bad_value("q", f"a number of heads that the {num_kv_heads} kv heads divide", num_q_heads)
    if q.shape[-1] != head_dim:
        raise bad_value("q", f"head_dim {head_dim}, as the keys", q.shape[-1])
    if not 1 <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise bad_value("q", f"a head_dim that is a multiple of 8, at most {MAX_HEAD_DIM}", head_dim)


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


def check_names(options: dict[str, Any], known: Iterable[str], function: str) -> None:
    """Keywords that the function has; for a word of another library the error says swath's.

    Raises:
        TypeError: naming the keyword.
    """
    for name in options.keys() - set(known):
        wanted = f"{OTHER_WORDS[name]}, as swath calls it" if name in OTHER_WORDS else f"a keyword of {function}"
        raise bad_type(name, wanted, f"{name}=")


def check_options(q: Tensor, num_seqs: int, options: dict[str, Any]) -> dict[str, Any]:
    """The options that both attention operators have: the checked numbers and words among them, by name."""
    window, scale, sink = Window.of(options["window"]), options["scale"], options["sink"]
    if isinstance(window.global_tokens, Tensor):
        check_int32("window.global_tokens", window.global_tokens, num_seqs, q.device)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else _check_factor("scale", scale, "None", signed=True)
    softcap = _check_factor("softcap", options["softcap"], "inf", signed=False)
    softcap = 0.0 if softcap == math.inf else softcap
    if sink is not None:
        _check_sink(sink, q)
    check_choice("gqa", options["gqa"], GQA_LAYOUTS)
    if options["q_start"] is not None:
        check_int32("q_start", options["q_start"], num_seqs, q.device)
    check_outputs(q, options["out"], options["return_lse"])
    return {"scale": scale, "softcap": softcap, "gqa": options["gqa"]}


def _check_sink(sink: object, q: Tensor) -> None:
    sink = check_tensor("sink", sink, 1, q.device)
    if sink.dtype not in WIDE:
        raise bad_type("sink", "bfloat16, float16 or float32", sink.dtype)
    if sink.shape[0] != q.shape[-2]:
        raise bad_value("sink", f"shape [{q.shape[-2]}], one logit per query head", tuple(sink.shape))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise bad_value(name, f"one of {', '.join(map(repr, choices))}", repr(value))


def check_int(name: str, value: object, wanted: str) -> int:
    """An int, which a bool is not; a traced one is."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise bad_type(name, wanted, type(value).__name__)
    return value  # type: ignore[return-value]


def check_float(name: str, value: object, wanted: str) -> float:
    """A number, which a bool is not, that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(name, wanted, type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        raise bad_value(name, wanted, value) from None


def _check_factor(name: str, value: object, other: str, *, signed: bool) -> float:
    """A number that scores are multiplied with (``signed``), or capped at."""
    wanted = f"0, {other}, or a float from {SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}" + signed * " in size"
    number = check_float(name, value, wanted)
    size = abs(number) if signed else number
    if number and not (SMALLEST_FACTOR <= size <= LARGEST_FACTOR or (size == math.inf and not signed)):
        raise bad_value(name, wanted, value)
    return number


def check_bound(name: str, value: object, most: int) -> int:
    """A host bound, an int >= 0: no more than ``most``, what the shapes allow, and that where none is given."""
    if value is None:
        return most
    bound = check_int(name, value, "an int or None")
    if bound < 0:
        raise bad_value(name, "an int >= 0", value)
    return min(bound, most)


def output_dtype(q: Tensor) -> torch.dtype:
    """The output has q's dtype; fp8 queries give bf16."""
    return torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype


def check_outputs(q: Tensor, out: object, return_lse: object) -> None:
    """``out`` as q, in the output's dtype, if it is given."""
    if out is not None:
        out = check_tensor("out", out, q.dim(), q.device)
        if out.shape != q.shape:
            raise bad_value("out", f"q's shape {tuple(q.shape)}", tuple(out.shape))
        if out.dtype != output_dtype(q):
            raise bad_type("out", str(output_dtype(q)), out.dtype)
        check_rows("out", out)
    if not isinstance(return_lse, bool):
        raise bad_type("return_lse", "a bool", type(return_lse).__name__)
