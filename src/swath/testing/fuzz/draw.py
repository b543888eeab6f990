"""From a seed to a call: every option of the contract is one more draw.

A seed is ``1000 * variant + number``: the variant decides what kernels are compiled for (dtypes, heads, page size,
which options are there), the number everything else (lengths, positions, sizes, malice). So a run on a GPU can draw one
variant and many calls of it, and every call is still found again by its seed alone.

Each draw has random numbers of its own, named by the draw: a new one leaves the others' as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import torch

from swath.quant import GRANULARITIES, KVQuant
from swath.testing.cases import Case
from swath.testing.ranges import RULES

CALLS_A_VARIANT = 1000
"""Numbers of a variant: the last three digits of a seed."""

OPS = {"paged_attention": 68, "attention": 12, "append_kv": 8, "merge_states": 5, "slots": 5, "quantise_q": 2}
"""Public functions, by how often they are called in a hundred."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large calls are: what suits a backend.

    usual, long: keys of most sequences, and of a few. rows: query rows of a chunk. seqs: sequences of a batch.
    pages: page sizes. work: bounds rows x keys x heads x head_dim of a call.
    """

    usual: int
    long: int
    rows: int
    seqs: int
    pages: tuple[int, ...]
    work: int


SIZES = {
    "small": Sizes(50, 150, 30, 3, (1, 8, 16, 32, 48, 64), 1 << 22),
    "medium": Sizes(150, 1200, 130, 5, (1, 8, 16, 16, 32, 48, 64, 80, 128, 256, 544), 1 << 25),
    "large": Sizes(1500, 20000, 1200, 24, (1, 8, 16, 16, 32, 48, 64, 64, 128, 256, 544, 784, 1024), 1 << 34),
}


@dataclass(frozen=True)
class Call:
    """A call of a public function: all its host values, and the seed of its tensors' contents.

    op: the function. case: its arguments; ``append_kv``, ``slots`` and ``merge_states`` take those fields they have.
    twists: what is done to the tensors (twists.py) and what else the call must hold to (promises.py), by name.
    """

    op: str
    case: Case
    seed: int = 0
    twists: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The expression that makes it."""
        parts = [f"op={self.op!r}", f"case={expression(self.case)}", f"seed={self.seed}"]
        return f"Call({', '.join(parts)}, twists={self.twists!r})"

    def random(self, name: str) -> Random:
        """Random numbers for one purpose."""
        return Random(f"{self.seed} {name}")

    def variant_random(self, name: str) -> Random:
        """The same for all calls of its variant."""
        return Random(f"variant {self.seed // CALLS_A_VARIANT} {name}")


def expression(case: Case) -> str:
    """The constructor expression of a case: the fields that differ from the defaults."""
    changed = [(f.name, getattr(case, f.name)) for f in fields(case) if getattr(case, f.name) != f.default]
    return f"Case({', '.join(f'{name}={_written(value)}' for name, value in changed)})"


def _written(value: object) -> str:
    if isinstance(value, KVQuant):
        return f"KVQuant({value.dtype}, {value.k!r}, {value.v!r})"
    return repr(value)


def draw(seed: int, sizes: Sizes, only: Callable[[Fields], bool] | None = None) -> tuple[str, Case]:
    """The function and the case of a seed; ``only``: variants are drawn until one is wanted."""
    attempt = 0
    while True:
        made = _drawn(VARIANT, f"{seed // CALLS_A_VARIANT} {attempt}", {}, sizes)
        if only is None or only(made):
            break
        attempt += 1
    made = _drawn(NUMBERS, str(seed), made, sizes)
    return made["op"], Case(**{name: made[name] for name in _CASE_FIELDS if name in made})


_CASE_FIELDS = tuple(f.name for f in fields(Case))

Draw = Callable[[Random, Fields, Sizes], Fields]


def _drawn(draws: Sequence[Draw], key: str, made: Fields, sizes: Sizes) -> Fields:
    for one in draws:
        made = made | one(Random(f"{key} {one.__name__}"), made, sizes)
    return made


def operator(r: Random, _made: Fields, _sizes: Sizes) -> Fields:
    """Which public function."""
    op = _weighed(r, OPS)
    return {"op": op, "dense": op == "attention"}


