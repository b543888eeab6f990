"""Masks that ``swath show`` draws by the bounds of each row: chunks, prefixes, spans and shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from swath.errors import bad_value

if TYPE_CHECKING:
    from torch import Tensor

    from swath.window import Window

Chunk = Annotated[int | None, typer.Option(min=1, metavar="N", help="Chunks of N positions (Llama 4).")]
Prefix = Annotated[int | None, typer.Option(min=0, metavar="N", help="The first N keys are seen by all (prefix LM).")]
Span = Annotated[
    list[str] | None, typer.Option(metavar="A,B", help="Keys A to B - 1 see one another, as an image; repeatable.")
]
Shard = Annotated[
    str | None, typer.Option(metavar="R,W", help="The keys of rank R of W, which hold every W-th (context parallel).")
]


@dataclass(frozen=True)
class Ranges:
    """The options above, as they were given."""

    chunk: int | None
    prefix: int | None
    spans: Sequence[str]
    shard: str | None

    @property
    def given(self) -> int:
        """How many masks they ask for: one, if they are to be drawn."""
        return (self.chunk is not None) + (self.prefix is not None) + bool(self.spans) + (self.shard is not None)

    def window(
        self, q_len: int, kv_len: int, q_start: int | None, size: int | None, leading: int
    ) -> tuple[str, Window]:
        """The mask as one would write it, and as a window of ``q_len`` rows."""
        import torch

        from swath.window import Window

        start = kv_len - q_len if q_start is None else q_start
        said, bounds = self._bounds(torch.arange(start, start + q_len), size)
        return said, Window(global_tokens=leading, bounds=bounds)

    def _bounds(self, p: Tensor, size: int | None) -> tuple[str, Tensor]:
        import torch

        from swath import bounds

        if self.given > 1 or (size is not None and (self.chunk is not None or self.prefix is not None)):
            raise bad_value(
                "window", "one of --chunk, --prefix, --span and --shard; the last two with --window", "more"
            )
        if self.chunk is not None:
            return f"bounds.chunked(positions, {self.chunk})", bounds.chunked(p, self.chunk)
        if self.prefix is not None:
            lens = torch.full_like(p, self.prefix)
            return f"bounds.prefix(positions, prefix_lens={self.prefix})", bounds.prefix(p, lens)
        under = "" if size is None else f", size={size}"
        if self.spans:
            spans = [_pair("span", text) for text in self.spans]
            for begin, end in spans:
                if not 0 <= begin < end:
                    raise bad_value("span", "A,B with 0 <= A < B", f"{begin},{end}")
            each = torch.tensor(spans).expand(len(p), -1, -1)
            return f"bounds.blocks(positions, spans={spans}{under})", bounds.blocks(p, each, size=size)
        rank, world_size = _pair("shard", str(self.shard))
        whole = bounds.window(p, 2**31 - 1 if size is None else size)
        named = "full causal attention" if size is None else f"Window({size})"
        return f"bounds.shard of {named}, rank {rank} of {world_size}", bounds.shard(whole, rank, world_size)


def _pair(name: str, text: str) -> tuple[int, int]:
    try:
        first, second = map(int, text.split(","))
    except ValueError as error:
        raise bad_value(name, "two integers, such as 2,5", repr(text)) from error
    return first, second
