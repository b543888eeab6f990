"""Cases of ``swath.testing`` through the kernel in Gluon, compiled for an H200 and run by ``ptx_machine.py``.

PYTHONPATH=src:tests:tests/backends python tests/backends/ptx_launch.py NAME...    cases by name, all by default
"""

from __future__ import annotations

import io
import json
import struct
import sys
from contextlib import redirect_stdout
from typing import Any

import torch
from compile_variants import stand_on
from ptx_machine import Machine
from ptx_program import parse

from conftest import plan_for
from swath.backends.triton.arguments import operands_of
from swath.ops import explain
from swath.target import Target
from swath.testing import Case, make

PROGRAMS = 2
"""That take the work tiles of a case in turn."""

SMALL: dict[str, Any] = dict(num_kv_heads=1, group=1, head_dim=128, spiked=True)
CASES = {
    "window": Case((150, 90), (40, 70), dense=True, size=30, **SMALL),
    "full, two consumers": Case((1350,), (140,), dense=True, **SMALL),
    "one pass": Case((200, 60), (40, 60), dense=True, size=100, **SMALL | {"head_dim": 64, "group": 8}, sink="q"),
    "bounds apart, leading keys": Case((150, 90), (40, 70), ranges="random", global_tokens=(0, 7), **SMALL),
    "bounds, chunks and pages of 8": Case((150, 90), (90, 20), ranges="chunked", page_size=8, **SMALL | {"group": 2}),
    "hostile bounds": Case((90,), (70,), ranges="hostile", softcap=5.0, tail=9, **SMALL | {"head_dim": 64}),
}


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


def share_of_budget(case: Case) -> float:
    """Of the worst element of a call whose tiles the kernel computes: at most 1.

    Raises:
        AssertionError: it is more.
        RuntimeError: the program does what a GPU would not survive.
    """
    inputs = make(case)
    problem = explain.prepare(inputs.op, *inputs.args, **{**inputs.options, "return_lse": True})
    plan = plan_for("hopper", problem, Target("sm_90", num_sms=132))
    operands = operands_of(problem) | plan.scratch.tensors("cpu")
    problem.out.fill_(torch.nan)
    if operands.get("counter") is not None:
        operands["counter"].zero_()
    (call,) = (call for call in plan.calls if call.kernel.fn.__name__ == "hopper_tile_kernel")
    launch(call, operands, PROGRAMS)
    return inputs.check(problem.out, problem.lse)


def main() -> None:
    """A line of JSON a case."""
    stand_on("sm_90")
    for name in sys.argv[1:] or CASES:
        try:
            said: Any = share_of_budget(CASES[name])
        except (AssertionError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps({name: said}), flush=True)


if __name__ == "__main__":
    main()
