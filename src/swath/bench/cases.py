"""The benchmark cases, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

from swath.bench.case import BenchCase, Draw, Extend, Groups, LogUniform, Op, UniformKeys
from swath.bench.masks import Chunks, Images
from swath.errors import bad_value
from swath.quant import KVQuant
from swath.testing.cases import DTYPES

K = 1024


def _stored(storage: str) -> KVQuant:
    """From words: "int8 token"."""
    dtype, granularity = storage.split()
    return KVQuant(DTYPES[dtype], granularity)


def _drawn(name: str, op: Op, draw: Draw, **options: Any) -> BenchCase:
    """Of 32 query heads and 8 kv heads of 128 unless ``options`` say otherwise, where ``heads`` are the two counts."""
    num_q_heads, num_kv_heads = options.pop("heads", (32, 8))
    storage, given = options.pop("storage", None), {"head_dim": 128} | options
    return BenchCase(
        name=name, op=op, draw=draw, num_kv_heads=num_kv_heads, group=num_q_heads // num_kv_heads,
        quant=None if storage is None else _stored(storage), **given,
    )  # fmt: skip


def _case(name: str, op: Op, batch: int, q_len: int, kv_len: int, **options: Any) -> BenchCase:
    return _drawn(name, op, Groups(((batch, q_len, kv_len),)), **options)


def _decode(name: str, batch: int, kv_len: int, **options: Any) -> BenchCase:
    return _case(name, "decode", batch, 1, kv_len, **options)


def _steps(name: str, batch: int, q_len: int, kv_len: int, **options: Any) -> BenchCase:
    return _case(name, "steps", batch, q_len, kv_len, **options)


def _prefill(name: str, batch: int, n: int, **options: Any) -> BenchCase:
    return _case(name, "prefill", batch, n, n, **{"dense": True, **options})


GPT_OSS: dict[str, Any] = dict(heads=(64, 8), head_dim=64)
GEMMA: dict[str, Any] = dict(heads=(32, 16))


def _models() -> Iterable[BenchCase]:
    """Prefill of models that are served today."""
    yield _prefill("llama 8k full", 1, 8 * K, tags=("quick",))
    yield _prefill("llama 16k full", 2, 16 * K)
    yield _prefill("mistral 16k", 2, 16 * K, size=4096)
    yield _prefill("gemma 16k", 2, 16 * K, size=1024, **GEMMA)
    yield _prefill("gemma 16k D256", 2, 16 * K, size=1024, heads=(16, 8), head_dim=256)
    yield _prefill("gpt-oss 16k", 2, 16 * K, size=128, tags=("quick",), **GPT_OSS)
    yield _prefill("gpt-oss 16k sinks", 2, 16 * K, size=128, sink="q", **GPT_OSS)
    yield _prefill("gpt-oss 8k full", 2, 8 * K, **GPT_OSS)
    yield _prefill("stream 16k", 2, 16 * K, size=1024, global_tokens=64)
    yield _prefill("stream 16k, no leading", 2, 16 * K, size=1024)
    for storage in (None, "int8 channel", "int8 token"):
        for size in (None, 1024):
            name = f"paged 2k at 16k{'' if storage is None else f' {storage}'}{'' if size is None else ' w1024'}"
            yield _case(name, "prefill", 4, 2 * K, 16 * K, storage=storage, size=size)
    yield _case("2k at 16k dense", "prefill", 4, 2 * K, 16 * K, dense=True)
    for page_size in (48, 64, 544, 1024):
        yield _case(f"paged 2k at 16k p{page_size}", "prefill", 4, 2 * K, 16 * K, page_size=page_size, tags=("pages",))


def _decodes() -> Iterable[BenchCase]:
    """Decode and n-step decode."""
    yield _decode("B8 4k p32", 8, 4 * K, page_size=32, tags=("quick",))
    yield _decode("B64 8k p16", 64, 8 * K, tags=("quick",))
    yield _decode("B16 32k p1024", 16, 32 * K, page_size=1024, tags=("pages",))
    yield _decode("B1 128k p16", 1, 128 * K)
    yield _decode("B128 16k w1024 p16", 128, 16 * K, size=1024, tags=("quick",))
    yield _decode("B128 16k w1024+64 p16", 128, 16 * K, size=1024, global_tokens=64)
    gpt_oss: dict[str, Any] = dict(size=128, **GPT_OSS)
    yield _decode("B128 16k w128 p16", 128, 16 * K, **gpt_oss)
    yield _decode("B128 16k w128 p16 sinks", 128, 16 * K, sink="q", **gpt_oss)
    yield _decode("B64 8k p64", 64, 8 * K, page_size=64, tags=("pages",))
    for page_size in (48, 544, 1024):
        yield _decode(f"B64 8k p{page_size}", 64, 8 * K, page_size=page_size, tags=("pages",))
    for storage in ("int8 channel", "int8 token", "fp8 e4m3"):
        stored = "e4m3 tensor" if storage == "fp8 e4m3" else storage
        yield _decode(f"B64 8k p16 {storage}", 64, 8 * K, storage=stored)
    yield _decode("B64 8k p16 int8 channel, int8 compute", 64, 8 * K, storage="int8 channel", compute="int8")
    for storage in ("int8 channel", "int8 token", "e4m3 tensor"):
        name = f"B128 16k w1024 p16 {storage}"
        yield _decode(name, 128, 16 * K, size=1024, storage=storage)
    yield _steps("4 steps, B32 16k p16", 32, 4, 16 * K)
    yield _steps("4 steps, B64 16k w4096 p16", 64, 4, 16 * K, size=4096)
    for steps in (4, 8):
        for storage in ("int8 channel", "int8 token"):
            yield _steps(f"{steps} steps, B32 16k p16 {storage}", 32, steps, 16 * K, storage=storage)
    yield _decode("MQA, B64 8k p16", 64, 8 * K, heads=(64, 1), tags=("heads",))
    yield _decode("MHA, B16 8k p16", 16, 8 * K, heads=(32, 32), tags=("heads",))
    for head_dim in (64, 80, 96, 192, 256):
        yield _decode(f"B64 8k p16 D{head_dim}", 64, 8 * K, head_dim=head_dim, tags=("head_dim",))
    ragged = LogUniform(128, 128, 64 * K)
    for name, options in (("", {}), (" w1024", {"size": 1024}), (" int8 channel", {"storage": "int8 channel"})):
        yield _drawn(f"ragged B128 128..64k p16{name}", "decode", ragged, tags=("ragged",), **options)


def _shapes() -> Iterable[BenchCase]:
    """Heads of 256 and 512, and values narrower than keys."""
    gemma4: dict[str, Any] = dict(heads=(32, 4), head_dim=512, tags=("shapes",))
    mimo: dict[str, Any] = dict(head_dim=192, v_head_dim=128, tags=("shapes",))
    local: dict[str, Any] = dict(heads=(64, 8), size=128, sink="q", **mimo)
    yield _prefill("gemma 4 8k D512", 1, 8 * K, **gemma4)
    yield _case("gemma 4, paged 2k at 16k D512", "prefill", 4, 2 * K, 16 * K, **gemma4)
    yield _prefill("mimo 8k D192/128", 1, 8 * K, heads=(64, 4), **mimo)
    yield _prefill("mimo 16k D192/128 w128 sinks", 2, 16 * K, **local)
    yield _decode("gemma 4 B32 16k D512", 32, 16 * K, **gemma4)
    yield _decode("gemma 4 B4 16k D512", 4, 16 * K, **gemma4)
    yield _decode("gemma 4 B32 16k D512 int8 token", 32, 16 * K, storage="int8 token", **gemma4)
    deepseek: dict[str, Any] = dict(heads=(64, 1), head_dim=512, size=128, sink="q", tags=("shapes",))
    yield _decode("deepseek 4 B128 16k D512 w128 sinks", 128, 16 * K, **deepseek)
    gemma3: dict[str, Any] = dict(heads=(16, 8), head_dim=256, tags=("shapes",))
    for stored in (None, "int8 token", "e4m3 tensor"):
        name = f"gemma 3 B64 8k D256{'' if stored is None else f' {stored}'}"
        yield _decode(name, 64, 8 * K, storage=stored, **gemma3)
        yield _decode(f"{name} w1024", 64, 8 * K, storage=stored, size=1024, **gemma3)
    yield _decode("mimo B64 16k D192/128", 64, 16 * K, heads=(64, 4), **mimo)
    yield _decode("mimo B128 16k D192/128 w128 sinks", 128, 16 * K, **local)


LOCAL: dict[str, dict[str, Any]] = {
    "64/8 w512": dict(heads=(64, 8), size=512),
    "laguna 72/8 w512": dict(heads=(72, 8), size=512),
    "step 96/8 w512": dict(heads=(96, 8), size=512),
    "kolibri 48/4 w513": dict(heads=(48, 4), size=513),
    "flint 32/4 w513 sinks": dict(heads=(32, 4), size=513, sink="q"),
    "granite 20/4 w128 sinks": dict(heads=(20, 4), size=128, sink="q"),
    "16/2 w2048": dict(heads=(16, 2), size=2048),
    "muse 32/2 w2048": dict(heads=(32, 2), size=2048),
    "muse 128/16 D64 w2048": dict(heads=(128, 16), size=2048, head_dim=64),
    "inkling 64/16 w512": dict(heads=(64, 16), size=512),
    "gemma 4 32/16 D256 w1024": dict(heads=(32, 16), size=1024, head_dim=256),
}
"""Windowed layers of models of 2026, by the numbers of their heads; groups of 8 beside those of 9, 12 and 16."""


def _of_2026() -> Iterable[BenchCase]:
    """Models of 2026: their windows, and their masks that are a range of keys for each row."""
    for name, shape in LOCAL.items():
        yield _prefill(f"{name}, 16k", 2, 16 * K, tags=("2026",), **shape)
        yield _decode(f"{name}, B128 16k", 128, 16 * K, tags=("2026",), **shape)
    gemma3: dict[str, Any] = dict(heads=(16, 8), head_dim=256, tags=("2026", "ranges"))
    llama4: dict[str, Any] = dict(heads=(40, 8), ranges=Chunks(8 * K), tags=("2026", "ranges"))
    for name, size in ((" w1024", 1024), ("", None)):
        images = Images(256, 1024, size)
        yield _prefill(f"gemma 3 images 16k{name}", 2, 16 * K, ranges=images, **gemma3)
        yield _case(f"gemma 3 images, paged 2k at 16k{name}", "prefill", 4, 2 * K, 16 * K, ranges=images, **gemma3)
    yield _prefill("gemma 3 16k w1024, no images", 2, 16 * K, size=1024, **gemma3)
    yield _prefill("llama 4 chunks 16k", 2, 16 * K, **llama4)
    yield _case("llama 4 chunks, paged 2k at 16k", "prefill", 4, 2 * K, 16 * K, **llama4)


def _mixed() -> Iterable[BenchCase]:
    """Chunks of prefill beside decodes, as continuous batching makes them, and both parts alone."""
    chunks, decodes = (2, 2 * K, 16 * K), (62, 1, 16 * K)
    for name, options in (("", {}), (" w1024", {"size": 1024}), (" int8 channel", {"storage": "int8 channel"})):
        common: dict[str, Any] = {"tags": ("mixed",), **options}
        yield _drawn(f"mixed 2 x 2k + 62 at 16k{name}", "mixed", Groups((chunks, decodes)), **common)
        yield _case(f"mixed, chunks alone at 16k{name}", "prefill", *chunks, **common)
        yield _case(f"mixed, decodes alone at 16k{name}", "decode", *decodes, **common)


EIGHT_BITS: dict[str, tuple[Op, int, int, int, dict[str, Any]]] = {
    "8k": ("prefill", 1, 8 * K, 8 * K, dict(page_size=64)),
    "8k D256": ("prefill", 1, 8 * K, 8 * K, dict(page_size=64, heads=(16, 8), head_dim=256)),
    "2k at 16k": ("prefill", 4, 2 * K, 16 * K, {}),
    "16k w4096": ("prefill", 2, 16 * K, 16 * K, dict(page_size=64, size=4096)),
    "16k w1024": ("prefill", 2, 16 * K, 16 * K, dict(page_size=64, size=1024, **GEMMA)),
    "16k D256 w1024": ("prefill", 2, 16 * K, 16 * K, dict(page_size=64, size=1024, heads=(16, 8), head_dim=256)),
    "16k": ("prefill", 1, 16 * K, 16 * K, dict(page_size=64)),
    "8k D64": ("prefill", 1, 8 * K, 8 * K, dict(page_size=64, **GPT_OSS)),
    "16k D64 w128": ("prefill", 2, 16 * K, 16 * K, dict(page_size=64, size=128, **GPT_OSS)),
    "decode B64 8k": ("decode", 64, 1, 8 * K, {}),
    "decode B128 16k w1024": ("decode", 128, 1, 16 * K, dict(size=1024)),
}
"""Calls over pages, whose cache and queries have 16 or 8 bits."""
FP8_Q: dict[str, Any] = dict(storage="e4m3 head", dtype=torch.float8_e4m3fn, q_scale="tensor")
IN_BITS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": dict(storage="int8 channel"),
    "int8 products": dict(storage="int8 channel", compute="int8"),
    "int8 fast": dict(storage="int8 channel", compute="fast"),
    "fp8": dict(storage="e4m3 head"),
    "fp8 q": FP8_Q,
    "fp8 q made": FP8_Q | {"q_made": True},
    "fp8 q fast": FP8_Q | {"compute": "fast"},
    "fp8 q made, fast": FP8_Q | {"q_made": True, "compute": "fast"},
}


def _eight_bits() -> Iterable[BenchCase]:
    """The same calls in every form of 16 and 8 bits, for their times and errors side by side."""
    for shape, (op, batch, q_len, kv_len, options) in EIGHT_BITS.items():
        for form, bits in IN_BITS.items():
            given = {**options, **bits, "tags": ("8-bit", shape)}
            yield _case(f"8-bit {shape}, {form}", op, batch, q_len, kv_len, **given)


def _seeds() -> Iterable[BenchCase]:
    """The shapes that the authors of the systems before swath test or time (see ``KEY``)."""
    window: dict[str, Any] = dict(size=1024, global_tokens=4)
    for name, options in (
        ("p32", {"page_size": 32}), ("p128", {"page_size": 128}), ("p512", {"page_size": 512}),
        ("p1024", {"page_size": 1024}), ("D96 p32", {"page_size": 32, "head_dim": 96}),
        ("8/1 p32", {"page_size": 32, "heads": (8, 1)}),
        ("24/8 p32", {"page_size": 32, "heads": (24, 8)}),
    ):  # fmt: skip
        given: dict[str, Any] = {"heads": (16, 4), **window, **options}
        yield _drawn(f"000a {name}", "decode", UniformKeys(8, 1, 1023), tags=("000a",), **given)
    for batch, q, cached, options in (
        (2, 2048, 0, dict(heads=(16, 4), head_dim=96, page_size=128)),
        (4, 769, 511, dict(heads=(24, 6), page_size=128)),
        (5, 1025, 333, dict(heads=(16, 4), page_size=256)),
        (2, 1024, 1024, dict(heads=(24, 8), page_size=1024)),
        (2, 2048, 0, dict(heads=(16, 4), head_dim=64, page_size=128)),
        (2, 2048, 0, dict(heads=(16, 4), head_dim=256, page_size=128)),
    ):
        yield _seed_prefill("000b", batch, q, cached, **window, **options)
    for batch, q, cached, options in (
        (2, 4096, 8192, dict(heads=(8, 1), page_size=128)),
        (6, 1537, 777, dict(heads=(24, 6), page_size=128)),
        (3, 193, 769, dict(heads=(20, 5), head_dim=192, page_size=256)),
        (3, 1024, 0, dict(heads=(24, 6), head_dim=80, page_size=64)),
    ):
        yield _seed_prefill("001", batch, q, cached, **options)
    for heads, page_size, head_dim in (
        ((16, 4), 512, 128), ((16, 8), 128, 96), ((8, 1), 128, 128), ((8, 1), 1024, 128), ((8, 2), 1024, 128),
        ((24, 8), 1024, 128),
    ):  # fmt: skip
        for steps in (1, 2, 3, 4) if page_size == 512 else (4,):
            shape = dict(heads=heads, page_size=page_size, head_dim=head_dim)
            name = f"002 {steps} steps {heads[0]}/{heads[1]} D{head_dim} p{page_size}"
            op: Op = "steps" if steps > 1 else "decode"
            yield _case(name, op, 8, steps, 4 * K, tags=("002",), **window, **shape)
    yield from _aiter()


def _seed_prefill(row: str, batch: int, q: int, cached: int, **options: Any) -> BenchCase:
    (num_q_heads, num_kv_heads), dim = options["heads"], options.get("head_dim", 128)
    name = f"{row} B{batch} {num_q_heads}/{num_kv_heads} D{dim} {q}+{cached} p{options['page_size']}"
    return _case(name, "prefill", batch, q, q + cached, storage="int8 channel", tags=(row,), **options)


def _aiter() -> Iterable[BenchCase]:
    for batch, ctx, heads, head_dim, page_size, size in (
        (128, 8192, (64, 8), 128, 16, None), (81, 1027, (16, 1), 128, 64, None), (3, 8192, (10, 1), 128, 16, None),
        (1, 8192, (5, 1), 128, 1024, None), (128, 1024, (8, 1), 64, 16, 128), (81, 8192, (8, 1), 192, 64, None),
        (81, 8192, (8, 1), 256, 1024, None),
    ):  # fmt: skip
        name = f"003 B{batch} {ctx} {heads[0]}/{heads[1]} D{head_dim} p{page_size}{'' if size is None else f' w{size}'}"
        shape: dict[str, Any] = dict(heads=heads, head_dim=head_dim, page_size=page_size)
        yield _decode(name, batch, ctx, size=size, tags=("003",), **shape)
    shape = dict(heads=(64, 8), page_size=16, tags=("003",))
    yield _drawn("003 B128 1..8192 64/8 D128 p16", "decode", UniformKeys(128, 1, 8192), **shape)
    yield _drawn("003 4 steps, B128 4..8192 64/8 D128 p16", "steps", UniformKeys(128, 4, 8192, 4), **shape)
    yield _decode("003 B128 8192 64/8 D128 p16 fp8 e4m3", 128, 8 * K, storage="e4m3 tensor", **shape)


def _table() -> Iterable[BenchCase]:
    """The ragged table of row 004; S there excludes the query's own key."""
    for n in (1024, 2048, 4096, 8192):
        for s in (-1, 127, 256, 512):
            tags = ("004", "ragged")
            shape: dict[str, Any] = dict(heads=(64, 8), dense=True, size=None if s < 0 else s + 1, tags=tags)
            yield _drawn(f"004 N{n} S{s}", "prefill", Extend(n), **shape)


