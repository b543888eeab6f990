"""``swath explain``: which backend and launch a call would take, and why not the others."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

import swath
from swath.checks import check_choice
from swath.cli.case import Case
from swath.cli.draw import spelled
from swath.cli.options import Causal, GlobalTokens, WindowSize
from swath.cli.output import console, fail, one_line_errors, print_rows
from swath.dispatch import Explanation
from swath.errors import bad_value
from swath.ops.explain import OPS
from swath.quant import KVQuant
from swath.window import Window

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
ATTENTION = ("attention", "paged_attention")
CACHED = ("paged_attention", "append_kv")
APPLIES = {
    "kv_len": (*ATTENTION, "append_kv"),
    "q_heads": (*ATTENTION, "merge_states"),
    "kv_heads": (*ATTENTION, "append_kv"),
    **dict.fromkeys(("window", "global_tokens", "causal", "softcap", "sink"), ATTENTION),
    **dict.fromkeys(("page_size", "cache_dtype", "granularity"), CACHED),
    "compute": ("paged_attention",),
}
"""Options that not every operator has, and which have them."""


def explain(
    ctx: typer.Context,
    op: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(OPS[:-1])} or {OPS[-1]}.")] = "paged_attention",
    batch: Annotated[int, typer.Option(min=1, metavar="B", help="Sequences.")] = 1,
    q_len: Annotated[int, typer.Option(min=1, metavar="N", help="Query tokens of each sequence.")] = 1,
    kv_len: Annotated[int, typer.Option(min=1, metavar="N", help="Keys of each sequence.")] = 4096,
    q_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, metavar="D", help="Elements of a head.")] = 128,
    page_size: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a page.")] = 64,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Of the queries: bf16, fp16, fp32 or fp8.")] = "bf16",
    cache_dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Also int8 or fp8_e5m2.", show_default="that of the queries")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of scales: tensor, head, channel, token.", show_default="channel for int8"),
    ] = None,
    window: WindowSize = None,
    global_tokens: GlobalTokens = 0,
    causal: Causal = True,
    softcap: Annotated[float, typer.Option(metavar="X", help="Soft cap of the scores; 0 is none.")] = 0.0,
    sink: Annotated[bool, typer.Option("--sink", help="With a sink logit for each query head.")] = False,
    compute: Annotated[str, typer.Option(metavar="NAME", help="float or int8.")] = "float",
    device: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="cuda if there is one", help="Of the tensors.")
    ] = None,
) -> None:
    """Say which backend and launch a call would take, and why not the others.

    Nothing runs. For example: swath explain --batch 32 --kv-len 8192 --window 1024 --cache-dtype int8
    """
    with one_line_errors():
        check_choice("op", op, OPS)
        _check_applies(ctx, op)
        case = Case(
            batch=batch, q_len=q_len, kv_len=kv_len, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim,
            page_size=page_size, dtype=_dtype("dtype", dtype), quant=_quant(dtype, cache_dtype, granularity),
            window=Window(window, global_tokens=global_tokens, causal=causal), softcap=softcap, sink=sink,
            compute=compute, device=_device(device),
        )  # fmt: skip
        try:
            args, kwargs = case.arguments(op)
        except RuntimeError as error:  # how torch says that memory is short
            raise fail(f"no room for the tensors of this case: {str(error).splitlines()[0]}") from error
        explanation = swath.explain(op, *args, **kwargs)
    _print(console(), case, explanation, op)


def _check_applies(ctx: typer.Context, op: str) -> None:
    for name, ops in APPLIES.items():
        source = ctx.get_parameter_source(name)
        if op not in ops and source is not None and source.name == "COMMANDLINE":
            raise bad_value(name, f"an operator that takes it ({', '.join(ops)})", op)


def _dtype(name: str, value: str) -> torch.dtype:
    check_choice(name, value, tuple(DTYPES))
    return DTYPES[value]


def _quant(dtype: str, cache_dtype: str | None, granularity: str | None) -> KVQuant:
    stored = _dtype("cache_dtype", cache_dtype or dtype)
    return KVQuant(stored, granularity or ("channel" if stored == torch.int8 else "none"))


def _device(name: str | None) -> torch.device:
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name is None:
        return torch.device(known[-1] if len(known) == 1 else known[1])
    if name == "cuda" and len(known) > 1:
        return torch.device("cuda", torch.cuda.current_device())
    check_choice("device", name, tuple(known))
    return torch.device(name)


def _print(out: Console, case: Case, explanation: Explanation, op: str) -> None:
    out.print(f"[bold]{op}[/] runs on the [bold]{explanation.backend}[/] backend\n")
    print_rows(out, [*_describe(case, op).items(), ("launch", explanation.launch)])
    out.print()
    words = {explanation.backend: "chosen"}
    print_rows(out, [(n, words.get(n, why or "could run it too")) for n, why in explanation.reasons.items()])


def _describe(case: Case, op: str) -> dict[str, str]:
    """The case in words, as far as ``op`` looks at it."""
    tokens = f"{case.batch} x {case.q_len} token{'s' if case.q_len > 1 else ''}"
    new = f"{tokens}, {case.kv_heads} heads of {case.head_dim}, {_name(case.dtype)}"
    q = f"{tokens}, {case.q_heads} heads of {case.head_dim}, {_name(case.dtype)}"
    keys = f"{case.batch} x {case.kv_len} keys, {case.kv_heads} heads of {case.head_dim}"
    cache = _name(case.quant.dtype)
    if case.quant.k != "none":
        cache += f" with {case.quant.k} scales"
    cache += f", pages of {case.page_size}"
    scores = {"window": spelled(case.window)}
    if case.softcap:
        scores["softcap"] = str(case.softcap)
    if case.sink:
        scores["sink"] = "a logit per query head"
    return {
        "attention": {"q": q, "k, v": keys} | scores,
        "paged_attention": {"q": f"{q} ({case.form})", "k, v": keys, "cache": cache} | scores,
        "append_kv": {"k, v": new, "cache": cache},
        "merge_states": {"states": q},
    }[op] | {"device": _device_name(case.device)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
