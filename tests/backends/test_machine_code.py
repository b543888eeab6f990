"""What is looked for in compiled kernels is found where it was: in lines of the kernels that were wrong on an H200."""

from __future__ import annotations

import json

import pytest
from machine_code import lost_lanes, stray_descriptors
from own_process import printed

PACKED = """
	mul.wide.u32 	%rd63, %r3, 2147483648;
	cvt.u64.u32 	%rd64, %r16;
	shl.b64 	%rd65, %rd64, 33;
	or.b64 	%rd66, %rd63, %rd65;
	mov.b64 	{_, %r18}, %rd66;
"""

SASS = """
        /*4720*/                   REDUX.MAX.S32 UR42, R74 ;
        /*210a0*/                  USHF.R.U32.HI UR50, URZ, 0x4, UR21 ;
        /*210f0*/                  UIADD3 UR42, UP0, UR42, 0x2, URZ ;
        /*21110*/                  USGXT.U32 UR50, UR50, 0xe ;
        /*212e0*/                  UIADD3 UR46, UP1, UR42, 0x1fe, URZ ;
        /*2c530*/                  IGMMA.64x128x32.S8.S8 R88, R152, gdesc[UR48], RZ, !UPT ;
        /*2c540*/                  IGMMA.64x128x32.S8.S8 R88, R156, gdesc[UR40], R88 ;
        /*2c550*/                  IGMMA.64x128x32.S8.S8 R24, R152, gdesc[UR44], RZ, !UPT ;
"""


def test_a_lane_that_runs_into_another_is_found() -> None:
    assert len(lost_lanes(PACKED)) == 1
    assert not lost_lanes(PACKED.replace("mul.wide.u32 	%rd63, %r3, 2147483648", "cvt.u64.u32 	%rd63, %r3"))


def test_a_product_at_an_address_of_chance_is_found() -> None:
    assert len(stray_descriptors(SASS)) == 2
    assert len(stray_descriptors(SASS.replace("REDUX", "UNKNOWN").replace("UR42, R74", "UR43, R74"))) == 2
    assert not stray_descriptors(SASS.replace("UIADD3 UR42, UP0, UR42", "UIADD3 UR42, UP0, UR50"))


def test_calls_that_were_wrong_on_an_h200_compile_without_flaws() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = json.loads(printed("machine_code", "main").splitlines()[-1])
    assert len(found) >= 6
    assert not any(found), found
