"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

WindowSize = Annotated[int | None, typer.Option(metavar="N", help="Keys in the window, the query's own included.")]
GlobalTokens = Annotated[int, typer.Option(metavar="N", help="Leading keys that stay visible.")]
Causal = Annotated[bool, typer.Option(help="Whether keys after the query are hidden.")]
