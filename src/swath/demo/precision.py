"""What 8 bits cost: the perplexity of a model over each kind of cache and product, and needles found in 64k keys.

python -m swath.demo.precision                      both, into precision.json; a quarter of an hour on a CPU
python -m swath.demo.precision --only needles       or perplexity
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swath
from swath import KVQuant, PagedKV, hf, paged_attention, quantise_q, slots
from swath.cli.files import write_all
from swath.cli.output import one_line_errors
from swath.demo.measure import ATTENTION, score
from swath.demo.model import load
from swath.demo.run import device_name
from swath.demo.settings import Budget, pick_device
from swath.demo.texts import topics
from swath.ops.append import append_kv
from swath.quant import calibrate

PAGE_SIZE = 64
"""A multiple of 64, as ``compute="fast"`` has them."""
BUDGET = Budget(tokens=3072, scored=1024, chunk=1024, decode_steps=0)


@dataclass(frozen=True)
class Form:
    """What keys, values and queries are stored as, and multiply as. quant: None is the model's dtype."""

    quant: KVQuant | None = None
    compute: str = "float"
    fp8_queries: bool = False


INT8, FP8 = KVQuant(torch.int8, "head", "channel"), KVQuant(torch.float8_e4m3fn, "head")
"""Static scales, as products in 8 bits need them. Not of K's channels: see docs/quantised-caches.md."""
FORMS = {
    "16 or 32 bits": Form(),
    "int8 cache": Form(INT8),
    "int8 cache and products": Form(INT8, "int8"),
    "int8 cache, fast": Form(INT8, "fast"),
    "fp8 cache": Form(FP8),
    "fp8 cache and queries": Form(FP8, fp8_queries=True),
    "fp8 cache and queries, fast": Form(FP8, "fast", fp8_queries=True),
}


@dataclass(frozen=True)
class Haystack:
    """Queries of a chunk at the end of ``keys`` keys. Each has a needle among them, whose value is a mark.

    score: of a needle; those of all other keys are normal. The mark stands out of the other values by a margin that
    errors of some percent take away from some queries.
    """

    keys: int = 65_536
    tokens: int = 512
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    score: float = 6.8
    mark: float = 4.0


@dataclass(frozen=True, eq=False)
class Needles:
    """q [T, Hq, D], k and v [N, Hkv, D], and the channel of each query's mark [T, Hkv]; all float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    channel: Tensor


def needles(of: Haystack, device: torch.device | str = "cpu", seed: int = 0) -> Needles:
    """The tensors of a haystack. Each token has a needle for each kv head, anywhere before the chunk."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    group = of.q_heads // of.kv_heads
    k, v = (normal(of.keys, of.kv_heads, of.head_dim) for _ in "kv")
    wanted = normal(of.tokens, of.kv_heads, of.head_dim)
    q = wanted.repeat_interleave(group, 1) + 0.1 * normal(of.tokens, of.q_heads, of.head_dim)
    places = torch.randperm(of.keys - of.tokens, generator=generator)[: of.tokens]
    channel = torch.randint(of.head_dim, (of.tokens, of.kv_heads), generator=generator)
    k[places] = wanted * (of.score * of.head_dim**0.5 / wanted.square().sum(-1, keepdim=True))
    v[places] = of.mark * torch.nn.functional.one_hot(channel, of.head_dim).float()
    return Needles(*(x.to(device) for x in (q, k, v, channel)))


