"""Checks that operators and caches share. They read shapes and dtypes, never the contents of device tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Scoring:
    """The checked values of how scores are made."""

    scale: float
    softcap: float
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the checks found about a call, and with it about every call of the same signature."""

    scoring: Scoring
    max_q_len: int
    max_kv_len: int
    memo: dict[str, Any] = field(default_factory=dict)
    """What backends remember of such calls, by backend."""


def check_scoring(
    q: Tensor, num_seqs: int, window: object, scale: object, softcap: object, sink: object, gqa: object
) -> Scoring:
    """The arguments that say how scores are made: window, scale, soft cap, sink logits and GQA layout."""
    if not isinstance(window, Window):
        raise bad_type("window", "a Window or None", type(window).__name__)
    if isinstance(window.global_tokens, Tensor):
        check_int32("window.global_tokens", window.global_tokens, num_seqs, q.device)
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise bad_type("scale", "a float or None", type(scale).__name__)
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise bad_type("softcap", "a float >= 0", type(softcap).__name__)
    if not softcap >= 0:
        raise bad_value("softcap", "a float >= 0", softcap)
    if sink is not None:
        _check_sink(sink, q)
    check_choice("gqa", gqa, GQA_LAYOUTS)
    return Scoring(float(scale), float(softcap), gqa == "interleaved")


def _check_sink(sink: object, q: Tensor) -> None:
    sink = check_tensor("sink", sink, 1, q.device)
    if sink.dtype not in (torch.float32, output_dtype(q)):
        raise bad_type("sink", f"float32 or {output_dtype(q)}", sink.dtype)
    if sink.shape[0] != q.shape[-2]:
        raise bad_value("sink", f"shape [{q.shape[-2]}], one logit per query head", tuple(sink.shape))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise bad_value(name, f"one of {', '.join(map(repr, choices))}", repr(value))


def check_int(name: str, value: object, wanted: str) -> int:
    """An int, which a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(name, wanted, type(value).__name__)
    return value


def check_bound(name: str, value: object, default: int) -> int:
    """A host bound, an int >= 0, or ``default`` where none is given."""
    if value is None:
        return default
    bound = check_int(name, value, "an int or None")
    if bound < 0:
        raise bad_value(name, "an int >= 0", value)
    return bound


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


def make_outputs(q: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The given ``out`` or a new one, and a new LSE if asked for."""
    if out is None:
        out = torch.empty_like(q, dtype=output_dtype(q), memory_format=torch.contiguous_format)
    return out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
