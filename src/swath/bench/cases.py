"""The benchmark cases, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from swath.bench.case import BenchCase, Extend, Groups, LogUniform, UniformKeys
from swath.errors import bad_value

K = 1024


def _case(name: str, op: str, batch: int, q_len: int, kv_len: int, **options: Any) -> BenchCase:
    return BenchCase(name, op, Groups(((batch, q_len, kv_len),)), **options)


def _decode(name: str, batch: int, kv_len: int, **options: Any) -> BenchCase:
    return _case(name, "decode", batch, 1, kv_len, **options)


def _steps(name: str, batch: int, q_len: int, kv_len: int, **options: Any) -> BenchCase:
    return _case(name, "steps", batch, q_len, kv_len, **options)


def _prefill(name: str, batch: int, n: int, **options: Any) -> BenchCase:
    return _case(name, "prefill", batch, n, n, **{"page_size": 0, **options})


GPT_OSS: dict[str, Any] = dict(heads=64, kv_heads=8, head_dim=64)
GEMMA: dict[str, Any] = dict(heads=32, kv_heads=16)


def _models() -> Iterable[BenchCase]:
    """Prefill of models that are served today."""
    yield _prefill("llama 8k full", 1, 8 * K, tags=("quick",), goal_peer=1.0)
    yield _prefill("llama 16k full", 2, 16 * K, goal_peer=1.0)
    yield _prefill("mistral 16k", 2, 16 * K, window=4096, goal_peer=1.05)
    yield _prefill("gemma 16k", 2, 16 * K, window=1024, goal_peer=1.2, **GEMMA)
    yield _prefill("gemma 16k D256", 2, 16 * K, window=1024, heads=16, kv_heads=8, head_dim=256)
    yield _prefill("gpt-oss 16k", 2, 16 * K, window=128, tags=("quick",), goal_peer=3.2, **GPT_OSS)
    yield _prefill("gpt-oss 16k sinks", 2, 16 * K, window=128, sink=True, goal_peer=3.2, **GPT_OSS)
    yield _prefill("gpt-oss 8k full", 2, 8 * K, goal_peer=1.0, **GPT_OSS)
    yield _prefill("stream 16k", 2, 16 * K, window=1024, leading=64, goal_peer=1.7)
    yield _prefill("stream 16k, no leading", 2, 16 * K, window=1024)
    for storage, goals in (("bf16", (1.0, 1.15)), ("int8 channel", (10.0, 10.0)), ("int8 token", (10.0, 10.0))):
        suffix = "" if storage == "bf16" else f" {storage}"
        for window, goal in zip((None, 1024), goals, strict=True):
            name = f"paged 2k at 16k{suffix}{'' if window is None else ' w1024'}"
            yield _case(name, "prefill", 4, 2 * K, 16 * K, storage=storage, window=window, goal_peer=goal)
    yield _case("2k at 16k dense", "prefill", 4, 2 * K, 16 * K, page_size=0)
    for page_size in (48, 64, 544, 1024):
        yield _case(f"paged 2k at 16k p{page_size}", "prefill", 4, 2 * K, 16 * K, page_size=page_size, tags=("pages",))


def _decodes() -> Iterable[BenchCase]:
    """Decode and n-step decode."""
    yield _decode("B8 4k p32", 8, 4 * K, page_size=32, tags=("quick",), goal_x_floor=1.25)
    yield _decode("B64 8k p16", 64, 8 * K, tags=("quick",), goal_x_floor=1.03)
    yield _decode("B16 32k p1024", 16, 32 * K, page_size=1024, tags=("pages",), goal_x_floor=1.02)
    yield _decode("B1 128k p16", 1, 128 * K, goal_x_floor=1.07)
    yield _decode("B128 16k w1024 p16", 128, 16 * K, window=1024, tags=("quick",), goal_x_floor=1.06)
    yield _decode("B128 16k w1024+64 p16", 128, 16 * K, window=1024, leading=64)
    gpt_oss: dict[str, Any] = dict(window=128, goal_x_floor=1.8, goal_peer=1.8, **GPT_OSS)
    yield _decode("B128 16k w128 p16", 128, 16 * K, **gpt_oss)
    yield _decode("B128 16k w128 p16 sinks", 128, 16 * K, sink=True, **gpt_oss)
    yield _decode("B64 8k p64", 64, 8 * K, page_size=64, tags=("pages",), goal_x_floor=1.025)
    for page_size in (48, 544, 1024):
        yield _decode(f"B64 8k p{page_size}", 64, 8 * K, page_size=page_size, tags=("pages",))
    for storage, goal in (("int8 channel", 1.06), ("int8 token", 1.08), ("fp8 e4m3", 1.06)):
        stored = "e4m3 tensor" if storage == "fp8 e4m3" else storage
        yield _decode(f"B64 8k p16 {storage}", 64, 8 * K, storage=stored, goal_x_floor=goal)
    yield _decode("B64 8k p16 int8 channel, int8 compute", 64, 8 * K, storage="int8 channel", compute="int8")
    for storage in ("int8 channel", "int8 token", "e4m3 tensor"):
        name = f"B128 16k w1024 p16 {storage}"
        yield _decode(name, 128, 16 * K, window=1024, storage=storage, goal_x_floor=1.15)
    yield _steps("4 steps, B32 16k p16", 32, 4, 16 * K, goal_x_floor=1.035)
    yield _steps("4 steps, B64 16k w4096 p16", 64, 4, 16 * K, window=4096, goal_x_floor=1.08)
    for steps in (4, 8):
        for storage in ("int8 channel", "int8 token"):
            yield _steps(f"{steps} steps, B32 16k p16 {storage}", 32, steps, 16 * K, storage=storage)
    yield _decode("MQA, B64 8k p16", 64, 8 * K, heads=64, kv_heads=1, tags=("heads",))
    yield _decode("MHA, B16 8k p16", 16, 8 * K, heads=32, kv_heads=32, tags=("heads",))
    for head_dim in (64, 80, 96, 192, 256):
        yield _decode(f"B64 8k p16 D{head_dim}", 64, 8 * K, head_dim=head_dim, tags=("head_dim",))
    ragged = LogUniform(128, 128, 64 * K)
    for name, options in (("", {}), (" w1024", {"window": 1024}), (" int8 channel", {"storage": "int8 channel"})):
        yield BenchCase(f"ragged B128 128..64k p16{name}", "decode", ragged, tags=("ragged",), **options)


def _mixed() -> Iterable[BenchCase]:
    """Chunks of prefill beside decodes, as continuous batching makes them, and both parts alone."""
    chunks, decodes = (2, 2 * K, 16 * K), (62, 1, 16 * K)
    for name, options in (("", {}), (" w1024", {"window": 1024}), (" int8 channel", {"storage": "int8 channel"})):
        common: dict[str, Any] = {"tags": ("mixed",), **options}
        yield BenchCase(f"mixed 2 x 2k + 62 at 16k{name}", "mixed", Groups((chunks, decodes)), **common)
        yield _case(f"mixed, chunks alone at 16k{name}", "prefill", *chunks, **common)
        yield _case(f"mixed, decodes alone at 16k{name}", "decode", *decodes, **common)


def _seeds() -> Iterable[BenchCase]:
    """The shapes that the authors of the five rows of requirements test or time."""
    window: dict[str, Any] = dict(window=1024, leading=4)
    for name, options in (
        ("p32", {"page_size": 32}), ("p128", {"page_size": 128}), ("p512", {"page_size": 512}),
        ("p1024", {"page_size": 1024}), ("D96 p32", {"page_size": 32, "head_dim": 96}),
        ("8/1 p32", {"page_size": 32, "heads": 8, "kv_heads": 1}),
        ("24/8 p32", {"page_size": 32, "heads": 24, "kv_heads": 8}),
    ):  # fmt: skip
        heads: dict[str, Any] = {"heads": 16, "kv_heads": 4, **options}
        yield BenchCase(f"000a {name}", "decode", UniformKeys(8, 1, 1023), tags=("000a",), **window, **heads)
    for batch, q, cached, options in (
        (2, 2048, 0, dict(heads=16, kv_heads=4, head_dim=96, page_size=128)),
        (4, 769, 511, dict(heads=24, kv_heads=6, page_size=128)),
        (5, 1025, 333, dict(heads=16, kv_heads=4, page_size=256)),
        (2, 1024, 1024, dict(heads=24, kv_heads=8, page_size=1024)),
        (2, 2048, 0, dict(heads=16, kv_heads=4, head_dim=64, page_size=128)),
        (2, 2048, 0, dict(heads=16, kv_heads=4, head_dim=256, page_size=128)),
    ):
        yield _seed_prefill("000b", batch, q, cached, **window, **options)
    for batch, q, cached, options in (
        (2, 4096, 8192, dict(heads=8, kv_heads=1, page_size=128)),
        (6, 1537, 777, dict(heads=24, kv_heads=6, page_size=128)),
        (3, 193, 769, dict(heads=20, kv_heads=5, head_dim=192, page_size=256)),
        (3, 1024, 0, dict(heads=24, kv_heads=6, head_dim=80, page_size=64)),
    ):
        yield _seed_prefill("001", batch, q, cached, **options)
    for heads_of, page_size, head_dim in (
        ((16, 4), 512, 128), ((16, 8), 128, 96), ((8, 1), 128, 128), ((8, 1), 1024, 128), ((8, 2), 1024, 128),
        ((24, 8), 1024, 128),
    ):  # fmt: skip
        for steps in (1, 2, 3, 4) if page_size == 512 else (4,):
            shape = dict(heads=heads_of[0], kv_heads=heads_of[1], page_size=page_size, head_dim=head_dim)
            name = f"002 {steps} steps {heads_of[0]}/{heads_of[1]} D{head_dim} p{page_size}"
            op = "steps" if steps > 1 else "decode"
            yield _case(name, op, 8, steps, 4 * K, tags=("002",), **window, **shape)
    yield from _aiter()


def _seed_prefill(row: str, batch: int, q: int, cached: int, **options: Any) -> BenchCase:
    dim = options.get("head_dim", 128)
    name = f"{row} B{batch} {options['heads']}/{options['kv_heads']} D{dim} {q}+{cached} p{options['page_size']}"
    return _case(name, "prefill", batch, q, q + cached, storage="int8 channel", tags=(row,), **options)


def _aiter() -> Iterable[BenchCase]:
    for batch, ctx, heads, kv_heads, head_dim, page_size, window in (
        (128, 8192, 64, 8, 128, 16, None), (81, 1027, 16, 1, 128, 64, None), (3, 8192, 10, 1, 128, 16, None),
        (1, 8192, 5, 1, 128, 1024, None), (128, 1024, 8, 1, 64, 16, 128), (81, 8192, 8, 1, 192, 64, None),
        (81, 8192, 8, 1, 256, 1024, None),
    ):  # fmt: skip
        suffix = "" if window is None else f" w{window}"
        name = f"003 B{batch} {ctx} {heads}/{kv_heads} D{head_dim} p{page_size}{suffix}"
        shape: dict[str, Any] = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
        yield _decode(name, batch, ctx, window=window, tags=("003",), **shape)
    shape = dict(heads=64, kv_heads=8, page_size=16, tags=("003",))
    yield BenchCase("003 B128 1..8192 64/8 D128 p16", "decode", UniformKeys(128, 1, 8192), **shape)
    yield BenchCase("003 4 steps, B128 4..8192 64/8 D128 p16", "steps", UniformKeys(128, 4, 8192, 4), **shape)
    yield _decode("003 B128 8192 64/8 D128 p16 fp8 e4m3", 128, 8 * K, storage="e4m3 tensor", **shape)


def _table() -> Iterable[BenchCase]:
    """The ragged table of row 004; S there excludes the query's own key."""
    for n in (1024, 2048, 4096, 8192):
        for s in (-1, 127, 256, 512):
            tags = ("004", "ragged")
            window = None if s < 0 else s + 1
            yield BenchCase(f"004 N{n} S{s}", "prefill", Extend(n), 64, 8, page_size=0, window=window, tags=tags)