def _sweeps() -> Iterable[BenchCase]:
    """Time against context at a fixed window, and against the window at a fixed context."""
    for n in (2, 4, 8, 16, 32, 64, 128):
        # The windowed cases at 32k (decode) and 16k (prefill) are points of both sweeps.
        tags = ("sweep", "context", *(("window",) if n == 32 else ()))
        yield _decode(f"sweep B32 {n}k w1024", 32, n * K, size=1024, tags=tags)
        if n <= 32:
            yield _decode(f"sweep B32 {n}k", 32, n * K, tags=("sweep", "context"))
        if n <= 64:
            tags = ("sweep", "context", *(("window",) if n == 16 else ()))
            yield _prefill(f"sweep prefill {n}k w1024", 1, n * K, size=1024, tags=tags)
    for size in (128, 256, 512, 2048, 4096, 8192, 16384):
        yield _decode(f"sweep B32 32k w{size}", 32, 32 * K, size=size, tags=("sweep", "window"))
        yield _prefill(f"sweep prefill 16k w{size}", 1, 16 * K, size=size, tags=("sweep", "window"))


def _cpu() -> Iterable[BenchCase]:
    """Sizes for the cpu backend, in float32."""
    small: dict[str, Any] = dict(heads=(8, 2), head_dim=64, dtype=torch.float32)
    decode: dict[str, Any] = small | {"size": 1024}
    for n in (1, 4, 32):
        tags = ("cpu", "sweep", "context")
        yield _decode(f"cpu B16 {n}k w1024", 16, n * K, tags=tags, **decode)
    for granularity in ("token", "channel"):
        name = f"cpu B16 32k w1024 int8 {granularity}"
        yield _decode(name, 16, 32 * K, storage=f"int8 {granularity}", tags=("cpu",), **decode)
    yield _prefill("cpu prefill 8k w512", 1, 8 * K, size=512, tags=("cpu",), **small)
    quick = ("cpu", "quick")
    yield _decode("cpu B4 4k w256+4", 4, 4 * K, size=256, global_tokens=4, tags=quick, **small)
    yield _decode("cpu B4 4k int8 token", 4, 4 * K, storage="int8 token", tags=quick, **small)
    yield _steps("cpu 4 steps, B4 4k w256", 4, 4, 4 * K, size=256, tags=quick, **small)
    yield _prefill("cpu prefill 1k w128", 1, K, size=128, tags=quick, **small)


