"""Integer maxima of Hopper's softmax: their inline PTX, run here, against what the softmax needs of a maximum."""

from __future__ import annotations

import math
import re
import struct

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from swath.backends.device.softmax import FLOOR, SLACK
from swath.backends.hopper.softmax import E4M3_LOWEST, E4M3_SLACK, LOWEST, P_LOG2, thread_max_ptx

VALUES = 16
"""Scores of a thread: two rows by turns in pairs."""


def bits(x: float) -> int:
    """A float32 as the integer that has its bits."""
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


def run_ptx(text: str, values: list[float], m: tuple[float, float]) -> list[float]:
    """What the PTX makes of a thread's ``values`` and the m of its two rows, in a warp of one thread."""
    rows = [m[i // 2 % 2] for i in range(len(values))]
    registers: dict[str, int] = {f"${len(values) + i}": bits(x) for i, x in enumerate(values + rows)}
    predicate, done = False, False

    def value(name: str) -> int:
        return registers[name] if name in registers else bits(float(name)) if "." in name else int(name, 0)

    def as_float(name: str) -> float:
        return float(struct.unpack("<f", struct.pack("<i", value(name)))[0])

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if ":" in line:
            done = False
        words = line.split(":")[-1].replace(",", " ").split()
        if not words or done:
            continue
        op, (to, *operands) = words[0], words[1:]
        if op == "@!low":
            done = not predicate
        elif op.startswith("setp"):
            a, b = (as_float if op.endswith("f32") else value)(operands[0]), operands[1]
            below = a < (float(b) if op.endswith("f32") else int(b))
            predicate = below or (predicate if ".or." in op else False)
        elif op == "selp.b32":
            registers[to] = value(operands[0] if predicate else operands[1])
        elif op in ("max.s32", "min.s32"):
            registers[to] = (max if op == "max.s32" else min)(value(operands[0]), value(operands[1]))
        elif op == "mov.b32":
            registers[to] = value(operands[0])
        else:
            assert op == "vote.sync.any.pred", op
    return [as_float(f"${i}") for i in range(len(values))]


MAXIMA = [FLOOR.value, -900.0, -15.5, -15.0, -8.5, -3.0, 0.0, 40.0]


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("case", ["mixed", "below 0", "far below 0", "hidden", "zeros", "one"])
def test_maxima_move_m_as_floats_would(case: str, e4m3: bool) -> None:
    """m becomes what a maximum of floats makes it, or no score of the row is above 0 and its p 2^15 at most: of e4m3,
    which ends at 448, 2^8.75. There m is 8 less than the maximum."""
    torch.manual_seed(0)
    less = float(P_LOG2.value) if e4m3 else 0.0
    slack, lowest = (E4M3_SLACK.value, E4M3_LOWEST.value) if e4m3 else (SLACK.value, LOWEST.value)
    text = thread_max_ptx(VALUES, less)
    for turn in range(60):
        x = torch.randn(VALUES) * (10.0 if turn % 2 else 0.3)
        if case == "below 0":
            x = -x.abs()
        elif case == "far below 0":
            x = -x.abs() - 700.0
        elif case == "hidden":
            x = torch.where(torch.rand(VALUES) < 0.8, -math.inf, -x.abs())
        elif case == "zeros":
            x = torch.where(torch.rand(VALUES) < 0.5, -0.0, -x.abs())
        elif case == "one":
            x = -x.abs()
            x[turn % VALUES] *= -1
        m = (MAXIMA[turn % 8], MAXIMA[turn // 8 % 8])
        found = run_ptx(text, x.tolist(), m)
        for row in (0, 1):
            own = [i for i in range(VALUES) if i // 2 % 2 == row]
            assert len({found[i] for i in own}) == 1
            exact, high = max(float(x[i]) for i in own), found[own[0]]
            moved = max(m[row], high - less) if high - less > m[row] + slack else m[row]
            wanted = max(m[row], exact - less) if exact - less > m[row] + slack else m[row]
            assert high <= exact
            if min(m) < lowest:
                assert moved == wanted
            elif moved != wanted:
                assert exact <= 0
                assert exact - moved <= -lowest
