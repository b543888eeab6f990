"""Random calls over the whole contract: a fixed number of them, and the proof that the fuzzer finds what is wrong."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_faults import FAULTS
from options import DENSE, PAGED, in_pairs
from torch import Tensor

from swath import KVQuant, target
from swath.testing import Case, Truth, make
from swath.testing.fuzz import SIZES, Call, Settings, Tally, Verdict, call_of, draw, judge, sweep, truth
from swath.testing.fuzz import __main__ as command
from swath.testing.fuzz.promises import PROMISES
from swath.testing.fuzz.shrink import shrunk
from swath.testing.fuzz.sweep import Finding, seed_at
from swath.testing.fuzz.twists import TWISTS, build
from swath.testing.fuzz.workers import Run, Team, Worker


def swept(impl: str, device: str, calls: int, first: int = 0) -> Tally:
    """A sweep of as many calls as suit the backend."""
    on_gpu = device == "cuda"
    sizes = "large" if on_gpu else "small" if target.interpreting() else "medium"
    per_variant = 10 if on_gpu else 1
    seeds = (seed_at(n, 1000 * first, per_variant) for n in range(calls))
    return sweep(seeds, Settings(impl, device, sizes, tries=0, most=3))


CALLS = {"reference": 10, "cpu": 50, "triton": 4, "hopper": 20}
"""Calls of each part of the sweep."""


@pytest.mark.parametrize("part", range(8))
def test_random_calls(part: int, impl: str, device: str) -> None:
    tally = swept(impl, device, CALLS[impl] * (1 if device == "cpu" else 10), first=100_000 * part)
    assert not tally.findings, "\n".join(map(str, tally.findings))
    assert tally.backends or tally.refused


DRAWN = [call_of(1000 * n) for n in range(400, 430)]
COMPARED = [
    *in_pairs(PAGED)[::10],
    *in_pairs(DENSE, dense=True)[::10],
    Case(q_lens=(5, 20), kv_lens=(50, 70), scale=-0.1, quant=KVQuant(torch.int8, "channel"), compute="int8"),
]


@pytest.mark.parametrize("parts", [1 << 24, 1000], ids=["whole", "in-parts"])
def test_the_truth_is_the_oracles(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fields, of cases of the operators' own tests and of drawn calls with their twists."""
    monkeypatch.setattr(truth, "MOST_SCORES", parts)
    made = [make(case) for case in COMPARED]
    made += [build(c) for c in DRAWN if c.op.endswith("attention") and "hostile-indptr" not in c.twists]
    for inputs in made:
        if inputs.case.num_seqs:
            for name, got, want in zip(Truth._fields, truth.exact(inputs), inputs.truth(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=f"{inputs.case}: {name}")


def test_the_truth_takes_no_code_of_what_it_judges() -> None:
    tree = ast.parse(Path(truth.__file__).read_text(encoding="utf-8"))
    taken = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert [module for module in taken if module and module.startswith("swath")] == ["swath.testing.oracle"]


def test_a_batch_of_nothing_has_a_truth() -> None:
    for q_lens in (1, ()):
        assert truth.exact(make(Case((), q_lens))).out.shape == (0, 4, 64)


def test_a_seed_is_a_call() -> None:
    """The same one every time; the numbers of a variant share what kernels are compiled for; it can be written down."""
    names = {"torch": torch, "Call": Call, "Case": Case, "KVQuant": KVQuant}
    for seed in (0, 1, 17_003, 17_004, 999_999_999):
        call = call_of(seed)
        assert call_of(seed) == call
        assert eval(str(call), names) == call
    first, second = (call_of(seed).case for seed in (17_003, 17_004))
    assert first != second
    for name in ("dtype", "quant", "head_dim", "page_size", "num_kv_heads", "layout", "causal", "split_size", "sink"):
        assert getattr(first, name) == getattr(second, name)


def test_calls_of_a_variant_share_the_twists_that_kernels_are_compiled_for() -> None:
    compiled = [
        {t for t in call_of(seed).twists if t in TWISTS and TWISTS[t].compiled} for seed in range(40_000)[::100]
    ]
    by_variant = [compiled[at : at + 10] for at in range(0, len(compiled), 10)]
    assert all(several == several[:1] * 10 for several in by_variant)
    assert sum(map(bool, compiled)) > 100


def test_a_further_draw_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def further(r: Any, _made: draw.Fields, _sizes: draw.Sizes) -> draw.Fields:
        return {"unknown": r.random()}

    before = [draw.draw(seed, SIZES["medium"]) for seed in range(0, 20_000, 1000)]
    monkeypatch.setattr(draw, "VARIANT", (further, *draw.VARIANT))
    monkeypatch.setattr(draw, "NUMBERS", (further, *draw.NUMBERS))
    assert [draw.draw(seed, SIZES["medium"]) for seed in range(0, 20_000, 1000)] == before


def test_every_twist_and_promise_is_drawn() -> None:
    drawn = {name for n in range(600) for name in call_of(1000 * n).twists}
    assert drawn == {*TWISTS, *(name for name, one in PROMISES.items() if not one.extreme)}
    extreme = {name for n in range(600) for name in call_of(1000 * n, extreme=True).twists}
    assert extreme > drawn


@pytest.mark.parametrize("name", TWISTS)
def test_twists_change_tensors_and_not_the_shape_of_the_result(name: str) -> None:
    call = next(c for c in map(call_of, range(0, 10**6, 1000)) if name in c.twists and c.op.endswith("attention"))
    plain, twisted = build(replace(call, twists=())), build(replace(call, twists=(name,)))
    assert twisted.q.shape[1:] == plain.q.shape[1:]
    assert truth.exact(twisted).out.isfinite().all()


def test_calls_move_to_a_device_as_they_lie_in_memory() -> None:
    """Strides, offsets, and which tensors share a storage."""
    for call in DRAWN:
        here: list[Tensor] = []
        there: list[Tensor] = []
        if call.op.endswith("attention"):
            inputs = build(call)
            for made, tensors in ((inputs, here), (inputs.to("meta"), there)):
                made.mapped(lambda x, tensors=tensors: tensors.append(x) or x)
        assert [(x.dtype, x.shape, x.stride(), x.storage_offset()) for x in here] == [
            (x.dtype, x.shape, x.stride(), x.storage_offset()) for x in there
        ]
        for x, moved in zip(here, there, strict=True):
            sharing = [x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in here]
            assert [moved.untyped_storage()._cdata == other.untyped_storage()._cdata for other in there] == sharing


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    tally = sweep((1000 * n for n in range(300)), Settings("cpu", tries=0, most=1))
    assert [found.verdict.kind for found in tally.findings] in (["budget"], ["promise"])


def test_a_fault_of_triton_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the faults of torch above: the window of its kernels is one too short."""
    if not (target.interpreting() or torch.cuda.is_available()):
        pytest.skip("triton needs a GPU, or TRITON_INTERPRET=1")
    from swath.backends.triton import plan

    args = plan.shared_args

    def too_short(*of: Any) -> dict[str, Any]:
        made = args(*of)
        return made | {"window": made["window"] - 1} if made.get("window", 0) > 0 else made

    monkeypatch.setattr(plan, "shared_args", too_short)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tally = sweep((1000 * n for n in range(40)), Settings("triton", device, "small", tries=0, most=1))
    assert [found.verdict.kind for found in tally.findings] == ["budget"]


def test_a_failing_call_is_shrunk_to_what_fails() -> None:
    call = next(
        c for c in map(call_of, range(0, 10**6, 1000)) if c.case.num_seqs > 2 and c.case.sink == "q" and c.twists
    )
    assert shrunk(call, lambda _: False, 1000) == call
    simplest = shrunk(call, lambda c: c.case.sink == "q" and max(c.case.kv_lens, default=0) >= 17, 1000)
    assert simplest == Call(call.op, Case(kv_lens=(17,), num_kv_heads=1, group=1, sink="q"), call.seed)
    tries: list[Call] = []
    shrunk(call, lambda c: tries.append(c) is not None, 7)
    assert len(tries) == len(set(tries)) == 7


def test_the_command_repeats_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its exit code is 1 then; it prints the seed, both calls, and the command, which finds the same again."""
    arguments = ["--backend", "cpu", "--calls", "1", "--seed"]
    with monkeypatch.context() as patch:
        FAULTS["a sink dropped"](patch)
        (found,) = sweep(range(0, 10**6, 1000), Settings("cpu", tries=0, most=1)).findings
        seed = found.call.seed
        assert command.main([*arguments, str(seed)]) == 1
        printed = capsys.readouterr().out
        assert f"seed {seed} on cpu: budget: " in printed
        assert f"  call      {call_of(seed)}\n" in printed
        assert "  simplest  Call(" in printed
        (repeat,) = [line.split("fuzz ")[1] for line in printed.splitlines() if line.startswith("  repeat")]
        assert command.main(repeat.split()) == 1
    assert command.main([*arguments, str(seed)]) == 0
    assert capsys.readouterr().out.endswith(": 0 findings\n")


@pytest.mark.parametrize(
    "wrong", [["--calls", "0"], ["--backend", "none"], ["--seed", "-1"], ["--seed", "999", "--per-variant", "2"]]
)
def test_wrong_options_are_named(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_processes_share_the_calls_of_a_run() -> None:
    told: list[str] = []
    run = Run(seed=5, calls=8, per_variant=2, processes=2, settings=Settings("cpu"))
    assert [run.seed_at(n) for n in range(8)] == [5, 6, 1005, 1006, 2005, 2006, 3005, 3006]
    assert list(run.lots()) == [(0, 4), (4, 8)]
    tally = Team(run, told.append).finish()
    assert (tally.calls, sum(tally.backends.values()), tally.findings, told) == (8, 8, [], [])


class Ended:
    """A process that ended in its call, as after a stray access."""

    exitcode = -11

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        """It has ended."""


def test_a_process_that_dies_is_a_finding_and_the_rest_goes_on() -> None:
    told: list[str] = []
    team = Team(Run(seed=0, calls=10, per_variant=1, processes=1, settings=Settings("cpu")), told.append)
    receiver, sender = team.context.Pipe(duplex=False)
    early = Finding(call_of(3000), Verdict("cpu", "budget", "an element"), call_of(3000), "command")
    sender.send(early)
    sender.close()
    worker = Worker(Ended(), receiver, team.context.Value("q", 6), (2, 10))
    team._look_after(worker)
    dead = team.tally.findings[1]
    assert team.tally.findings[0] == early
    assert (dead.call, dead.verdict) == (call_of(6000), Verdict("cpu", "end", "the process ended with exit code -11"))
    assert told == [str(early), str(dead)]
    assert (worker.finished, team.again, team.tally.calls) == (True, [(7, 10)], 5)


SHARED = Case(
    (14295,), 8, num_kv_heads=1, group=8, head_dim=16, dtype=torch.float32, layout="packed",
    quant=KVQuant(torch.int8, "channel", "tensor"), compute="int8",
)  # fmt: skip
FEW_MAGNITUDES = Case(
    (18, 6, -671398, 278, 33), 12, num_kv_heads=5, group=3, head_dim=512, page_size=80, dtype=torch.float8_e4m3fn,
    quant=KVQuant(torch.int8, "head"), q_scale="token", size=81, global_tokens=(80, 3, 80, 1, 102),
    max_global_tokens=109, compute="int8", bounds="loose", spiked=True,
)  # fmt: skip
FEW_MANTISSAS = Case(
    (468,), (978,), num_kv_heads=1, group=1, head_dim=240, quant=KVQuant(torch.float8_e5m2, "tensor", "token"),
    sink="fp32", spiked=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("impl", "call"),
    [
        ("cpu", Call("paged_attention", SHARED, 100002001, ("one-pool",))),
        ("cpu", Call("paged_attention", FEW_MAGNITUDES, 3138279000)),
        ("triton", Call("paged_attention", FEW_MANTISSAS, 2100030024)),
    ],
    indirect=["impl"],
    ids=["cpu-keys-are-values", "cpu-few-magnitudes", "triton-few-mantissas"],
)
def test_errors_that_go_together_are_within_a_budget(impl: str, call: Call, device: str) -> None:
    """Right calls that budgets refused: rounding errors of theirs are equal, and do not add in quadrature."""
    verdict = judge(call, impl, device)
    assert verdict.backend == impl
    assert not verdict.fault, verdict.fault
