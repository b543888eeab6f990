"""The kernel in Gluon without a GPU: its PTX, run by ``ptx_machine.py``, against float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from own_process import printed
from ptx_launch import CASES
from ptx_machine import Machine
from ptx_program import parse

PARTS = 4
"""Of the cases, so that test processes end together."""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_is_right(part: int) -> None:
    """In a process of its own kind, because Triton keeps one active driver."""
    names = [*CASES][part::PARTS]
    out = printed("ptx_launch", "main", *names)
    said = {name: share for line in out.splitlines() for name, share in json.loads(line).items()}
    assert list(said) == names
    assert all(isinstance(share, float) and share <= 1 for share in said.values()), said


KERNEL = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.reqntid 64
{{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
{body}
	ret;
}}
// -- End function
"""
LOOP = """
	setp.lt.s32 	%p1, %r1, 40;
	@%p1 bra 	$small;
	add.s32 	%r1, %r1, 100;
$small:
	{ .reg .pred big; setp.gt.s32 big, %r1, 150; @big bra done; add.s32 %r1, %r1, 1000; done: }
	redux.sync.max.s32 	%r2, %r1, 0xffffffff;
	st.global.v2.b32 	[ %rd3 + 0 ], { %r1, %r2 };
"""


def run(body: str, out: torch.Tensor) -> None:
    program = parse(KERNEL.format(body=body))
    Machine(program, [out.data_ptr()], {}, [out]).run(1)


def test_lanes_that_part_meet_again() -> None:
    """Lanes 8 to 31 of the second warp take the longer way; the maximum is that of all lanes."""
    out = torch.zeros(65, dtype=torch.int32)
    run(LOOP, out)
    lane = np.arange(64)
    want = np.where(lane < 40, lane, lane + 100)
    want = np.where(want > 150, want, want + 1000)
    assert out[[0, 31, 32, 39, 40, 63]].tolist() == want[[0, 31, 32, 39, 40, 63]].tolist()
    assert out[64] == want[32:].max()


def test_an_address_outside_all_tensors_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="are no tensor's"):
        run(LOOP, torch.zeros(64, dtype=torch.int32))


WAITS = {
    "a barrier that one warp passes by": "setp.lt.s32 %p1, %r1, 32;\n\t@%p1 bra $end;\n\tbar.sync 1, 64;\n$end:",
    "a barrier of too few threads": "bar.arrive 1, 32;\n\tbar.sync 2, 96;",
    "half a warp": "setp.lt.s32 %p1, %r1, 16;\n\t@%p1 bra $end;\n\tbar.sync 1, 64;\n\tret;\n$end:\n\tbar.sync 1, 64;",
}


@pytest.mark.parametrize("what", WAITS)
def test_a_deadlock_is_an_error(what: str) -> None:
    with pytest.raises(RuntimeError, match=r"deadlock|wait for one another"):
        run(WAITS[what], torch.zeros(65, dtype=torch.int32))
