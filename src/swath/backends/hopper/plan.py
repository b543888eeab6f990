"""From work to the launch of kernel.py, which takes q, k and v as boxes of the memory accelerator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from swath.backends.gluon.pipeline import BOX_BYTES, CONSUMER_ROWS
from swath.backends.hopper.heuristics import MOST_V_COLUMNS, HopperHeuristics, draws_tiles, in_boxes
from swath.backends.hopper.kernel import hopper_tile_kernel
from swath.backends.triton.arguments import Operands, shared_args
from swath.backends.triton.features import Features
from swath.backends.triton.heuristics.dequantise import table_pages
from swath.backends.triton.heuristics.tiles import tile_slots
from swath.backends.triton.runtime import KernelCall, Scratch
from swath.backends.triton.work import Work
from swath.cache import PagedKeys

GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@dataclass(frozen=True, eq=False, slots=True)
class BoxedCall(KernelCall):
    """A launch that takes some operands as boxes of these rows, or rows and columns: q as ``q_desc``.

    first: the first column that it takes of what is ``cut``: V, out, and a scale of V that has columns.
    """

    boxes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first: int = 0
    cut: tuple[str, ...] = ()

    def boxed(self, parameter: str) -> str | None:
        """The operand that a parameter takes as boxes, if it does."""
        name = parameter.removesuffix("_desc")
        return self.sources.get(name, name) if name != parameter and name in self.boxes else None

    def arguments(self, operands: Operands) -> dict[str, Any]:
        """All arguments of the kernel by name."""
        given = KernelCall.arguments(self, operands)
        given |= {name: given[name][..., self.first :] for name in self.cut if name in given}
        return given | {f"{name}_desc": self._box(name, box, operands) for name, box in self.boxes.items()}

    def offset(self, parameter: str, operands: Operands) -> int:
        """Bytes of a parameter's operand that the launch passes over at its beginning."""
        name = parameter.removesuffix("_desc")
        x = operands.get(self.sources.get(name, name)) if name in self.cut else None
        return 0 if x is None else self.first * x.element_size()

    def _box(self, name: str, box: tuple[int, ...], operands: Operands) -> TensorDescriptor | None:
        x = operands[self.sources.get(name, name)]
        if x is None:
            return None
        x = in_four_dimensions(name, x[..., self.first :] if name in self.cut else x)
        shape = [*box] if len(box) == 4 else [*box, min(x.shape[-1], BOX_BYTES.value // x.element_size())]
        layout = gl.NVMMASharedLayout.get_default_for(shape, GLUON_DTYPES[x.dtype])
        return TensorDescriptor.from_tensor(x, shape, layout)


def in_four_dimensions(name: str, x: Tensor) -> Tensor:
    """q or out [B, S, Hq, D], a ragged batch as one sequence; k or v [pages, Hkv, page_size, D], dense as one page."""
    if x.dim() == 4:
        return x
    return x[None] if name in ("q", "out") else x.transpose(0, 1)[None]


def hopper_tiles(work: Work, scratch: Scratch, heuristics: HopperHeuristics) -> list[BoxedCall]:
    """Tiles for the sequences that no other launch claims: one launch, or one for each half of wider values.

    The halves take the same scores: there are 1.5 times the products, and an accumulator that registers hold.
    """
    F = work.features
    if F.v_head_dim <= MOST_V_COLUMNS:
        return [launch_of(work, F, 0, scratch, heuristics)]
    half = replace(F, v_head_dim=F.v_head_dim // 2, v_parts=2)
    return [launch_of(work, half, first, scratch, heuristics) for first in (0, half.v_head_dim)]


def launch_of(work: Work, F: Features, first: int, scratch: Scratch, heuristics: HopperHeuristics) -> BoxedCall:
    """The launch for the columns of V and out from ``first`` on that ``F`` has."""
    problem = work.problem
    launch = heuristics.hopper_launch(work)
    rows = CONSUMER_ROWS.value
    steps, slots = tile_slots(problem, launch.consumers * rows // launch.pack)
    num_tiles = slots * (F.kv_heads * F.group // launch.pack)
    args = shared_args(work, F) | {"steps": steps, "num_tiles": num_tiles, "LAUNCH": launch}
    if "v_table" in work.sources:
        args["v_table_width"] = table_pages(problem, cast(PagedKeys, problem.keys))
    sources = work.sources | {"counter": f"counter_{first}"}
    if draws_tiles(problem):
        scratch.add(f"counter_{first}", torch.int32, 1, zeroed=True)
    else:
        args["counter"] = None
    boxes: dict[str, tuple[int, ...]] = {"q": (1, rows // launch.pack, launch.pack)}
    if launch.q_stages > 1 and in_boxes(problem.out):
        boxes["out"] = boxes["q"]
    else:
        args["out_desc"] = None
    boxes |= dict.fromkeys("kv", (1, 1, launch.box_rows))
    if F.v_e4m3:
        boxes["v"] = (1, 1, F.v_head_dim, launch.box_rows)
    if launch.narrow_n:
        boxes |= dict.fromkeys(("narrow_k", "narrow_v"), (1, 1, launch.narrow_rows))
        sources = {"narrow_k": sources.get("k", "k"), "narrow_v": sources.get("v", "v")} | sources
    programs = min(num_tiles, launch.programs * work.target.num_sms)
    options = {"num_warps": 4} | ({"maxnreg": launch.registers} if launch.registers else {})
    cut = ("v", "out", *(["v_scale"] if F.v_fold == "channel" else [])) if F.v_parts > 1 else ()
    return BoxedCall(hopper_tile_kernel, programs, args, options, sources, boxes=boxes, first=first, cut=cut)
