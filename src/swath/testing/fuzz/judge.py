"""Run a call on a backend and say what is wrong with it, if anything is."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from swath.testing.fuzz.draw import Call
from swath.testing.fuzz.promises import PROMISES, Ran
from swath.testing.fuzz.truth import exact
from swath.testing.fuzz.twists import build
from swath.testing.fuzz.verdict import BrokenError, Verdict, demand_within_budget, taker
from swath.testing.fuzz.writers import judge_append, judge_merge, judge_quantise, judge_slots
from swath.testing.inputs import SENTINEL, Canary, Inputs
from swath.testing.oracle import Truth


def judge_attention(call: Call, impl: str, device: torch.device | str) -> Verdict:
    """An attention operator into an ``out`` with canaries around it, then the promises that were drawn."""
    inputs = build(call)
    sent = inputs.to(device)
    backend = taker(sent.op, sent.args, sent.options, impl)
    if not backend:
        return Verdict("")
    truth = exact(inputs)
    if not bool(truth.out.isfinite().all()) or bool(truth.lse.isnan().any()):
        raise ValueError("the fuzzer is wrong: a query sees poison in this call")
    canary = Canary.around(sent.q, inputs.case.v_dim, inputs.case.out_dtype, 0)
    out, lse = sent.run(backend, out=canary.out)
    if out.data_ptr() != canary.out.data_ptr():
        raise BrokenError("the result is another tensor than out")
    out, lse = out.cpu(), lse.cpu()
    used = demand_within_budget(inputs, out, lse, truth)
    stray = written_outside(canary, inputs, truth)
    if stray:
        raise BrokenError(f"{stray} elements changed around out, or in rows that no sequence owns")
    ran = Ran(call, inputs, sent, impl, backend, out, lse, truth)
    for name, promise in PROMISES.items():
        if name in call.twists:
            promise.check(ran)
    return Verdict(backend, used=used)


def written_outside(canary: Canary, inputs: Inputs, truth: Truth) -> int:
    """Elements of the canary's buffer that were written although no sequence owns them."""
    written, out = canary.buffer.cpu() != SENTINEL, canary.out
    inner = written.as_strided(out.shape, out.stride(), out.storage_offset())
    inner[truth.rows if inputs.cu_seqlens_q is not None else slice(None)] = False
    return int(written.sum())


JUDGES: dict[str, Callable[[Call, str, torch.device | str], Verdict]] = {
    "paged_attention": judge_attention,
    "attention": judge_attention,
    "append_kv": judge_append,
    "quantise_q": judge_quantise,
    "merge_states": judge_merge,
    "slots": judge_slots,
}


def judge(call: Call, impl: str = "auto", device: torch.device | str = "cpu") -> Verdict:
    """Run a call and say who ran it and what is wrong. Any exception of a legal call is a fault."""
    try:
        return JUDGES[call.op](call, impl, device)
    except BrokenError as error:
        return Verdict(impl, error.kind, str(error))
    except Exception as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(impl, type(error).__name__, f"{error} ({where.filename}:{where.lineno})")
