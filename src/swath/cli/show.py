"""``swath show``: draw which keys each query sees."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from swath.cli.files import write_all
from swath.cli.options import Causal, GlobalTokens, WindowSize
from swath.cli.output import console, fail, in_words, one_line_errors
from swath.cli.ranges import Chunk, Prefix, Ranges, Shard, Span
from swath.errors import bad_value

if TYPE_CHECKING:
    from swath.cli.draw import Picture
    from swath.window import Window


def show(
    window: WindowSize = None,
    global_tokens: GlobalTokens = 0,
    causal: Causal = True,
    flash: Annotated[str | None, typer.Option(metavar="L,R", help="FlashAttention's window_size instead.")] = None,
    mojo: Annotated[
        str | None, typer.Option(metavar="W,G", help="mojo_opset's windows instead; each may be 'none'.")
    ] = None,
    chunk: Chunk = None,
    prefix: Prefix = None,
    span: Span = None,
    shard: Shard = None,
    q_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Queries.", show_default="as many as keys")
    ] = None,
    kv_len: Annotated[int, typer.Option(min=1, metavar="N", help="Keys.")] = 12,
    q_start: Annotated[
        int | None,
        typer.Option(metavar="N", help="Position of the first query.", show_default="the queries are the last keys"),
    ] = None,
    page_size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Mark pages of N keys.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a PNG.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an SVG.")] = None,
) -> None:
    """Draw which keys each query sees.

    For example: swath show --window 4 --global-tokens 2 --page-size 4, or swath show --window 4 --span 2,5
    """
    from swath.cli.draw import picture, spelled
    from swath.cli.terminal import facts, grid

    files = {name: path for name, path in (("png", png), ("svg", svg)) if path is not None}
    if files and find_spec("matplotlib") is None:
        raise fail(f"--{' and --'.join(files)} needs matplotlib: pip install 'swath[bench]'")
    with one_line_errors():
        q_len, ranges = kv_len if q_len is None else q_len, Ranges(chunk, prefix, span or [], shard)
        if ranges.given:
            _check_alone(causal, flash, mojo)
            title, chosen = ranges.window(q_len, kv_len, q_start, window, global_tokens)
        else:
            chosen = _window(window, global_tokens, causal, flash, mojo)
            title = _title(spelled(chosen), chosen.causal, flash, mojo)
        drawn = picture(chosen, q_len, kv_len, q_start)
        page_size = None if page_size is None else min(page_size, kv_len)
    out = console()
    out.print(title, style="bold", markup=False, highlight=False)
    out.print()
    out.print(grid(drawn, out.options, page_size), no_wrap=True)
    out.print()
    for line in facts(drawn, page_size):
        out.print(line)
    _write(files, drawn, page_size)


def _write(files: dict[str, Path], drawn: Picture, page_size: int | None) -> None:
    """The picture as files, by format."""
    from swath.cli.figure import rendered

    for file_format, path in files.items():
        try:
            write_all({path: rendered(drawn, file_format, page_size)})
        except OSError as error:
            raise fail(f"--{file_format}: {in_words(error)}") from error
        console().print(f"Wrote {path}", markup=False, soft_wrap=True)


def _window(size: int | None, global_tokens: int, causal: bool, flash: str | None, mojo: str | None) -> Window:
    from swath.window import Window

    own = size is not None or global_tokens != 0 or (not causal and flash is None)
    if (flash is not None) + (mojo is not None) + own > 1:
        raise bad_value("window", "one of --flash, --mojo, or swath's own options", "more than one")
    if flash is not None:
        left, right = _pair("flash", flash, "L,R: two integers, such as 127,0", allow_none=False)
        return Window.from_flash(cast(int, left), cast(int, right), causal=causal)
    if mojo is not None:
        return Window.from_mojo(*_pair("mojo", mojo, "W,G: integers or 'none', such as 127,4", allow_none=True))
    return Window(size, global_tokens=global_tokens, causal=causal)


def _check_alone(causal: bool, flash: str | None, mojo: str | None) -> None:
    if not causal or flash is not None or mojo is not None:
        raise bad_value("window", "no --flash, --mojo or --no-causal with --chunk, --prefix, --span, --shard", "one")


def _pair(name: str, text: str, wanted: str, allow_none: bool) -> tuple[int | None, int | None]:
    try:
        first, second = (None if allow_none and x.strip() == "none" else int(x) for x in text.split(","))
    except ValueError as error:
        raise bad_value(name, wanted, repr(text)) from error
    return first, second


def _title(window: str, causal: bool, flash: str | None, mojo: str | None) -> str:
    if flash is not None:
        return f"FlashAttention's window_size {flash} with causal={causal} is {window}"
    return window if mojo is None else f"mojo_opset's windows {mojo} are {window}"
