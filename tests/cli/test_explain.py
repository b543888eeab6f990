"""``swath explain`` and the calls it makes up: what it says is what the library says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import swath
from swath import KVQuant

pytest.importorskip("typer", reason="the command line needs the extra 'bench'")

from cli_calls import failure, invoke

from swath.cli.answer import DTYPES
from swath.cli.calls import arguments, case_of
from swath.cli.elsewhere import GPUS
from swath.cli.explain import APPLIES
from swath.ops.explain import OPS
from swath.target import SHARED_BYTES, has_triton
from swath.testing.filling import MAX_UNSET_BYTES

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("q_len", [1, 4, 20])
def test_made_up_calls_are_calls(op: str, q_len: int) -> None:
    args, kwargs = arguments(op, case_of(2, q_len, 40, size=8, softcap=5.0, sink="fp32"), CPU)
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.zero_()
    getattr(swath, op)(*args, **kwargs, impl="reference")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("q_len", [1, 4, 20])
def test_explain_says_what_the_library_says(op: str, q_len: int) -> None:
    text = invoke("explain", "--op", op, "--q-len", q_len, "--batch", 3, "--device", "cpu").stdout
    args, kwargs = arguments(op, case_of(3, q_len, 4096, num_kv_heads=8, group=4, page_size=64), CPU)
    said = swath.explain(op, *args, **kwargs)
    assert text.startswith(f"{op} runs on the {said.backend} backend\n")
    flat = " ".join(text.split())
    assert f"launch {' '.join(said.launch.split())}" in flat
    for name, reason in said.reasons.items():
        words = "chosen" if name == said.backend else reason or "could run it too"
        assert f"{name} {' '.join(words.split())}" in flat


def test_explain_describes_the_case() -> None:
    options = ["--window", 128, "--global-tokens", 4, "--softcap", 30, "--sink", "--cache-dtype", "int8"]
    options += ["--granularity", "channel", "--compute", "int8", "--device", "cpu"]
    flat = " ".join(invoke("explain", *options).stdout.split())
    for words in ("(decode)", "int8 with channel scales, pages of 64", "Window(128, global_tokens=4)", "softcap 30.0"):
        assert words in flat
    assert "sink a logit per query head" in flat


def test_explain_takes_token_scales_unless_said() -> None:
    for stored in ("int8", "fp8", "fp8_e5m2"):
        assert " with token scales" in invoke("explain", "--cache-dtype", stored, "--device", "cpu").stdout
    assert "scales" not in invoke("explain", "--device", "cpu").stdout


@pytest.mark.skipif(not has_triton(), reason="Triton plans the launches, and is not installed")
@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("arch", GPUS)
def test_explain_asks_about_a_gpu_that_is_not_here(arch: str, interpret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner says of such a target, whatever is here."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    for op in OPS:
        said = json.loads(invoke("explain", "--target", arch, "--op", op, "--q-len", 512, "--json").stdout)
        backend = "hopper" if (arch, op) in (("sm_90", "attention"), ("sm_90", "paged_attention")) else "triton"
        assert (said["op"], said["backend"]) == (op, backend)
        assert arch in said["call"]["device"]
        assert said["reasons"].get("hopper") == (
            None if arch == "sm_90" or "attention" not in op else f"made for sm_90, this is {arch}"
        )
    multiprocessors = GPUS["sm_90"][0]
    assert f"hopper_tile_kernel x {multiprocessors}" in invoke("explain", "--target", "sm_90", "--q-len", 512).stdout
    assert "split_kernel" in invoke("explain", "--target", arch, "--kv-len", 65536).stdout


def test_targets_are_those_whose_shared_memory_is_known() -> None:
    assert GPUS.keys() == SHARED_BYTES.keys()


def test_explain_in_json_is_the_librarys_explanation() -> None:
    found = json.loads(invoke("explain", "--window", 128, "--device", "cpu", "--json").stdout)
    args, kwargs = arguments(
        "paged_attention", case_of(1, 1, 4096, num_kv_heads=8, group=4, page_size=64, size=128), CPU
    )
    said = swath.explain("paged_attention", *args, **kwargs)
    assert found["backend"] == said.backend
    assert found["launch"] == said.launch
    assert found["reasons"] == said.reasons
    assert found["call"]["window"] == "Window(128)"


def test_explain_takes_a_device_or_a_target() -> None:
    assert failure("explain", "--target", "sm_90", "--device", "cpu") == "target: wanted no --device with it, got cpu"
    assert failure("explain", "--target", "sm_1").startswith("target: wanted one of 'sm_80', ")


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "token"])
@pytest.mark.parametrize("stored", ["int8", "fp8", "fp8_e5m2"])
def test_explain_takes_every_granularity(stored: str, granularity: str) -> None:
    options = ["--cache-dtype", stored, "--granularity", granularity, "--device", "cpu"]
    assert f" with {granularity} scales" in invoke("explain", *options).stdout
    quant = KVQuant(DTYPES[stored], granularity)
    assert arguments("paged_attention", case_of(quant=quant), CPU)[0][1].quant == replace(quant, v=granularity)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--op", "softmax"],
            "op: wanted one of 'attention', 'paged_attention', 'append_kv', 'quantise_q', 'merge_states', got",
        ),
        (["--q-heads", 12], "q_heads: wanted a multiple of the 8 kv heads, got 12"),
        (["--head-dim", 100], "q: wanted a head_dim that is a multiple of 8, at most 512, got 100"),
        (["--page-size", 24], "page_size: wanted 1, 8 or a multiple of 16, got 24"),
        (["--dtype", "fp64"], "dtype: wanted one of 'bf16', "),
        (["--cache-dtype", "fp16"], "q: wanted the unquantised cache's dtype torch.float16, got torch.bfloat16"),
        (["--granularity", "channel"], "granularity: wanted one of 'none' for torch.bfloat16, got 'channel'"),
        (["--cache-dtype", "int8", "--granularity", "none"], "granularity: wanted one of 'tensor', 'head', "),
        (["--compute", "int8"], "compute: wanted 'float', or an int8 cache"),
        (["--softcap", -1], "softcap: wanted 0, inf, or a float from 1e-37 to 1e+38, got -1.0"),
        (["--window", -1], "size: wanted an int >= 0 or None, got -1"),
        (["--device", "tpu"], "device: wanted 'cpu'"),
        (["--op", "append_kv", "--window", 4], "window: wanted an operator that takes it (attention, paged_attention)"),
        (["--op", "attention", "--dtype", "fp8"], "q: wanted bfloat16, float16 or float32, got torch.float8_e4m3fn"),
    ],
)
def test_explain_refuses_in_one_line_of_the_library(args: list[object], message: str) -> None:
    assert failure("explain", *args).startswith(message)


def test_explain_knows_its_own_options() -> None:
    from swath.cli.explain import explain

    assert set(APPLIES) < set(explain.__annotations__)


def test_a_large_case_needs_little_memory() -> None:
    args, _ = arguments("paged_attention", case_of(64, 1, 1 << 20, num_kv_heads=8), CPU)
    assert args[1].nbytes <= MAX_UNSET_BYTES
    assert args[2].shape == (64, (1 << 20) // 16)
