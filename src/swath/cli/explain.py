"""``swath explain``: which backend and launch a call would take, and why not the others."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from swath.cli.options import Causal, GlobalTokens, Json, WindowSize
from swath.cli.output import console, one_line_errors, print_rows

ATTENTION = ("attention", "paged_attention")
CACHED = ("paged_attention", "append_kv")
APPLIES = {
    "kv_len": (*ATTENTION, "append_kv"),
    "q_heads": (*ATTENTION, "quantise_q", "merge_states"),
    "kv_heads": (*ATTENTION, "append_kv"),
    "v_head_dim": (*ATTENTION, "append_kv"),
    **dict.fromkeys(("window", "global_tokens", "causal", "softcap", "sink"), ATTENTION),
    **dict.fromkeys(("page_size", "cache_dtype", "granularity"), CACHED),
    "compute": ("paged_attention",),
}
"""Options that not every operator has, and which have them."""

OPERATORS = "attention, paged_attention, append_kv, quantise_q or merge_states."
Op = Annotated[str, typer.Option(metavar="NAME", help=OPERATORS)]
VHeadDim = Annotated[
    int | None, typer.Option(min=1, metavar="D", help="Elements of a value row.", show_default="as of a head")
]
CacheDtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Also int8 or fp8_e5m2.", show_default="that of the queries")
]
Granularity = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of scales: tensor, head, channel, token.", show_default="token for 8 bits"),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", show_default="cuda if there is one", help="Of the tensors.")
]
Gpu = Annotated[
    str | None,
    typer.Option("--target", metavar="ARCH", help="A GPU that need not be here: sm_80, sm_90, sm_100, gfx942 ..."),
]


def explain(
    ctx: typer.Context,
    op: Op = "paged_attention",
    batch: Annotated[int, typer.Option(min=1, metavar="B", help="Sequences.")] = 1,
    q_len: Annotated[int, typer.Option(min=1, metavar="N", help="Query tokens of each sequence.")] = 1,
    kv_len: Annotated[int, typer.Option(min=1, metavar="N", help="Keys of each sequence.")] = 4096,
    q_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, metavar="D", help="Elements of a head.")] = 128,
    v_head_dim: VHeadDim = None,
    page_size: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a page.")] = 64,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Of the queries: bf16, fp16, fp32 or fp8.")] = "bf16",
    cache_dtype: CacheDtype = None,
    granularity: Granularity = None,
    window: WindowSize = None,
    global_tokens: GlobalTokens = 0,
    causal: Causal = True,
    softcap: Annotated[float, typer.Option(metavar="X", help="Soft cap of the scores; 0 is none.")] = 0.0,
    sink: Annotated[bool, typer.Option("--sink", help="With a sink logit for each query head.")] = False,
    compute: Annotated[str, typer.Option(metavar="NAME", help="float, int8 or fast.")] = "float",
    device: Device = None,
    target: Gpu = None,
    as_json: Json = False,
) -> None:
    """Say which backend and launch a call would take, and why not the others.

    Nothing runs. For example: swath explain --batch 32 --kv-len 8192 --window 1024 --cache-dtype int8 --target sm_90
    """
    from swath.cli import answer

    with one_line_errors():
        _check_applies(ctx, op)
        case = answer.made_up(
            batch, q_len, kv_len, q_heads, kv_heads, head_dim=head_dim, v_head_dim=v_head_dim,
            page_size=page_size, size=window, dtype=answer.dtype_of("dtype", dtype),
            quant=answer.storage(dtype, cache_dtype, granularity), global_tokens=global_tokens, causal=causal,
            softcap=softcap, sink="fp32" if sink else "none", compute=compute,
        )  # fmt: skip
        found = answer.ask(op, case, device, target)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    out = console()
    out.print(f"[bold]{op}[/] runs on the [bold]{found.said.backend}[/] backend\n")
    print_rows(out, [*found.description.items(), ("launch", found.said.launch)])
    out.print()
    print_rows(out, found.reasons.items())


def _check_applies(ctx: typer.Context, op: str) -> None:
    from swath.errors import bad_value

    for name, ops in APPLIES.items():
        source = ctx.get_parameter_source(name)
        if op not in ops and source is not None and source.name == "COMMANDLINE":
            raise bad_value(name, f"an operator that takes it ({', '.join(ops)})", op)
