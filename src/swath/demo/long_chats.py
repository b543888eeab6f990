"""The table of docs/long-chats.md: how well a model reads the same passage after more and more of other text.

python -m swath.demo.long_chats                                    measures it, into long-chats.json; an hour on a CPU
python -m swath.demo.long_chats --after 0,4096 --positions text    some of it
python -m swath.demo.long_chats --page docs/img/long-chats.json    writes the page's table, in the root of a checkout
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import swath
from swath.cli.files import between, write_all
from swath.cli.output import one_line_errors
from swath.demo.measure import Case, open_cache
from swath.demo.model import Loaded, load
from swath.demo.run import device_name
from swath.demo.settings import pick_device
from swath.demo.texts import topics
from swath.testing.cases import NAMES
from swath.window import Window

PAGE, MARKS = Path("docs/long-chats.md"), "long chats table"
WINDOW = Window(128, global_tokens=4)
PASSAGE, SCORED, CHUNK = 516, 255, 512
"""Tokens of the passage, how many of its last are scored, and tokens of a pass."""
OTHER_TEXT = 2048
"""Where the text begins that is read before; it starts again where it ends."""


@dataclass
class LongChats:
    """The perplexity of the passage by where leading tokens stand, then by how many tokens were read before."""

    model: str
    dtype: str
    device: str
    text: str
    versions: dict[str, str]
    date: str
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    kilobytes_held: float = 0.0


@torch.no_grad()
def perplexities(
    case: Case, passage: Tensor, scored: int, other: Tensor, after: Sequence[int]
) -> Iterator[tuple[int, float, int]]:
    """The perplexity of the last ``scored`` tokens of a passage behind longer and longer parts of an other text.

    Yields:
        For each number in ``after``, which ascend: the number, the perplexity after that many tokens of ``other``, and
        the bytes that the cache then holds.
    """
    cache, read = open_cache(case), 0
    for stop in after:
        while read < stop:
            ids = other[None, torch.arange(read, min(read + CHUNK, stop)) % len(other)]
            case.model(ids.to(case.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            read += ids.shape[1]
        then = copy.deepcopy(cache)
        ids = passage[None].to(case.model.device)
        logits = case.model(ids, past_key_values=then, use_cache=True, logits_to_keep=scored + 1).logits[0, :-1]
        yield stop, math.exp(F.cross_entropy(logits.float(), ids[0, -scored:]).item()), then.nbytes_live


def measure(loaded: Loaded, after: Sequence[int], positions: Sequence[str]) -> LongChats:
    """The rows ``positions`` of the table at the columns ``after``; each figure is printed as it comes."""
    model, text = loaded.model, topics(loaded.tokenizer)
    versions = {"swath": swath.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found = LongChats(
        loaded.name, NAMES[model.dtype], device_name(model.device), text.name, versions,
        datetime.date.today().isoformat(),
    )  # fmt: skip
    for where in positions:
        case = Case("long chats", model, WINDOW, "int8", leading_positions=where)
        row = found.perplexity[where] = {}
        passage, other = text.take(0, PASSAGE), text.ids[OTHER_TEXT:]
        for tokens, perplexity, held in perplexities(case, passage, SCORED, other, after):
            row[str(tokens)], found.kilobytes_held = perplexity, held / 1e3
            print(f"{where}: {perplexity:.2f} after {tokens:,} tokens; {held / 1e3:.0f} kB held", flush=True)
    return found


def block(found: LongChats) -> str:
    """The table in Markdown, and its conditions."""
    columns = sorted({int(tokens) for row in found.perplexity.values() for tokens in row})
    lines = [
        "| tokens before | " + " | ".join(f"{tokens:,}" for tokens in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(
            f'| `"{where}"` | ' + " | ".join(_cell(row.get(str(tokens))) for tokens in columns) + " |"
            for where, row in found.perplexity.items()
        ),
    ]
    said = (
        f"{found.model} in {found.dtype} on {found.device}, an int8 cache that holds {found.kilobytes_held:,.0f} kB. "
        f"The passage is the first {PASSAGE} tokens of {found.text}, its last {SCORED} are scored; read before is the "
        f"rest, from token {OTHER_TEXT:,} on and again from there, {CHUNK} tokens a pass. "
        + ", ".join(f"{name} {version}" for name, version in found.versions.items())
        + f"; {found.date}. `python -m swath.demo.long_chats` measures it."
    )
    return "\n".join(["", *lines, "", f"<sub>{said}</sub>", ""])


def _cell(perplexity: float | None) -> str:
    return "not run" if perplexity is None else f"{perplexity:.1f}" if perplexity < 100 else f"{perplexity:,.0f}"


def with_table(page: str, stored: str) -> str:
    """docs/long-chats.md with the table of stored figures (JSON) between its marks.

    Raises:
        ValueError: the marks are missing.
    """
    data: dict[str, Any] = json.loads(stored)
    return between(page, MARKS, block(LongChats(**data)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module."""
    parser = argparse.ArgumentParser(prog="python -m swath.demo.long_chats", description="The table of long chats.")
    parser.add_argument("--after", default="0,4096,16384,65536", metavar="N,...", help="tokens read before, ascending")
    parser.add_argument("--positions", default="text,cache", metavar="NAME,...", help="leading_positions: text, cache")
    parser.add_argument("--device", metavar="NAME", help="cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, default=Path("long-chats.json"), metavar="FILE", help="the figures")
    parser.add_argument("--page", type=Path, metavar="FILE", help=f"no measuring: write {PAGE} from figures")
    chosen = parser.parse_args(arguments)
    with one_line_errors():
        if chosen.page is not None:
            stored = chosen.page.read_text(encoding="utf-8")
            write_all({PAGE: with_table(PAGE.read_text(encoding="utf-8"), stored)})
            return
        device = pick_device(chosen.device)
        loaded = load(None, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
        found = measure(loaded, sorted(int(n) for n in chosen.after.split(",")), chosen.positions.split(","))
        write_all({chosen.output: json.dumps(asdict(found), indent=2) + "\n"})
        print(block(found))


if __name__ == "__main__":
    main()
