"""Cases of ``swath.testing`` through the kernel in Gluon, compiled for an H200 and run by ``ptx_machine.py``.

PYTHONPATH=src:tests:tests/backends python tests/backends/ptx_launch.py NAME...    cases by name, all by default
"""

from __future__ import annotations

import io
import json
import struct
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from compile_variants import stand_on
from ptx_machine import Machine
from ptx_program import parse

from conftest import plan_for
from swath import KVQuant
from swath.backends.triton.arguments import operands_of
from swath.ops import explain
from swath.target import Target
from swath.testing import Case, make

PROGRAMS = 2
"""That take the work tiles of a case in turn."""

E4M3 = torch.float8_e4m3fn
SMALL: dict[str, Any] = dict(num_kv_heads=1, group=1, head_dim=128, spiked=True)
FP8_Q: dict[str, Any] = SMALL | dict(group=8, dtype=E4M3)
BY_HEAD: dict[str, Any] = FP8_Q | dict(
    quant=KVQuant(E4M3, "head", "channel"), q_scale="token", global_tokens=(0, 7), size=60
)
FAST: dict[str, Any] = dict(page_size=64, compute="fast")
# A sequence without queries is there for its length: many keys call for two consumers, which few tiles of them show.
CASES = {
    "window": Case((150, 90), (40, 70), dense=True, size=30, **SMALL),
    "full, two consumers": Case((430, 1300), (140, 0), dense=True, **SMALL),
    "one pass": Case((200, 60), (40, 60), dense=True, size=100, **SMALL | {"head_dim": 64, "group": 8}, sink="q"),
    "bounds apart, leading keys": Case((150, 90), (40, 70), ranges="random", global_tokens=(0, 7), **SMALL),
    "bounds, chunks and pages of 8": Case((150, 90), (90, 20), ranges="chunked", page_size=8, **SMALL | {"group": 2}),
    "decode, tiles in turn": Case((150, 0, 90), 1, **SMALL | {"group": 8}, size=100, sink="q"),
    "512/256": Case((150, 90), (40, 70), dense=True, size=30, **SMALL | {"head_dim": 512}, v_head_dim=256),
    "512, two halves": Case((90,), (70,), dense=True, size=30, **SMALL | {"head_dim": 512}, sink="q"),
    "512, two halves of int8": Case(
        (64,), (64,), **SMALL | {"num_kv_heads": 2, "group": 8, "head_dim": 512}, quant=KVQuant(torch.int8, "channel")
    ),
    "bounds, heads in sections": Case(
        (9000,), (70,), dense=True, ranges="late", bounds="none", **SMALL | {"num_kv_heads": 2}
    ),
    "192/128": Case((150, 90), (40, 70), dense=True, size=30, **SMALL | {"head_dim": 192}, v_head_dim=128),
    "fp8 queries": Case((150, 90), (40, 34), **BY_HEAD),
    "fp8 queries, scales of any sign": Case((90,), (70,), **FP8_Q, quant=KVQuant(E4M3, "head"), q_scale="token"),
    "fp8 queries of 256, a scale below 0": Case(
        (90, 70), 64, **FP8_Q | {"head_dim": 256}, quant=KVQuant(E4M3), q_scale="tensor", sink="q", strided=True
    ),
    "fp8 queries, pages of 64 by a flat table": Case(
        (150, 90), (40, 34), **BY_HEAD | {"page_size": 64, "table": "flat", "holes": True, "index_dtype": torch.int64}
    ),
    "int8 products, slots of tokens": Case(
        (1300,), (64,), **SMALL | {"group": 8}, quant=KVQuant(torch.int8, "head", "channel"), compute="int8",
        size=1260, table="rows", unit="token", holes=True, layout="nhd", bounds="loose",
    ),
    "int8 products": Case(
        (1300,), (64,), q_start=(300,), **SMALL | {"group": 8}, quant=KVQuant(torch.int8, "channel"), compute="int8"
    ),
    "fast, fp8 queries": Case((330, 90), (64, 34), **BY_HEAD | FAST, holes=True),
    "fast, many tiles": Case(
        (430, 1150), (140, 0), **FP8_Q | FAST | {"group": 5}, quant=KVQuant(E4M3, "tensor"), q_scale="tensor",
        size=1150, softcap=20.0, sink="fp32",
    ),
    "hostile bounds": Case((90,), (70,), ranges="hostile", softcap=5.0, tail=300, **SMALL | {"head_dim": 64}),
}  # fmt: skip
SIGNED = [name for name in CASES if "any sign" in name or "below 0" in name]
"""Cases whose queries have scales below 0, or for some rows 0."""


