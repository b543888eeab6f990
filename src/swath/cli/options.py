"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

WindowSize = Annotated[int | None, typer.Option(metavar="N", help="Keys in the window, the query's own included.")]
GlobalTokens = Annotated[int, typer.Option(metavar="N", help="Leading keys that stay visible.")]
Causal = Annotated[bool, typer.Option(help="Whether keys after the query are hidden.")]

Match = Annotated[
    list[str] | None,
    typer.Option("--match", metavar="TEXT", help="Only cases whose name contains this; of several, any."),
]
Op = Annotated[
    Literal["decode", "steps", "prefill", "mixed"] | None,
    typer.Option(metavar="KIND", help="Only cases of this kind: decode, steps, prefill or mixed."),
]
Tag = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="TAG", help="Only cases with this tag; of several, all (see: list)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
