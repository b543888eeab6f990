"""``swath bench serve`` over an engine made up here: what is driven, checked, timed, stored and shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from bench_rows import ORIGIN
from cli_calls import failure
from typer import Exit

import swath
from swath.bench.results import Row, Served, append, read
from swath.bench.serving import check, page
from swath.bench.serving.engine import Call, Job, Load, Logprobs
from swath.bench.serving.job import in_process
from swath.bench.serving.measure import _sensors, measure
from swath.bench.serving.models import MODELS
from swath.bench.serving.profile import Kernel, kind_of, spent
from swath.bench.serving.table import TITLES, cells, in_words, markdown
from swath.bench.serving.traffic import prompts, steps
from swath.cli.bench_serve import DEFAULT, job_of, run_all

ROOT = Path(__file__).parents[2]
LOAD = Load(prompts=2, prompt_len=64, sequences=4, context=32, new_tokens=6)
PAGE = 16


class FakeEngine:
    """A token for every request a step; its attention is swath's on a CPU, times ``wrong``."""

    version, graphs = "fake 1.0", "none"

    def __init__(
        self, wrong: float = 1.0, graph_shift: float = 0.0, decodes: bool = True, graphed: Sequence[int] = (3, 4)
    ) -> None:
        self.left: dict[str, int] = {}
        self.wrong, self.graph_shift, self.decodes, self.graphed = wrong, graph_shift, decodes, graphed
        self.look: Callable[[Call], None] | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self.left)

    def add(self, prompt: Sequence[int], new_tokens: int) -> None:
        assert len(prompt) > 0
        self.left[f"request {len(self.left)}"] = new_tokens

    def step(self) -> Mapping[str, int]:
        came = dict.fromkeys(self.left, 1)
        self.left = {name: n - 1 for name, n in self.left.items() if n > 1}
        return came

    def logprobs(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Logprobs]:
        if self.look is not None:
            for seed in range(4):
                self.look(attention(7, self.wrong, seed))
                if self.decodes:
                    self.look(attention(1, self.wrong, seed))
        shift, (chosen, other) = (0.0, (3, 4)) if self.look is not None else (self.graph_shift, self.graphed)
        return [[{chosen: -1.0 + shift, other: -2.0}] * new_tokens for _ in prompts]

    @contextmanager
    def watched(self, look: Callable[[Call], None]) -> Iterator[None]:
        self.look = look
        yield
        self.look = None


def attention(q_len: int, wrong: float, seed: int) -> Call:
    """A call over two sequences with a window, as an engine would have made it."""
    torch.manual_seed(seed)
    cache = swath.PagedKV.empty(torch.bfloat16, num_pages=8, num_kv_heads=2, page_size=PAGE, head_dim=16)
    cache.k.normal_()
    cache.v.normal_()
    table, kv_lens = torch.randperm(8).int().view(2, 4), torch.tensor([50, 20], dtype=torch.int32)
    cu = torch.tensor([0, q_len, 2 * q_len], dtype=torch.int32)
    q = torch.randn(2 * q_len, 4, 16, dtype=torch.bfloat16)
    out = swath.paged_attention(q, cache, table, kv_lens, cu_seqlens_q=cu, max_q_len=q_len, window=24)
    return Call(q, wrong * out, cache, table, kv_lens, cu, 24, 0.25)


def a_job(backend: str = "swath", model: str = "mistral-7b") -> Job:
    return job_of(f"{model}/bf16/{backend}", 8)


def run(engine: FakeEngine, job: Job) -> Row:
    return measure(job, LOAD, lambda *_: engine, ORIGIN, lambda _: None)


def test_a_job_becomes_a_row(tmp_path: Path) -> None:
    row = run(FakeEngine(), a_job())
    assert isinstance(row, Served)
    assert (row.case, row.provider, row.version) == ("mistral-7b 8 layers bf16", "swath", "fake 1.0")
    assert row.error is not None
    assert 0 < row.error < 1e-2
    assert row.budget_used is not None
    assert 0 < row.budget_used < 1
    assert row.checked_calls == 4
    assert row.decode_step_us is not None
    assert row.decode_tokens_per_s == pytest.approx(4e6 / row.decode_step_us)
    assert row.host_loop_ms is not None
    assert row.host_loop_ms > 0
    append(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl") == [row]


def test_clock_and_power_are_told_where_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_package() -> int:
        raise ModuleNotFoundError("nvidia-ml-py")

    assert _sensors() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 650_500)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1980)
    assert _sensors() == {"prefill_clock_mhz": 1980.0, "prefill_power_w": 650.5}
    monkeypatch.setattr(torch.cuda, "clock_rate", no_package)
    assert _sensors() == {}