def attended(found: Needles, form: Form, dtype: torch.dtype, **options: Any) -> Tensor:
    """The output [T, Hq, D] of the chunk over a paged cache in a form; 16 or 32 bits are ``dtype``, as queries are."""
    num_keys, kv_heads, head_dim = found.k.shape
    device, pages = found.k.device, -(-num_keys // PAGE_SIZE)
    quant = KVQuant(dtype) if form.quant is None else form.quant
    scales: dict[str, Any] = {}
    if form.quant is not None:
        kinds = (found.k, quant.k), (found.v, quant.v_granularity)
        scales = dict(zip(("k_scale", "v_scale"), (calibrate(x, quant.dtype, g) for x, g in kinds), strict=True))
    cache = PagedKV.empty(quant, pages, kv_heads, PAGE_SIZE, head_dim, device=device, **scales)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()[None].to(device)
    seq_lens = torch.tensor([num_keys], dtype=torch.int32, device=device)
    where = slots(table, seq_lens, PAGE_SIZE, num_tokens=num_keys)
    append_kv(cache, found.k.to(dtype), found.v.to(dtype), where)
    q, cu = found.q.to(dtype), torch.tensor([0, len(found.q)], dtype=torch.int32, device=device)
    if form.fp8_queries:
        q, options["q_scale"] = quantise_q(q)
    given: dict[str, Any] = {"cu_seqlens_q": cu, "max_q_len": len(q), "compute": form.compute, **options}
    out: Any = paged_attention(q, cache, table, seq_lens, **given)
    return out  # type: ignore[no-any-return]


def exact(found: Needles) -> Tensor:
    """The same in float64, of the numbers before any rounding."""
    heads = []
    tokens, group = len(found.q), found.q.shape[1] // found.k.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=found.q.device).triu(1)
    for head in range(found.q.shape[1]):
        k, v = (x[:, head // group].double() for x in (found.k, found.v))
        s = found.q[:, head].double() @ k.T * k.shape[1] ** -0.5
        s[:, -tokens:].masked_fill_(later, -torch.inf)
        heads.append(s.softmax(-1) @ v)
    return torch.stack(heads, 1)


def share_found(out: Tensor, found: Needles) -> float:
    """The share of rows (token, query head) in whose result the mark is the largest element."""
    channel = found.channel.repeat_interleave(out.shape[1] // found.channel.shape[1], 1)
    return float((out.float().argmax(-1) == channel).float().mean())


def search(of: Haystack, device: torch.device) -> dict[str, dict[str, float]]:
    """By form, the share of needles found and the relative error to float64 of the numbers before any rounding."""
    found, dtype = needles(of, device), torch.float32 if device.type == "cpu" else torch.bfloat16
    want = exact(found)
    said = {"float64": {"found": share_found(want, found), "error": 0.0}}
    for name, form in FORMS.items():
        out = attended(found, form, dtype).double()
        said[name] = {"found": share_found(out, found), "error": float((out - want).norm() / want.norm())}
        print(f"{of.keys:,} keys, {name}: {said[name]}", flush=True)
    return said


@torch.no_grad()
def perplexities(loaded: Any, ids: Tensor, budget: Budget) -> dict[str, float]:
    """By form, the perplexity of the last ``budget.scored`` of ``ids``, prefilled in chunks over a paged cache."""
    said = {}
    for name, form in FORMS.items():
        hf.register(ATTENTION, compute=form.compute, fp8_queries=form.fp8_queries)
        loaded.model.set_attn_implementation(ATTENTION)
        cache = hf.PagedCache(loaded.model.config, page_size=PAGE_SIZE, quant=form.quant)
        said[name] = score(loaded.model, cache, ids.to(loaded.model.device), budget, lambda _tokens: None)
        print(f"perplexity, {name}: {said[name]:.4f}", flush=True)
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module."""
    parser = argparse.ArgumentParser(prog="python -m swath.demo.precision", description="What 8 bits cost.")
    parser.add_argument("--only", choices=("needles", "perplexity"), help="one of the two")
    parser.add_argument("--keys", default="65536", metavar="N,...", help="keys of haystacks")
    parser.add_argument("--device", metavar="NAME", help="cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, default=Path("precision.json"), metavar="FILE", help="the figures")
    chosen = parser.parse_args(arguments)
    with one_line_errors():
        device = pick_device(chosen.device)
        said: dict[str, Any] = {"device": device_name(device), "date": datetime.date.today().isoformat()}
        said |= {"swath": swath.__version__, "torch": torch.__version__}
        tokens = 512 if device.type == "cuda" else 64
        if chosen.only != "perplexity":
            haystacks = [Haystack(int(n), tokens) for n in chosen.keys.split(",")]
            said["needles"] = {str(of.keys): search(of, device) for of in haystacks}
        if chosen.only != "needles":
            loaded = load(None, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
            said["perplexity"] = perplexities(loaded, topics(loaded.tokenizer).take(0, BUDGET.tokens), BUDGET)
        write_all({chosen.output: json.dumps(said, indent=2) + "\n"})


if __name__ == "__main__":
    main()