CASES = tuple(
    chain(_models(), _decodes(), _shapes(), _of_2026(), _mixed(), _eight_bits(), _seeds(), _table(), _sweeps(), _cpu())
)
"""Every case of ``swath bench``. Those tagged "cpu" are for machines without a GPU, the others for GPUs."""
BY_NAME = {case.name: case for case in CASES}


def shape_in_bits(case: str) -> str | None:
    """The shape in ``EIGHT_BITS`` that a case is of, by its name; None for other cases."""
    found = BY_NAME.get(case)
    return found.tags[1] if found is not None and found.tags[:1] == ("8-bit",) else None


def select(
    match: tuple[str, ...] = (), op: str | None = None, tag: tuple[str, ...] = (), *, on_gpu: bool | None = None
) -> tuple[BenchCase, ...]:
    """Cases whose name contains one of ``match``, of an op, with all of the tags, for a kind of machine (None: any).

    Raises:
        ValueError: naming the option that leaves nothing.
    """
    found = CASES
    tests = (
        ("match", match, lambda c: any(text.lower() in c.name.lower() for text in match)),
        ("op", op, lambda c: c.op == op),
        ("tag", tag, lambda c: set(tag) <= set(c.tags)),
        ("device", None if on_gpu is None else "gpu" if on_gpu else "cpu", lambda c: ("cpu" in c.tags) != on_gpu),
    )
    for name, wanted, fits in tests:
        if wanted:
            found = tuple(case for case in found if fits(case))
            if not found:
                raise bad_value(name, "something that a case has (see: swath bench list)", wanted)
    return found