@pytest.mark.parametrize(
    ("engine", "job", "reason"),
    [
        (FakeEngine(wrong=1.05), a_job(), "of its error budget"),
        (FakeEngine(wrong=1.2), a_job("FLASH_ATTN"), "an error of 2.0e-01"),
        (FakeEngine(wrong=torch.nan), a_job("FLASH_ATTN"), "an error of inf"),
        (FakeEngine(graph_shift=0.7), a_job(), "0.7 apart"),
        (FakeEngine(graphed=(5, 6)), a_job(), "inf apart"),
        (FakeEngine(decodes=False), a_job(), "did not see decode"),
    ],
)
def test_a_wrong_engine_is_not_timed(engine: FakeEngine, job: Job, reason: str) -> None:
    row = run(engine, job)
    assert row.status == "refused"
    assert row.reason is not None
    assert reason in row.reason


def test_what_is_not_wrong_is_timed() -> None:
    """Another backend may round more coarsely than our budget, and routing may flip where graphs round otherwise."""
    coarse = run(FakeEngine(wrong=1.05), a_job("FLASH_ATTN"))
    assert coarse.status == "ok"
    assert coarse.budget_used is not None
    assert coarse.budget_used > 1
    assert run(FakeEngine(graph_shift=0.7), a_job(model="gpt-oss-20b")).status == "ok"


def test_a_key_that_a_backend_leaves_out_counts_as_unseen() -> None:
    """In decode, which is still one kind of layer with prefill over the whole window. A refusal says where it was."""
    shown, checkers = attention(1, 1.0, 0), (check.Checker(), check.Checker())
    fewer = swath.paged_attention(shown.q, shown.cache, shown.block_table, shown.seq_lens, window=23)
    for checker, left_out in zip(checkers, (1, 0), strict=True):
        for _ in range(check.EVERY):
            checker.look(replace(shown, out=fewer, left_out=left_out))
        assert checker.seen == {(24, True): check.EVERY}
    assert checkers[0].error < 1e-2
    assert checkers[1].error > check.COARSE
    assert checkers[1].where == "decode, window 24"