def _sweeps() -> Iterable[BenchCase]:
    """Time against context at a fixed window, and against the window at a fixed context."""
    for n in (2, 4, 8, 16, 32, 64, 128):
        # The windowed cases at 32k (decode) and 16k (prefill) are points of both sweeps.
        tags = ("sweep", "context", *(("window",) if n == 32 else ()))
        yield _decode(f"sweep B32 {n}k w1024", 32, n * K, window=1024, tags=tags)
        if n <= 32:
            yield _decode(f"sweep B32 {n}k", 32, n * K, tags=("sweep", "context"))
        if n <= 64:
            tags = ("sweep", "context", *(("window",) if n == 16 else ()))
            yield _prefill(f"sweep prefill {n}k w1024", 1, n * K, window=1024, tags=tags)
    for window in (128, 256, 512, 2048, 4096, 8192, 16384):
        yield _decode(f"sweep B32 32k w{window}", 32, 32 * K, window=window, tags=("sweep", "window"))
        yield _prefill(f"sweep prefill 16k w{window}", 1, 16 * K, window=window, tags=("sweep", "window"))


def _cpu() -> Iterable[BenchCase]:
    """Sizes for the cpu backend, in float32."""
    small: dict[str, Any] = dict(heads=8, kv_heads=2, head_dim=64, dtype="f32")
    decode: dict[str, Any] = small | {"window": 1024}
    for n in (1, 4, 32):
        tags = ("cpu", "sweep", "context")
        yield _decode(f"cpu B16 {n}k w1024", 16, n * K, storage="f32", tags=tags, **decode)
    for granularity in ("token", "channel"):
        name = f"cpu B16 32k w1024 int8 {granularity}"
        yield _decode(name, 16, 32 * K, storage=f"int8 {granularity}", tags=("cpu",), **decode)
    yield _prefill("cpu prefill 8k w512", 1, 8 * K, window=512, storage="f32", tags=("cpu",), **small)
    quick = ("cpu", "quick")
    yield _decode("cpu B4 4k w256+4", 4, 4 * K, window=256, leading=4, storage="f32", tags=quick, **small)
    yield _decode("cpu B4 4k int8 token", 4, 4 * K, storage="int8 token", tags=quick, **small)
    yield _steps("cpu 4 steps, B4 4k w256", 4, 4, 4 * K, window=256, storage="f32", tags=quick, **small)
    yield _prefill("cpu prefill 1k w128", 1, K, window=128, storage="f32", tags=quick, **small)


CASES = tuple(chain(_models(), _decodes(), _mixed(), _seeds(), _table(), _sweeps(), _cpu()))
"""Every case of ``swath bench``. Those tagged "cpu" are for machines without a GPU, the others for GPUs."""
BY_NAME = {case.name: case for case in CASES}


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