def storage(r: Random, made: Fields, _sizes: Sizes) -> Fields:
    """Types of the queries, the cache and its scales."""
    wide = _weighed(r, {torch.bfloat16: 4, torch.float16: 3, torch.float32: 2})
    if made["dense"] or r.random() < 0.3:
        return {"dtype": wide}
    stored = _weighed(r, {torch.int8: 5, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2})
    allowed = GRANULARITIES if stored == torch.int8 else ("none", *GRANULARITIES)
    k = r.choice(allowed)
    quant = KVQuant(stored, k, k if r.random() < 0.4 else r.choice(allowed))
    made = {"dtype": wide, "quant": quant, "scale_dtype": r.choice((torch.float32, torch.bfloat16))}
    if stored == torch.int8 and "token" not in (quant.k, quant.v_granularity) and r.random() < 0.4:
        made["compute"] = "int8"
    if r.random() < 0.2:
        made |= {"dtype": torch.float8_e4m3fn, "q_scale": r.choice(("none", "tensor", "token"))}
    return made


def heads(r: Random, _made: Fields, sizes: Sizes) -> Fields:
    """Head counts, their layout and head_dim."""
    group = r.choice((1, 1, 2, 3, 4, 4, 5, 7, 8, 8, 16))
    if r.random() < 0.04:
        group = r.choice((12, 32, 64))
    num_kv_heads = r.choice((1, 1, 2, 2, 3, 4, 5, 8) if group <= 8 else (1, 2))
    if sizes.work < 1 << 24:
        num_kv_heads, group = min(num_kv_heads, 3), min(group, 16)
    common = r.random() < 0.5
    head_dim = r.choice((64, 64, 96, 128, 128, 256)) if common else 8 * r.randint(1, 32)
    gqa = r.choice(("grouped", "grouped", "interleaved"))
    return {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "gqa": gqa}


def memory(r: Random, _made: Fields, sizes: Sizes) -> Fields:
    """Pages, tables and strides."""
    return {
        "page_size": r.choice(sizes.pages),
        "table": r.choice(("rectangular", "flat")),
        "layout": r.choice(("hnd", "nhd", "packed", "padded")),
        "strided": r.random() < 0.3,
    }


