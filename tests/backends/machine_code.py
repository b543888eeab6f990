"""What compilers made wrong of right kernels on an H200 (docs/notes/reliability.md), looked for in their output."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

_WIDE = re.compile(r"(?:mul\.wide\.[us]32|shl\.b64)\b")
_DEFINITION = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s+(UR\d+)(?:, U?P\w+)*, (.*?) ;")
_PRODUCT = re.compile(r"GMMA\S*\s.*gdesc\[UR(\d+)\]")


def lost_lanes(ptx: str) -> list[str]:
    """Upper halves that are taken of two 32-bit values packed by ``or``, where the lower one may be wider.

    LLVM packs the lanes of <2 x i32> so. Shifts may leave a lane undefined that nothing reads (``shl nuw <31, 1>`` of a
    vectorised ``x & 31`` and ``y << 1``), and the LLVM of Triton 3.6 lets bits of it run into the other lane.
    """
    found = []
    for pair in re.findall(r"mov\.b64\s+\{_, %r\d+\}, (%rd\d+);", ptx):
        packed = re.search(rf"or\.b64\s+{pair}, (%rd\d+), (%rd\d+);", ptx)
        if packed is None:
            continue
        low, high = (re.search(rf"^\s*(\S+\s+{re.escape(r)}, .*);", ptx, re.MULTILINE) for r in packed.groups())
        if low and high and _WIDE.match(low[1]) and high[1].startswith("shl.b64"):
            found.append(f"{low[1]}; {high[1]}; {packed[0]}")
    return found


def stray_descriptors(sass: str) -> list[str]:
    """Products of a warp group that read shared memory where a reduction, or no instruction, says.

    Descriptors are followed back in the text to where their register was written. Where K and V lie at one address in
    two layouts, as for int8 products or V narrower than K, the ptxas of CUDA 12.8 lost the copy of it: products with V
    began where the register pointed before. The ptxas of CUDA 12.9 kept it.
    """
    lines = sass.splitlines()
    found = []
    for at, line in enumerate(lines):
        if product := _PRODUCT.search(line):
            origin = _origin(lines, at, int(product[1]) + 2)
            if origin.startswith(("REDUX", "nothing")):
                found.append(f"{line.strip()} of {origin}")
    return found


def _origin(lines: list[str], at: int, register: int) -> str:
    """The instruction that a uniform register comes from, through additions and copies."""
    for before, operation, written, operands in _definitions_before(lines, at):
        wide = ".64" in operation or ".WIDE" in operation
        if written == register or (wide and written == register - 1):
            sources = re.findall(r"\bUR(\d+)", operands)
            if operation.split(".")[0] in ("UIADD3", "UMOV", "ULOP3") and "0x3fff" not in operands and sources:
                return _origin(lines, before, int(sources[0]) + register - written)
            return f"{operation} {operands}"
    return "nothing"


def _definitions_before(lines: list[str], at: int) -> Iterator[tuple[int, str, int, str]]:
    for before in range(at - 1, -1, -1):
        if written := _DEFINITION.search(lines[before]):
            yield before, written[1], int(written[2][2:]), written[3]


def disassembled(cubin: bytes) -> str:
    """SASS, by the disassembler that comes with Triton: without the targets of jumps by tables, which nothing here
    reads and which take a quarter of its time."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def flaws(asm: dict[str, Any]) -> list[str]:
    """Both, of what Triton compiled for an NVIDIA target."""
    ptx = asm["ptx"]
    stray = stray_descriptors(disassembled(asm["cubin"])) if "wgmma.mma_async" in ptx else []
    return lost_lanes(ptx) + stray


def main() -> None:
    """Compile for an H200 the calls that were wrong on one; what is wrong with their kernels now, as JSON."""
    from compile_variants import stand_on
    from test_gpu import FOUND, FOUND_DRAWN

    from conftest import plan_for
    from swath.backends.triton.arguments import operands_of
    from swath.ops import explain
    from swath.target import Target
    from swath.testing import make
    from swath.testing.fuzz.twists import build

    calls = [make(case) for case in FOUND] + [build(call) for call in FOUND_DRAWN]
    stand_on("sm_90")
    found = []
    for call in calls:
        problem = explain.prepare(call.op, *call.args, **{**call.options, "return_lse": True})
        plan = plan_for("triton", problem, Target("sm_90", 132))
        operands = operands_of(problem) | plan.scratch.tensors("meta")
        with redirect_stdout(io.StringIO()):  # there Triton prints what ptxas says
            found += [flaws(kernel.compile(operands).asm) for kernel in plan.calls]
    print(json.dumps(found))
