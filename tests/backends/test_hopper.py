"""The Hopper backend where sweeps of small cases do not reach: many row tiles, key tiles and pages, and its queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swath import target
from swath.backends.hopper import attention as hopper
from swath.quant import KVQuant
from swath.testing import Case, make
from swath.testing.ranges import RULES

pytestmark = pytest.mark.gpu

LONG = Case((700, 1300, 261, 40), (700, 513, 130, 40), num_kv_heads=2, group=4, head_dim=128, dense=True, spiked=True)
PAGED = replace(LONG, dense=False)

DECODE = replace(PAGED, kv_lens=tuple(1300 - 40 * i for i in range(33)), q_lens=1, num_kv_heads=8, size=1024)
"""As many sequences as an H200 has places for their kv heads, under a window that tiles are faster with."""

ONCE = replace(LONG, head_dim=64, group=8, size=128)
"""Rows of which 128 see 144 keys at most: two consumers attend them in one pass."""
ONCE_PAGED = replace(ONCE, dense=False, page_size=8, size=122)

E4M3 = torch.float8_e4m3fn
FP8 = replace(PAGED, dtype=E4M3, quant=KVQuant(E4M3, "head"), q_scale="token")
INT8 = replace(PAGED, quant=KVQuant(torch.int8, "channel"), compute="int8")
FAST_FP8 = replace(FP8, page_size=64, compute="fast", size=300)
"""p and V multiply in 8 bits as well."""
FAST_INT8 = replace(INT8, page_size=64, compute="fast")
WIDE = replace(LONG, kv_lens=(4700, 4300, 261, 40), q_lens=(500, 213, 130, 40), head_dim=512)
"""Heads of 512, some of whose rows do not see what windows of little more than 4,096 keys hide."""
WIDE_INT8 = replace(PAGED, head_dim=512, quant=KVQuant(torch.int8, "channel"))

CASES = {
    "full": LONG,
    "full, heads in sections": replace(
        LONG, kv_lens=(5000, 700, 12000), q_lens=(300, 700, 261), num_kv_heads=8, group=2
    ),
    "pages of 16, heads in sections": replace(PAGED, kv_lens=(6000, 6100, 5800), q_lens=200, num_kv_heads=6, group=2),
    "full, padding rows": replace(LONG, kv_lens=(700, 1300, 261, 300), q_lens=(700, 513, 130, 300), tail=400),
    "full, few keys": replace(LONG, kv_lens=(300, 500, 61, 40), q_lens=(300, 130, 61, 17)),
    "full of 64, few keys": replace(LONG, kv_lens=(300, 500, 61, 40), q_lens=(300, 130, 61, 17), head_dim=64),
    "not causal": replace(LONG, causal=False),
    "window of a tile": replace(LONG, size=128),
    "window of many tiles": replace(LONG, size=400),
    "window and leading keys": replace(LONG, size=200, global_tokens=70),
    "leading keys of each sequence": replace(LONG, size=150, global_tokens=(0, 300, 5, 64)),
    "window to both sides": replace(LONG, size=170, causal=False),
    "both sides and leading keys": replace(LONG, size=90, causal=False, global_tokens=200),
    "nothing but leading keys": replace(LONG, size=0, global_tokens=150),
    "soft cap, sink and LSE": replace(LONG, softcap=5.0, sink="fp32"),
    "positions given": replace(LONG, q_start=(0, 200, -60, 10), size=300),
    "fp16 of 64": replace(LONG, dtype=torch.float16, head_dim=64),
    "bf16 of 256": replace(LONG, head_dim=256, size=300),
    "192/128": replace(LONG, head_dim=192, v_head_dim=128),
    "192/128 under a window, packed heads": replace(
        LONG, head_dim=192, v_head_dim=128, group=8, size=128, sink="fp32", global_tokens=3
    ),
    "192/128, pages of 16 and holes": replace(PAGED, head_dim=192, v_head_dim=128, size=1100, holes=True),
    "192/128, int8 pages": replace(
        PAGED, head_dim=192, v_head_dim=128, quant=KVQuant(torch.int8, "channel"), bounds="tight"
    ),
    "192/128, soft cap, sink and LSE": replace(
        LONG, head_dim=192, v_head_dim=128, dtype=torch.float16, softcap=5.0, sink="fp32"
    ),
    "192/64": replace(LONG, head_dim=192, v_head_dim=64, causal=False),
    "256/128": replace(LONG, head_dim=256, v_head_dim=128),
    "256/128, a uniform batch": replace(
        PAGED, kv_lens=(300, 1300, 150), q_lens=150, head_dim=256, v_head_dim=128, page_size=48
    ),
    "256/64, window and leading keys": replace(LONG, head_dim=256, v_head_dim=64, size=200, global_tokens=70),
    "512": replace(LONG, head_dim=512),
    "512 under a window, packed heads": replace(WIDE, group=8, size=4100, sink="fp32", global_tokens=3),
    "512, pages of 16 and holes": replace(WIDE, dense=False, size=4200, holes=True, layout="apart"),
    "512, soft cap, sink and LSE": replace(LONG, head_dim=512, dtype=torch.float16, softcap=5.0, sink="fp32"),
    "512, a uniform batch": replace(PAGED, kv_lens=(300, 1300, 150), q_lens=150, head_dim=512, page_size=48),
    "512, strides of others": replace(PAGED, head_dim=512, strided=True, tail=20),
    "512/256": replace(LONG, head_dim=512, v_head_dim=256, causal=False),
    "512, window of two tiles, packed heads": replace(LONG, group=8, size=60, head_dim=512, sink="q"),
    "512, int8 pages": WIDE_INT8,
    "512, int8 pages, scales of tokens": replace(WIDE_INT8, quant=KVQuant(torch.int8), size=300, bounds="tight"),
    "512, e4m3 pages of 48": replace(WIDE_INT8, quant=KVQuant(E4M3, "head", "channel"), page_size=48, holes=True),
    "512/256, int8 pages": replace(WIDE_INT8, v_head_dim=256, global_tokens=70, size=200),
    "512, int8 products in 16 bits": replace(WIDE_INT8, compute="int8"),
    "128/64": replace(LONG, head_dim=128, v_head_dim=64, tail=30),
    "128/64 over pages of 8": replace(PAGED, head_dim=128, v_head_dim=64, page_size=8, size=333, layout="apart"),
    "packed heads": replace(ONCE, sink="q"),
    "one pass, few keys": replace(ONCE, kv_lens=(3, 15, 130, 40, 0), q_lens=(3, 15, 130, 17, 9)),
    "one pass, window of 5": replace(ONCE, size=5),
    "one pass, window of 1": replace(ONCE, size=1),
    "one pass, last key": replace(ONCE, size=129),
    "one pass, last key of one consumer": replace(ONCE, size=137, sink="q"),
    "one pass, one key too many": replace(ONCE, size=138),
    "one pass to both sides": replace(ONCE, size=65, causal=False),
    "one pass to both sides, one consumer": replace(ONCE, size=69, causal=False),
    "one pass, heads apart": replace(ONCE, group=3, size=17),
    "one pass, heads apart, one consumer": replace(ONCE, group=3, size=81),
    "one pass, soft cap, sink and LSE": replace(ONCE, softcap=5.0, sink="fp32", dtype=torch.float16),
    "one pass, positions given": replace(ONCE, q_start=(0, 200, -60, 10)),
    "one pass, padding rows": replace(ONCE, q_lens=(700, 0, 130, 1), tail=150),
    "one pass, a uniform batch": replace(ONCE, kv_lens=(300, 300, 150), q_lens=150, dense=False),
    "one pass, pages of 8": ONCE_PAGED,
    "one pass, pages of 8, one consumer": replace(ONCE_PAGED, size=130),
    "one pass, pages of 16": replace(ONCE_PAGED, page_size=16, size=114),
    "one pass, pages of 16, one consumer": replace(ONCE_PAGED, page_size=16, size=122),
    "one pass, pages of 48": replace(ONCE_PAGED, page_size=48, size=114, sink="fp32"),
    "one pass, pages to both sides": replace(ONCE_PAGED, size=60, causal=False),
    "one pass, holes": replace(ONCE_PAGED, holes=True),
    "one pass, int8 pages": replace(ONCE_PAGED, quant=KVQuant(torch.int8, "channel"), bounds="tight"),
    "few leading keys": replace(ONCE, size=100, global_tokens=4),
    "interleaved heads": replace(LONG, gqa="interleaved", size=128),
    "a group of three": replace(LONG, group=3),
    "pages of 16": PAGED,
    "pages of 16, window": replace(PAGED, size=200),
    "pages of 8": replace(PAGED, page_size=8, size=333),
    "pages of 48": replace(PAGED, page_size=48, size=333, global_tokens=33),
    "pages of 544": replace(PAGED, page_size=544),
    "flat table": replace(PAGED, table="flat", layout="nhd"),
    "holes": replace(PAGED, holes=True),
    "holes among few keys": replace(
        PAGED, kv_lens=(300, 700, 61, 40), q_lens=(300, 130, 61, 17), bounds="tight", holes=True
    ),
    "holes in a window": replace(PAGED, holes=True, size=300, global_tokens=20),
    "int8 pages": replace(PAGED, quant=KVQuant(torch.int8, "channel"), size=400, bounds="tight"),
    "padding rows": replace(PAGED, q_lens=(700, 0, 130, 1), tail=150),
    "fp8 queries": FP8,
    "fp8 queries, one scale, values by channel": replace(
        FP8, quant=KVQuant(E4M3, "tensor", "channel"), q_scale="tensor"
    ),
    "fp8 queries, no scale, window": replace(FP8, quant=KVQuant(E4M3), q_scale="none", size=200, page_size=48),
    "fp8 queries, values by token, leading keys": replace(
        FP8, quant=KVQuant(E4M3, "head", "token"), size=1300, global_tokens=70, holes=True
    ),
    "fp8 queries, soft cap, sink and LSE": replace(FP8, softcap=5.0, sink="fp32"),
    "fp8 queries of 64, sink, window": replace(FP8, head_dim=64, group=8, size=128, sink="fp32"),
    "fp8 queries of 256, interleaved": replace(FP8, head_dim=256, gqa="interleaved", table="flat"),
    "fp8 queries of 128/64, not causal": replace(FP8, v_head_dim=64, causal=False, tail=20),
    "fp8 queries, a uniform batch": replace(FP8, kv_lens=(300, 1300, 150), q_lens=150, strided=True),
    "fp8 queries, pages of 8": replace(FP8, page_size=8, layout="nhd", size=333),
    "fp8 queries, pages of 64, holes": replace(FP8, page_size=64, holes=True, table="flat", index_dtype=torch.int64),
    "fp8 queries, pages of 544, packed": replace(FP8, page_size=544, group=8, layout="packed", bounds="loose"),
    "fp8 queries, slots of tokens": replace(FP8, table="rows", unit="token", holes=True, global_tokens=33, size=200),
    "int8 products": INT8,
    "int8 products, pages of 64, slots of tokens": replace(INT8, page_size=64, table="rows", unit="token", holes=True),
    "int8 products, by head, fp16": replace(INT8, quant=KVQuant(torch.int8, "head"), dtype=torch.float16),
    "int8 products, by tensor, window": replace(INT8, quant=KVQuant(torch.int8, "tensor", "channel"), size=200),
    "int8 products, window of many tiles": replace(INT8, size=1300, page_size=48, group=2),
    "int8 products, window and leading keys": replace(INT8, size=200, global_tokens=70, page_size=48),
    "int8 products, soft cap, sink and LSE": replace(INT8, softcap=5.0, sink="fp32"),
    "int8 products, sink, window, 64": replace(INT8, head_dim=64, group=8, size=128, sink="q", page_size=8),
    "int8 products of 64": replace(INT8, head_dim=64),
    "int8 products of 256": replace(INT8, head_dim=256),
    "int8 products of 256, soft cap, window": replace(INT8, head_dim=256, softcap=5.0, size=300),
    "int8 products of 128/64, not causal": replace(INT8, v_head_dim=64, causal=False),
    "int8 products, holes, positions": replace(INT8, holes=True, q_start=(0, 200, -60, 10), gqa="interleaved"),
    "int8 products, a uniform batch": replace(INT8, kv_lens=(300, 1300, 150), q_lens=150, strided=True),
    "int8 products, padding rows": replace(INT8, q_lens=(700, 0, 130, 1), tail=150, table="flat", layout="nhd"),
    "fast, fp8 queries": FAST_FP8,
    "fast, fp8 queries, sink and LSE": replace(FAST_FP8, size=1100, sink="fp32", table="flat"),
    "fast, fp8 queries, leading keys, holes": replace(FAST_FP8, size=900, global_tokens=70, holes=True, page_size=128),
    "fast, fp8 queries, not causal, padding rows": replace(FAST_FP8, causal=False, tail=20),
    "fast, fp8 queries, soft cap": replace(FAST_FP8, softcap=5.0, quant=KVQuant(E4M3, "tensor", "channel")),
    "fast, fp8 queries, sums too long for e4m3": replace(FAST_FP8, size=None),
    "fast, fp8 queries of 256, whose values keep 16 bits": replace(FAST_FP8, head_dim=256),
    "fast, int8": FAST_INT8,
    "fast, int8, window of many tiles, positions": replace(FAST_INT8, size=1290, q_start=(0, 200, -60, 10)),
    "fast, int8, pages of 16": replace(FAST_INT8, page_size=16, holes=True),
    "fast, int8 of 256, sink and LSE": replace(FAST_INT8, head_dim=256, sink="fp32", dtype=torch.float16),
    "decode": DECODE,
    "decode, soft cap, sink and LSE": replace(DECODE, softcap=5.0, sink="fp32", dtype=torch.float16),
    "decode of 4 steps": replace(DECODE, q_lens=4),
    "decode of 4 steps in large groups, from a counter": replace(DECODE, q_lens=4, group=8, size=None),
    "decode of some steps": replace(DECODE, q_lens=tuple(i % 5 for i in range(33)), tail=3, bounds="tight"),
    "decode, leading keys and holes": replace(DECODE, size=960, global_tokens=40, holes=True),
    "decode of a large group, pages of 64": replace(DECODE, group=16, page_size=64),
    "decode, positions given": replace(DECODE, q_lens=2, q_start=tuple(1100 - 31 * i for i in range(33))),
}


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if target.target_of(torch.device("cuda")).arch != hopper.ARCH:
        pytest.skip(f"needs {hopper.ARCH}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_truth(case: Case) -> None:
    inputs = make(case, "cuda")
    canary = inputs.canary()
    out, lse = inputs.run("hopper", out=canary.out)
    inputs.check(out, lse)
    assert canary.broken() == 0


@pytest.mark.parametrize("q_scale", ["token", "tensor"])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1e-30])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scales_of_fp8_queries_of_any_sign(head_dim: int, sign: float, q_scale: str) -> None:
    """Queries, which are read where they lie, take up signs and zeros: of some rows of a tile, or of all."""
    inputs = make(replace(FP8, head_dim=head_dim, q_scale=q_scale, size=200, page_size=64, sink="fp32"), "cuda")
    given = inputs.q_scale
    assert given is not None
    some = torch.arange(given.numel(), device="cuda").view(given.shape) % 3 == 0
    signed = replace(inputs, q_scale=torch.where(some, given * sign, given))
    kept = signed.q.view(torch.uint8).clone()
    signed.check(*signed.run("hopper"))
    assert torch.equal(signed.q.view(torch.uint8), kept)


@pytest.mark.parametrize("size", [None, 1150])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_sums_of_values_with_a_mean(head_dim: int, size: int | None) -> None:
    """Where p and V multiply in e4m3, tensor cores cut each product to 13 bits of the sum so far: see ``E4M3_KEYS``."""
    case = replace(FAST_FP8, kv_lens=(8192, 1300), q_lens=(130, 513), head_dim=head_dim, size=size, spiked=False)
    inputs = make(case, "cuda")
    inputs.cache.v.copy_(1 + 0.5 * torch.randn(inputs.cache.v.shape, device="cuda"))
    inputs.check(*inputs.run("hopper"))


def test_a_query_scale_of_nan_is_its_row_s_alone() -> None:
    inputs = make(FP8, "cuda")
    clean, _ = inputs.run("hopper")
    given = inputs.q_scale
    assert given is not None
    given[5:300:7, 3] = torch.nan
    out, lse = inputs.run("hopper")
    bad = given.isnan()
    assert out[bad].isnan().all()
    assert lse[bad].isnan().all()
    rows = sum(FP8.row_counts)
    assert torch.equal(out[:rows][~bad[:rows]], clean[:rows][~bad[:rows]])


NEAR = replace(PAGED, head_dim=64, group=8, bounds="tight")
"""Rows that see few keys, as the caller promises: heads are packed, and programs small."""

BOUNDS = {
    "dense": LONG,
    "pages, leading keys and sinks": replace(PAGED, global_tokens=70, sink="q"),
    "256, soft cap": replace(LONG, head_dim=256, softcap=5.0),
    "64, leading keys of each sequence": replace(LONG, head_dim=64, global_tokens=(0, 300, 5, 64)),
    "promised, pages of 8": replace(NEAR, page_size=8),
    "holes": replace(PAGED, holes=True),
    "int8 pages": replace(PAGED, quant=KVQuant(torch.int8, "channel")),
    "padding rows, wide integers": replace(PAGED, q_lens=(700, 0, 130, 1), tail=150, index_dtype=torch.int64),
    "192/128": replace(LONG, head_dim=192, v_head_dim=128),
    "512": replace(LONG, head_dim=512, sink="q"),
    "512, int8 pages, leading keys": replace(WIDE_INT8, global_tokens=70),
    "int8 products of 256": replace(INT8, head_dim=256, global_tokens=5),
    "fast, int8": FAST_INT8,
    "fp8 queries": FP8,
}


@pytest.mark.parametrize("ranges", RULES)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_rows_against_the_truth(name: str, ranges: str) -> None:
    test_against_the_truth(replace(BOUNDS[name], ranges=ranges))


@pytest.mark.parametrize("ranges", ["window", "random"])
def test_bounds_give_the_same_bits_in_every_launch(ranges: str) -> None:
    inputs = make(replace(PAGED, ranges=ranges, global_tokens=5), "cuda")
    first, _ = inputs.run("hopper")
    for _ in range(50):
        assert torch.equal(inputs.run("hopper")[0], first)


BELOW_ZERO = {
    "128": replace(LONG, spiked=False),
    "128 in fp16, under a window": replace(LONG, spiked=False, dtype=torch.float16, size=300),
    "256, with a soft cap": replace(LONG, spiked=False, head_dim=256, softcap=60.0),
    "64 in one pass": replace(ONCE, spiked=False),
}


@pytest.mark.parametrize("sizes", [(0.02, 12.0), (12.0, 0.02), (3.0, 3.0)], ids=["falling", "rising", "even"])
@pytest.mark.parametrize("name", BELOW_ZERO)
def test_scores_below_zero(name: str, sizes: tuple[float, float]) -> None:
    """Bits of floats below 0 do not compare as integers. From the last key to the first the scores rise, or fall."""
    inputs = make(BELOW_ZERO[name], "cuda")
    k, _ = inputs.dense
    inputs.q.abs_()
    k.abs_().mul_(-torch.linspace(*sizes, k.shape[0], device=k.device, dtype=k.dtype)[:, None, None])
    inputs.check(*inputs.run("hopper"))


@pytest.mark.parametrize(
    "name",
    [
        "full",
        "full, heads in sections",
        "full, padding rows",
        "full, few keys",
        "packed heads",
        "one pass, few keys",
        "one pass, last key of one consumer",
        "one pass, pages of 8",
        "pages of 16, window",
        "holes",
        "padding rows",
        "512, int8 pages",
        "int8 products",
        "fast, fp8 queries, leading keys, holes",
        "fast, int8",
    ],
)
def test_no_tile_is_lost_or_done_otherwise(name: str) -> None:
    """Programs draw tiles from a counter: over 100 launches each row is written, and always with the same bits."""
    inputs = make(CASES[name], "cuda")
    first, _ = inputs.run("hopper")
    rows = sum(inputs.case.row_counts)
    for _ in range(100):
        out = torch.full_like(first, float("nan"))
        inputs.run("hopper", out=out)
        assert torch.equal(out[:rows], first[:rows])


@pytest.mark.parametrize("name", ["full", "packed heads"])
def test_an_output_that_no_box_fits(name: str) -> None:
    """Strides that are no multiple of 16 bytes: rows are stored by the threads, with the same bits."""
    inputs = make(CASES[name], "cuda")
    wanted, _ = inputs.run("hopper")
    out = wanted.new_empty(*wanted.shape[:-1], wanted.shape[-1] + 1)[..., :-1]
    inputs.run("hopper", out=out)
    rows = sum(inputs.case.row_counts)
    assert torch.equal(out[:rows], wanted[:rows])
