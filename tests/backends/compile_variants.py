"""Kernel variants as option values, and a program that compiles them for one target and prints results as JSON."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from compile_rows import FAST, HALVES, HEADS, OPTIONS, OWN, SEEN, named
from machine_code import flaws

from conftest import plan_for
from swath import KVQuant, PagedKV, PageTable, Window
from swath.backends.hopper import attention as hopper
from swath.backends.triton.heuristics.dequantise import SCRATCH_BYTES
from swath.ops import attention as attention_call
from swath.ops import paged as paged_call
from swath.problem import Problem
from swath.target import Target
from swath.testing import pairwise

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

PAIRED_TARGET = "sm_90"
"""Rows of every two values are read by Triton for it; compiled is on each target each value that a kernel meets."""
HOPPER_TILES = "hopper_tile_kernel"
SHARED = ("split_kernel", "reduce_kernel", "tile_kernel")
"""Kernels that calls of the paired target's own tiles have beside these, and that other rows have too."""


class Variant(NamedTuple):
    """A launch of a kernel compiled as for none of the launches before it; ``number`` is that of its row."""

    number: int
    row: dict[str, str]
    call: Any
    operands: Any

    @property
    def values(self) -> set[tuple[str, str, str]]:
        """(kernel, option, value); dense calls have no cache, whatever their row says of one."""
        cache = ("storage", "paging") if self.row["queries"] == "dense" else ()
        return {(self.kernel, *item) for item in self.row.items() if item[0] not in cache}

    @property
    def compiled_for(self) -> set[tuple[str, ...]]:
        """What some variant of the suite has: the values, of Hopper's tiles each beside every head_dim, by which their
        launches, layouts and registers go."""
        beside = {(self.row["head_dim"], *value) for value in self.values}
        return self.values | (beside if self.kernel == HOPPER_TILES else set())

    @property
    def kernel(self) -> str:
        """Its name."""
        name: str = self.call.kernel.fn.__name__
        return name


def suite_variants(arch: str) -> list[Variant]:
    """The variants that the suite compiles for a target; each target begins elsewhere, so that other values meet."""
    found = paired_variants(arch)
    own = named(OWN)
    always = [v for v in found if v.row in (own if v.kernel == HOPPER_TILES else named(SEEN))]
    first = len(found) * TARGETS.index(arch) // len(TARGETS)
    return covering(found[first:] + found[:first], always)


@cache
def paired_variants(arch: str) -> list[Variant]:
    """The variants that rows need in which every two values meet; on the paired target those of its own rows too."""
    rows = pairwise(OPTIONS) + named(HEADS + SEEN)
    if arch != PAIRED_TARGET:
        return list(variants(arch, rows))
    own = [variant for variant in variants(arch, named(FAST + HALVES)) if variant.kernel not in SHARED]
    whole = [row for row in OWN if row not in FAST + HALVES]
    return [*variants(arch, rows + named(whole)), *own]


def all_variants(arch: str) -> Iterator[Variant]:
    """The variants of every combination of values."""
    return variants(arch, (dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())))


def unread_variants(arch: str) -> list[Variant]:
    """The paired variants that the suite does not compile."""
    chosen = {id(variant) for variant in suite_variants(arch)}
    return [variant for variant in paired_variants(arch) if id(variant) not in chosen]


def covering(found: list[Variant], always: Iterable[Variant]) -> list[Variant]:
    """``always`` and some more of them, which meet all that any does: greedily, the most new ones first."""
    met = [variant.compiled_for for variant in found]
    chosen = list(always)
    missing = set().union(*met).difference(*(variant.compiled_for for variant in chosen))
    while missing:
        best = max(range(len(found)), key=lambda i: len(met[i] & missing))
        missing -= met[best]
        chosen.append(found[best])
    return chosen


def variants(arch: str, rows: Iterable[dict[str, str]]) -> Iterator[Variant]:
    """The launches that the rows need on a target, each variant of a kernel once."""
    from swath.backends.triton.arguments import operands_of

    seen = set()
    for number, row in enumerate(rows):
        problem = problem_of(row)
        for tiles in tiles_of(problem, arch):
            plan = plan_for(tiles, problem, Target(arch, num_sms=132))
            operands = operands_of(problem) | plan.scratch.tensors("meta")
            for call in plan.calls:
                # What Triton compiles for: options, constants, and which tensors there are, of which types.
                arguments = call.arguments(operands).items()
                compiled_for = (x if p.isupper() else getattr(x, "dtype", x is None) for p, x in arguments)
                key = (call.kernel.fn.__name__, *call.options.items(), *compiled_for)
                if key not in seen:
                    seen.add(key)
                    yield Variant(number, row, call, operands)