def values(r: Random, made: Fields, sizes: Sizes) -> Fields:
    """Heads beyond 256; rows of V that are shorter than those of K, or lie otherwise."""
    found: Fields = {}
    head_dim = made["head_dim"]
    if r.random() < 0.1 and sizes.work > 1 << 22:
        head_dim = found["head_dim"] = r.choice((512, 512, 8 * r.randint(33, 64)))
    if r.random() < 0.2:
        found["v_head_dim"] = r.choice((8 * r.randint(1, head_dim // 8), max(head_dim // 16 * 8, 8)))
    if r.random() < 0.1:
        found["layout"] = "apart"
    return found


def queries(r: Random, made: Fields, _sizes: Sizes) -> Fields:
    """Decode, n-step decode, or ragged: chunks and mixed batches."""
    if made["dense"]:
        return {"steps": None}
    kind = _weighed(r, {"decode": 3, "steps": 3, "ragged": 4})
    return {"steps": {"decode": 1, "steps": r.choice((*range(2, 10), 12, 16, 17, 20, 33)), "ragged": None}[kind]}


def options(r: Random, made: Fields, _sizes: Sizes) -> Fields:
    """Which options are there at all; their numbers come later."""
    windowed = r.random() < 0.7
    return {
        "windowed": windowed,
        "leading": r.choice(("", "", "count", "tensor")) if windowed else r.choice(("", "", "", "count", "tensor")),
        "causal": r.random() < 0.8,
        "capped": r.random() < 0.25,
        "sink": _weighed(r, {"none": 6, "fp32": 2, "q": 2}),
        "split_size": None if made["dense"] or r.random() < 0.6 else 64 * r.choice((1, 1, 2, 3, 4, 16)),
    }


def ranges(r: Random, _made: Fields, _sizes: Sizes) -> Fields:
    """Bounds of each row, in place of a window."""
    if r.random() > 0.15:
        return {}
    return {"ranges": r.choice((*RULES, "random", "random")), "windowed": False, "causal": True}


def products(r: Random, made: Fields, _sizes: Sizes) -> Fields:
    """Products in 8 bits throughout, over 8-bit caches."""
    return {"compute": "fast"} if "quant" in made and r.random() < 0.15 else {}


VARIANT: tuple[Draw, ...] = (operator, storage, heads, memory, values, queries, options, ranges, products)
"""What kernels are compiled for. Each draw sees what those before it made."""


def lengths(r: Random, made: Fields, sizes: Sizes) -> Fields:
    """Keys and query rows of each sequence."""
    num_seqs = 0 if r.random() < 0.02 else r.randint(1, sizes.seqs)
    edges = (made["page_size"], 16, 64, 128, made["split_size"] or 64)
    kv_lens = [_kv_len(r, edges, sizes) for _ in range(num_seqs)]
    steps = made["steps"]
    rows = [steps or _rows(r, sizes) for _ in range(num_seqs)] if steps else [_rows(r, sizes) for _ in range(num_seqs)]
    cost = made["num_kv_heads"] * made["group"] * made["head_dim"]
    while cost * sum(n * max(k, 16) for n, k in zip(rows, kv_lens, strict=True)) > sizes.work:
        kv_lens = [k * 2 // 3 if k > 0 else k for k in kv_lens]
        rows = rows if steps else [n - n // 3 for n in rows]
        if max(kv_lens) <= 1:
            break
    return {"kv_lens": tuple(kv_lens), "q_lens": steps or tuple(rows)}


def _kv_len(r: Random, edges: Sequence[int], sizes: Sizes) -> int:
    kind = r.random()
    if kind < 0.1:
        return r.choice((0, 0, -1, -r.randint(2, 10**6)))
    if kind < 0.35:
        edge = r.choice(edges)
        return max(edge * r.randint(1, max(sizes.usual // edge, 1)) + r.choice((-1, 0, 0, 1)), 0)
    return r.randint(1, sizes.usual) if kind < 0.93 else r.randint(sizes.usual, sizes.long)


def _rows(r: Random, sizes: Sizes) -> int:
    kind = r.random()
    if kind < 0.45:
        return r.choice((0, 1, 1, 1))
    return r.randint(2, min(20, sizes.rows)) if kind < 0.7 else r.randint(1, sizes.rows)


def window(r: Random, made: Fields, sizes: Sizes) -> Fields:
    """Sizes of the window and the leading tokens."""
    near = (1, 2, 3, made["page_size"], made["page_size"] + 1, 63, 64, 65, 128, r.randint(1, sizes.usual))

    def count(zero: float) -> int:
        return 0 if r.random() < zero else 10**6 if r.random() < 0.05 else r.choice(near)

    found: Fields = {"size": count(0.06) if made["windowed"] else None}
    if made["leading"] == "count":
        found["global_tokens"] = count(0)
    elif made["leading"] == "tensor" and made["kv_lens"]:
        counts = tuple(-5 if r.random() < 0.05 else count(0.2) for _ in made["kv_lens"])
        found["global_tokens"] = counts
        if r.random() < 0.5:
            found["max_global_tokens"] = max(0, *counts) + r.choice((0, 0, 7))
    return found


def positions(r: Random, made: Fields, sizes: Sizes) -> Fields:
    """Where the first query of each sequence stands."""
    if r.random() < 0.6:
        return {}
    rows = (made["steps"],) * len(made["kv_lens"]) if made["steps"] else made["q_lens"]
    starts = []
    for kv_len, n in zip(made["kv_lens"], rows, strict=True):
        end = max(kv_len, 0)
        near, before, beyond = end - n + r.randint(-70, 70), -r.randint(1, n + 1), end + r.randint(0, sizes.usual)
        starts.append(r.choice((0, end - n, near, before, beyond, end // 2)))
    return {"q_start": tuple(starts)}


def scores(r: Random, made: Fields, _sizes: Sizes) -> Fields:
    """The score scale, the soft cap, and keys that stand out."""
    usual = made["head_dim"] ** -0.5
    scale = None if r.random() < 0.6 else r.choice((usual / 4, usual * 2, usual * 4, -usual, 0.03, 0.5, 0.0))
    softcap = r.choice((1.0, 5.0, 30.0, 50.0, 100.0)) if made["capped"] else 0.0
    return {"scale": scale, "softcap": softcap, "spiked": scale != 0 and r.random() < 0.5}


def launch(r: Random, made: Fields, _sizes: Sizes) -> Fields:
    """Host bounds, rows of q that no sequence has, a dead page in sight."""
    ragged = made["steps"] is None
    return {
        "bounds": r.choice(("none", "tight", "loose")),
        "tail": r.randint(1, 5) if ragged and r.random() < 0.3 else 0,
        "holes": not made["dense"] and r.random() < 0.15,
    }


NUMBERS: tuple[Draw, ...] = (lengths, window, positions, scores, launch)
"""Everything else."""


def _weighed(r: Random, weights: dict[Any, int]) -> Any:
    return r.choices(list(weights), list(weights.values()))[0]