def launch(call: Any, operands: Any, programs: int) -> None:
    """Run a launch of the kernel on tensors in host memory."""
    from swath.backends.hopper.kernel import RUN_TIME

    with redirect_stdout(io.StringIO()):
        ptx = call.compile(operands).asm["ptx"]
    params, descriptors, tensors = [], {}, []
    arguments = call.arguments(operands)
    for name in call.kernel.arg_names:
        x = arguments[name]
        if name.isupper() or x is None or (isinstance(x, int) and x == 1 and name not in RUN_TIME):
            continue  # Triton compiles for the value
        if isinstance(x, torch.Tensor):
            tensors.append(x)
            params.append(x.data_ptr())
        elif isinstance(x, float):
            params += struct.unpack("<I", struct.pack("<f", x))
        elif isinstance(x, int):
            params.append(x)
        else:  # a descriptor, with its shape and strides
            descriptors[len(params)] = x
            params += [0] * (1 + 2 * len(x.shape))
    program = parse(ptx)
    params += [0] * 2  # scratch of Triton's
    if len(params) != program.num_params:
        raise RuntimeError(f"{program.num_params} parameters, of which {len(params)} are known")
    Machine(program, params, descriptors, tensors).run(programs)


def share_of_budget(case: Case, signed: bool = False) -> float:
    """Of the worst element of a call whose tiles the kernel computes: at most 1. ``signed``: as in ``SIGNED``.

    Raises:
        AssertionError: it is more.
        RuntimeError: the program does what a GPU would not survive.
    """
    inputs = make(case)
    if signed and inputs.q_scale is not None:
        signs = torch.arange(inputs.q_scale.numel()).view(inputs.q_scale.shape) % 3 - 1.0
        inputs = replace(inputs, q_scale=inputs.q_scale * signs)
    problem = explain.prepare(inputs.op, *inputs.args, **{**inputs.options, "return_lse": True})
    plan = plan_for("hopper", problem, Target("sm_90", num_sms=132))
    operands = operands_of(problem) | plan.scratch.tensors("cpu")
    problem.out.fill_(torch.nan)
    if case.quant is not None:
        copy(problem, operands)
    for name, x in operands.items():
        if name.startswith("counter"):
            x.zero_()
    for call in plan.calls:
        if call.kernel.fn.__name__ == "hopper_tile_kernel":
            launch(call, operands, PROGRAMS)
    return inputs.check(problem.out, problem.lse)


def copy(problem: Any, operands: Any) -> None:
    """What the launches before the tiles do: V's stored values, K with its channel scales, or, for products in 8 bits,
    as it is, if it is copied then, and int8 rows of q with all scales."""
    cache, table = problem.keys.cache, problem.keys.table
    each = operands["new_v"].shape[0] // problem.num_seqs
    operands["new_table"].copy_(torch.arange(each) + each * torch.arange(problem.num_seqs)[:, None])
    for b in range(problem.num_seqs):
        pages = torch.full((each,), -1)
        own = table.row(b, cache.page_size)[:each].long()
        pages[: len(own)] = own
        live = (pages >= 0) & (pages < cache.num_pages)
        operands["new_table"][b, :each].masked_fill_(~live, -1)
        for name, x in (("new_k", cache.k), ("new_v", cache.v)):
            if name not in operands:
                continue
            rows = operands[name][b * each : (b + 1) * each]
            rows.view(torch.uint8).fill_(0x7F)  # NaN, where nothing is copied
            stored = x[pages[live]].float()
            if name == "new_k" and rows.dtype.itemsize > 1:
                stored *= cache.k_scale[:, None]
            stored = stored.to(rows.dtype)
            rows[live] = side_by_side(stored) if name == "new_v" and rows.dtype.itemsize == 1 else stored
    if "new_q" not in operands:
        return
    scale = torch.ones(()) if cache.k_scale is None else cache.k_scale.float()
    scale = scale.expand(cache.num_kv_heads) if scale.dim() == 0 else scale
    scale = scale.repeat_interleave(problem.group, 0)  # [Hq] or [Hq, D]
    x = problem.q.float() * (scale if scale.dim() == 2 else scale[:, None])
    step = x.abs().amax(-1, keepdim=True) / 127
    operands["new_q"].copy_((x / step).round())
    operands["new_q_scale"].copy_(step[..., 0] * problem.score_unit)


def side_by_side(v: torch.Tensor) -> torch.Tensor:
    """Values [pages, Hkv, page_size, Dv] as [pages, Hkv, Dv, page_size], the keys of each 16 in wgmma's order."""
    order = [8 * b + 2 * q + e for q in range(4) for b in range(2) for e in range(2)]
    return v.view(torch.uint8).unflatten(2, (-1, 16))[:, :, :, order].flatten(2, 3).mT.view(v.dtype)


def main() -> None:
    """A line of JSON a case; ptxas does not run."""
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda *_: b""
    stand_on("sm_90")
    for name in sys.argv[1:] or CASES:
        try:
            said: Any = share_of_budget(CASES[name], name in SIGNED)
        except (AssertionError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps({name: said}), flush=True)


if __name__ == "__main__":
    main()