def test_answers_without_a_common_token_have_no_difference(tmp_path: Path) -> None:
    """It is no number, and the row of a model with routing is read again."""
    row = run(FakeEngine(graphed=(5, 6)), a_job(model="gpt-oss-20b"))
    assert isinstance(row, Served)
    assert row.graph_difference is None
    append(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl") == [row]


def test_answers_are_compared_up_to_where_they_part() -> None:
    one = [{1: -0.5, 2: -0.6}, {5: -1.0, 6: -1.1}, {7: -1.0}]
    other = [{1: -0.4, 2: -0.6}, {6: -1.0, 5: -1.2}, {8: -9.0}]
    assert check.difference(one, other) == pytest.approx(0.2)
    assert check.difference(one, [{9: -1.0}, {9: -1.0}, {9: -1.0}]) == torch.inf


def test_traffic_is_told_from_the_first_tokens() -> None:
    texts = prompts(3, 10, 0)
    assert texts != prompts(3, 10, 1)
    assert texts == prompts(3, 10, 0)
    found = list(steps(FakeEngine(), texts, 2))
    assert [(step.tokens, step.has_all) for step in found] == [(3, True), (3, True)]


def test_jobs_that_fail_and_die_are_rows(capfd: pytest.CaptureFixture[str]) -> None:
    def raises(*_: object) -> Any:
        raise ImportError("no engine")

    def dies(*_: object) -> Any:
        os._exit(3)

    runners = [SimpleNamespace(FORKS=True, prepare=lambda: "fake", start=start) for start in (raises, dies)]
    rows = [in_process(a_job(), LOAD, runner, "abc", "c", lambda _: None) for runner in runners]
    assert [row.reason for row in rows] == ["ImportError: no engine", "its process ended with 3"]
    assert {row.status for row in rows} == {"failed"}
    assert rows[0].origin.command == "c"
    assert "no engine" in capfd.readouterr().err


def test_rows_are_written_one_by_one_and_within_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    seen: list[int] = []

    def job(job: Job) -> Row:
        seen.append(len(read(path)) if path.exists() else 0)
        return run(FakeEngine(), job)

    jobs = [a_job(), a_job("FLASH_ATTN")]
    run_all(jobs, job, path, None)
    assert seen == [0, 1]
    said = " ".join(capsys.readouterr().out.split())
    assert "mistral-7b 8 layers bf16, FLASH_ATTN prefill tok/s" in said
    assert f"2 rows written to {path.name}" in said.replace(f"{tmp_path}/", "")
    run_all(jobs, job, path, 0.0)
    assert "0 rows written" in capsys.readouterr().out


def test_a_failure_of_ours_fails_the_command(tmp_path: Path) -> None:
    with pytest.raises(Exit):
        run_all([a_job()], lambda job: run(FakeEngine(wrong=2.0), job), tmp_path / "rows.jsonl", None)


def test_kernels_are_told_apart_by_their_names() -> None:
    named = {
        "reduce_kernel": "attention", "split_kernel": "attention", "append_kernel": "append",
        "void cublasLt::splitKreduce_kernel<32>": "rest", "at::native::reduce_kernel<512>": "rest",
        "cutlass::device_kernel<flash::FlashAttnFwdSm90<X>>": "attention", "kernel_unified_attention": "attention",
        "void vllm::reshape_and_cache_flash_kernel<bf16>": "append", "nvjet_tst_128x256": "rest",
        "_reshape_cache_per_token_head": "append",
        "_fwd_grouped_kernel_stage1": "attention", "void store_kvcache<2048>(Params)": "append",
    }  # fmt: skip
    assert {name: kind_of(name) for name in named} == named
    runs = [Kernel("split_kernel", 0, 4), Kernel("reduce_kernel", 3, 5), Kernel("append_kernel", 7, 8)]
    found = spent([*runs, Kernel("gemm", 7, 10)])
    assert tuple(found) == (8, 5, 1)
    assert tuple(found.each(2)) == (4, 2.5, 0.5)


def test_tables_have_the_figures_or_the_reason() -> None:
    row = run(FakeEngine(), a_job())
    assert isinstance(row, Served)
    row = replace(row, decode_gpu_us=4000.0, decode_attention_us=2000.0, prefill_gpu_us=1e5, prefill_attention_us=1e4)
    line = dict(zip(TITLES, cells(row), strict=True))
    assert (line["attention us a layer"], line["attention ms a prompt"]) == ("250 (50%)", "10 (10%)")
    refused = run(FakeEngine(wrong=2.0), a_job())
    assert in_words(refused).startswith("refused: a sampled row")
    assert "attention us a layer 250 (50%)" in in_words(row)
    assert [text.count("|") for text in markdown([row, refused])] == [len(TITLES) + 1] * 4
    without = markdown([replace(row, decode_tokens_per_s=None)])
    assert [text.count("|") for text in without] == [len(TITLES)] * 3
    assert "decode tok/s" not in without[0]


def test_the_committed_page_has_the_committed_figures() -> None:
    found = {path.name: read(path) for path in sorted((ROOT / "benchmarks/results").glob("*.jsonl"))}
    text = (ROOT / page.PAGE).read_text(encoding="utf-8")
    assert page.with_table(text, found) == text, "run: swath bench report"
    assert page.with_table(text, {}) == text
    row = run(FakeEngine(), a_job())
    newer = replace(row, version="vllm 9", origin=replace(ORIGIN, date="2099-01-01"))
    assert "A GPU, driver 1, torch 2, Triton 3, swath 0 at abc, 2099-01-01, vllm 9." in page.with_table(
        text, found | {"a.jsonl": [newer]}
    )


def test_each_engine_has_a_table_of_its_own() -> None:
    row = replace(run(FakeEngine(), a_job()), origin=ORIGIN)
    marks = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in page.MARKS.values())
    made = page.with_table(marks, {"a.jsonl": [replace(row, version=name) for name in ("vllm 1", "sglang 2")]})
    assert made.count("| mistral-7b 8 layers bf16 | swath |") == 2
    assert made.index("vllm 1") < made.index("sglang 2")
    assert page.with_table("", {"a.jsonl": [replace(row, version="another 1")]}) == ""


def test_models_have_whole_periods_of_layers() -> None:
    for model in MODELS.values():
        config = model.config(model.layers_near(8))
        assert len(config.get("layer_types", range(config["num_hidden_layers"]))) == config["num_hidden_layers"]
    assert job_of("gemma-3-12b/bf16/swath", 99).layers == MODELS["gemma-3-12b"].depth
    with pytest.raises(ValueError, match="a multiple of 6"):
        MODELS["gemma-3-12b"].config(8)


def test_wrong_jobs_are_named() -> None:
    assert all(job_of(text, 8) for texts in DEFAULT.values() for text in texts)
    assert job_of("mistral-7b:32/bf16/swath", 8).layers == 32
    assert "MODEL/CACHE/BACKEND" in failure("bench", "serve", "mistral-7b/bf16")
    assert "one of mistral-7b" in failure("bench", "serve", "mistral/bf16/swath")
    assert "behind the colon" in failure("bench", "serve", "mistral-7b:all/bf16/swath")