WINDOWS = {
    "none": Window(),
    "size": Window(1024),
    "size 128": Window(128),
    "size 512": Window(512),
    "size+count": Window(1024, global_tokens=4),
    "size+tensor": Window(1024, torch.zeros(2, dtype=torch.int32), max_global_tokens=64),
    "both sides": Window(60, causal=False),
    "wide window": Window(5000, global_tokens=4),
    "bounds": Window(),
    "bounds+count": Window(global_tokens=4),
    "bounds nearby": Window(),
}
"""Bounds are made for the queries."""


def problem_of(row: dict[str, str]) -> Problem:
    """A call that needs the variant; its tensors are never read."""
    dims = tuple(map(int, row["head_dim"].split("/")))
    head_dim, v_head_dim, num_seqs, kv_heads, capacity = dims[0], dims[-1], 2, 2, 8192
    queries, _, group_said = row["queries"].partition(" of ")
    if queries == "full decode":
        num_seqs, queries = 132, "decode"
    group = int(group_said or 8)
    storage, _, granularity = row["storage"].partition(" ")
    dtypes = {"fp16": torch.float16, "fp32": torch.float32, "queries": torch.float8_e4m3fn}
    dtype = dtypes.get(storage, torch.bfloat16)
    lse = row["scoring"] == "sink+lse"
    options: dict[str, Any] = {
        "window": WINDOWS[row["window"]],
        "softcap": 30.0 if row["scoring"] == "softcap" else 0.0,
        "sink": torch.empty(group * kv_heads) if lse else None,
        "gqa": "interleaved" if row["scoring"] == "interleaved" else "grouped",
        "return_lse": lse,
    }
    ints = torch.int64 if row["paging"].startswith("wide") else torch.int32
    tokens, cu = 512, torch.zeros(num_seqs + 1, dtype=ints)
    if queries == "dense":
        q, k = (torch.empty(tokens, h, head_dim, dtype=dtype) for h in (group * kv_heads, kv_heads))
        v = torch.empty(tokens, kv_heads, v_head_dim, dtype=dtype)
        options["window"] = with_bounds(options["window"], row, q, ints)
        return attention_call.prepare(q, k, v, cu, cu, **options)
    page_size = int(row["paging"].split()[-1]) if row["paging"] != "split 256" else 16
    if queries == "long ragged":  # 8-bit keys of which the scratch holds one sequence, dequantised
        capacity = options["max_kv_len"] = (3 * SCRATCH_BYTES // 4) // (kv_heads * (head_dim + v_head_dim) * 2)
    table: Any = torch.zeros(num_seqs, -(-capacity // page_size), dtype=ints)
    if row["paging"].startswith("flat"):
        table = (table.reshape(-1), cu)
    if row["paging"].startswith("tokens"):
        rows = torch.zeros(num_seqs, dtype=ints)
        table = PageTable(torch.zeros(8, capacity, dtype=ints), rows=rows, unit="token")
    if row["paging"] == "split 256":
        options["split_size"] = 256
    if granularity == "compute":
        granularity, options["compute"] = "channel", "int8"
    if granularity == "fast":
        granularity, options["compute"] = "channel" if storage == "int8" else "head", "fast"
    cache = _cache(storage, granularity, (kv_heads, page_size, head_dim, v_head_dim), dtype)
    if row["paging"].startswith("apart"):
        cache = PagedKV(cache.k, cache.v.transpose(1, 2).contiguous().transpose(1, 2), cache.k_scale, cache.v_scale)
    uniform = {"decode": (num_seqs,), "steps": (num_seqs, 4), "many steps": (num_seqs, 20)}
    q = torch.empty(*uniform.get(queries, (tokens,)), group * kv_heads, head_dim, dtype=dtype)
    if storage == "queries":
        options["q_scale"] = torch.empty(q.shape[:-1])
    if queries not in uniform:
        options["cu_seqlens_q"] = cu
    options["window"] = with_bounds(options["window"], row, q, ints)
    return paged_call.prepare(q, cache, table, torch.zeros(num_seqs, dtype=ints), **options)


def with_bounds(window: Window, row: dict[str, str], q: torch.Tensor, ints: torch.dtype) -> Window:
    """The window with bounds for the rows of q, if the row asks for them."""
    if not row["window"].startswith("bounds"):
        return window
    most = 128 if row["window"] == "bounds nearby" else None
    return replace(window, bounds=torch.zeros(*q.shape[:-2], 2, dtype=ints), max_visible=most)


def _cache(storage: str, granularity: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> PagedKV:
    """A cache of this many heads, slots of a page, and elements of K's and V's rows."""
    heads, page_size, head_dim, v_head_dim = shape
    stored = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(storage, dtype)
    shapes: dict[str, tuple[int, ...]] = {"head": (heads,), "tensor": ()}
    k_scale, v_scale = (
        torch.ones(shape) if shape is not None else None
        for shape in ((shapes | {"channel": (heads, dim)}).get(granularity) for dim in (head_dim, v_head_dim))
    )
    quant = KVQuant(stored, granularity or "none")
    return PagedKV.empty(quant, 2, heads, page_size, head_dim, v_head_dim=v_head_dim, k_scale=k_scale, v_scale=v_scale)


def tiles_of(problem: Problem, arch: str) -> tuple[str, ...]:
    """Whose prefill tiles the target has for a call."""
    return ("triton", "hopper") if arch == hopper.ARCH and hopper.why_not_tiles(problem, 132) is None else ("triton",)


WHICH: dict[str, Callable[[str], Iterable[Variant]]] = {
    "suite": suite_variants,
    "unread": unread_variants,
    "pairs": paired_variants,
    "all": all_variants,
}
"""What is compiled by the option ``--variants`` of the tests; of "unread" ones no code is made."""


def main() -> None:
    """Compile variants for a target, every ``parts``-th from ``part`` on; one JSON line a kernel."""
    arch, which, part, parts = sys.argv[1:]
    stand_on(arch)
    if which == "unread":
        make_no_code()
    for number, variant in enumerate(WHICH[which](arch)):
        if number % int(parts) == int(part):
            result = {"row": variant.row, "kernel": variant.kernel} | _compiled(variant, arch)
            print(json.dumps(result), flush=True)


class Read(Exception):  # noqa: N818 -- nothing went wrong
    """Raised where Triton has read a kernel: its language and its types are right."""


def make_no_code() -> None:
    """Let the compiler for NVIDIA targets end with ``Read`` before it makes code, which takes most of its time."""
    from triton.backends.nvidia.compiler import CUDABackend

    def stop(*_: Any) -> None:
        raise Read

    CUDABackend.make_ttgir = CUDABackend.gluon_to_ttgir = stop


def stand_on(arch: str) -> None:
    """Let Triton compile for a target that need not be here, and ptxas report on every kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(StandIn(target))
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what comes from Triton's cache has no report
    triton.knobs.compilation.disable_line_info = True  # a sixteenth of the time, for lines that nobody reads here


def _compiled(variant: Variant, arch: str) -> dict[str, Any]:
    try:
        with redirect_stdout(io.StringIO()) as said:  # there Triton prints what ptxas says
            kernel = variant.call.compile(variant.operands)
    except Read:
        return {}
    except Exception as error:  # noqa: BLE001 -- whatever the compiler says is the result
        return {"error": f"{type(error).__name__}: {str(error)[-500:]}"}
    barriers = re.findall(r"\bbar(?:rier)?\.\w+\s+(\d+)", kernel.asm.get("ptx", ""))
    return {
        "shared": kernel.metadata.shared,
        "spills": _amd_spills(kernel) if arch.startswith("gfx") else _spills(said.getvalue()),
        "barriers": sorted({int(number) for number in barriers}),  # that Triton chose: ours are in registers
        "flaws": flaws(kernel.asm) if "ptx" in kernel.asm else [],
        "serialised": "wgmma.mma_async instructions are serialized" in said.getvalue(),
    }


def _spills(report: str) -> int:
    """Spilled bytes a thread, by the report of ptxas."""
    if "Used" not in report:
        raise RuntimeError(f"ptxas reported no registers: {report!r}")
    found = re.search(r"(\d+) bytes spill stores", report)
    return int(found[1]) if found else 0


def _amd_spills(kernel: Any) -> int:
    """The same by AMD's metadata, which counts registers of 4 bytes."""
    found = re.search(r"vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
    return 4 * int(found[1]) if found else 0


class StandIn:
    """Stands for a GPU that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


if __name__ == "__main__":
    main()
