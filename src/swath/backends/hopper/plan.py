"""From work to the launch of kernel.py, which takes q, k and v as boxes of the memory accelerator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from swath.backends.gluon.pipeline import BOX_BYTES, CONSUMER_ROWS
from swath.backends.hopper.heuristics import HopperHeuristics, draws_tiles, in_boxes
from swath.backends.hopper.kernel import hopper_tile_kernel
from swath.backends.triton.arguments import Operands, shared_args
from swath.backends.triton.heuristics.tiles import tile_slots
from swath.backends.triton.runtime import KernelCall, Scratch
from swath.backends.triton.work import Work

GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@dataclass(frozen=True, eq=False, slots=True)
class BoxedCall(KernelCall):
    """A launch that takes some operands as boxes of these rows, or rows and columns: q as ``q_desc``."""

    boxes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def boxed(self, parameter: str) -> str | None:
        """The operand that a parameter takes as boxes, if it does."""
        name = parameter.removesuffix("_desc")
        return self.sources.get(name, name) if name != parameter and name in self.boxes else None

    def arguments(self, operands: Operands) -> dict[str, Any]:
        """All arguments of the kernel by name."""
        boxed = {f"{name}_desc": self._box(name, box, operands) for name, box in self.boxes.items()}
        return KernelCall.arguments(self, operands) | boxed

    def _box(self, name: str, box: tuple[int, ...], operands: Operands) -> TensorDescriptor | None:
        x = operands[self.sources.get(name, name)]
        if x is None:
            return None
        x = in_four_dimensions(name, x)
        shape = [*box] if len(box) == 4 else [*box, min(x.shape[-1], BOX_BYTES.value // x.element_size())]
        layout = gl.NVMMASharedLayout.get_default_for(shape, GLUON_DTYPES[x.dtype])
        return TensorDescriptor.from_tensor(x, shape, layout)


def in_four_dimensions(name: str, x: Tensor) -> Tensor:
    """q or out [B, S, Hq, D], a ragged batch as one sequence; k or v [pages, Hkv, page_size, D], dense as one page."""
    if x.dim() == 4:
        return x
    return x[None] if name in ("q", "out") else x.transpose(0, 1)[None]


def hopper_tiles(work: Work, scratch: Scratch, heuristics: HopperHeuristics) -> BoxedCall:
    """Tiles for the sequences that no other launch claims."""
    problem, F = work.problem, work.features
    launch = heuristics.hopper_launch(work)
    rows = CONSUMER_ROWS.value
    steps, slots = tile_slots(problem, launch.consumers * rows // launch.pack)
    num_tiles = slots * (F.kv_heads * F.group // launch.pack)
    args = shared_args(work, F) | {"steps": steps, "num_tiles": num_tiles, "LAUNCH": launch}
    if draws_tiles(problem):
        scratch.add("counter", torch.int32, 1, zeroed=True)
    else:
        args["counter"] = None
    sources = work.sources
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
    return BoxedCall(hopper_tile_kernel, programs, args, options, sources, boxes=boxes)
