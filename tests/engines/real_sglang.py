"""The real SGLang on swath, on a CPU: run by ``make test-sglang`` in an environment of its own.

Its pools, allocator, layers and batches go through the backend, freed pages poisoned, against float64. Tiny models with
random weights generate through its ``Engine`` (scheduler, chunked prefill, mixed batches, prefix cache) and are held to
Transformers' eager attention. The stub of the other tests is held to the sources of the releases that are here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

# Read when SGLang is imported, here and in the processes that are started.
os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import sglang_stub
import torch
from tiny_models import VOCABULARY, save
from torch import Tensor

from swath.testing import oracle

HERE = Path(__file__).parent
NEW_TOKENS = 12
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024}
LOGPROB_BUDGET = 2e-5
"""What float32 sums in another order do to a logprob; a key lost in a window of 32 does a thousand times as much."""


class Run(NamedTuple):
    """A model's configuration, the arguments of ``Engine``, and variables of its processes."""

    config: str
    own: dict[str, Any] = {}  # noqa: RUF012
    engine: dict[str, Any] = {}  # noqa: RUF012
    environment: dict[str, str] = {}  # noqa: RUF012


RUNS = {
    "llama": Run("LlamaConfig", {}, dict(page_size=1)),
    # SGLang runs Mistral without a window.
    "mistral": Run("MistralConfig", dict(sliding_window=None), dict(page_size=64, enable_mixed_chunk=True)),
    # SGLang reads hidden_act, which checkpoints have, and configurations that are made today have not.
    "gemma2": Run(
        "Gemma2Config",
        dict(sliding_window=40, query_pre_attn_scalar=64, attn_logit_softcapping=5.0, hidden_act="gelu_pytorch_tanh"),
        dict(page_size=16, enable_mixed_chunk=True),
    ),
    "gemma3": Run(
        "Gemma3TextConfig", dict(num_hidden_layers=6, sliding_window=40, query_pre_attn_scalar=64), dict(page_size=16),
    ),
    "gpt_oss": Run(
        "GptOssConfig", dict(sliding_window=32, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN),
        dict(page_size=16, attention_backend="triton"), {"SWATH_SGLANG_AS": "triton"},
    ),
}  # fmt: skip


def prompts() -> list[list[list[int]]]:
    """Two calls: short and long prompts, and one whose beginning the first call has left in the cache."""
    generator = torch.Generator().manual_seed(1)
    first = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 33, 150, 80)]
    return [first, [[*first[2][:130], 7, 8, 9]]]


@pytest.mark.parametrize("name", RUNS)
def test_generation(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    model = save(tmp_path / "model", run.config, run.own)
    calls = prompts()
    job = dict(engine=run.engine | {"model_path": str(tmp_path / "model")}, calls=calls, new_tokens=NEW_TOKENS)
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(HERE / "sglang_engine.py"), str(tmp_path / "job.json"), str(tmp_path / "answers")]
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, env=os.environ | run.environment, timeout=900, check=False, cwd=tmp_path
        )
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    answers = json.loads((tmp_path / "answers").read_text())
    asked = [prompt for call in calls for prompt in call]
    worst = max(hold(model, prompt, *answer[:2]) for prompt, answer in zip(asked, answers, strict=True))
    print(f"{name}: {sum(len(answer[0]) for answer in answers)} tokens equal, logprobs within {worst:.1e}")
    assert worst <= LOGPROB_BUDGET
    assert answers[-1][2] > 0  # of the second call's prompt, keys were in the cache


def hold(model: Any, prompt: list[int], tokens: list[int], likely: list[dict[str, float]]) -> float:
    """The largest difference of a logprob from eager attention's, whose greedy tokens these must be."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    logprobs = logits.float().log_softmax(-1)
    assert logprobs.argmax(-1).tolist() == tokens
    return max(
        abs(logprobs[step, int(token)].item() - logprob)
        for step, x in enumerate(likely)
        for token, logprob in x.items()
    )


# ---- pools, allocator, layers and batches of SGLang, without its server ----------------------------------------------

HQ, HKV, DIM, WINDOW, CONTEXT = 8, 2, 64, 32, 512


class Serving:
    """Two requests over SGLang's pools: its allocator gives slots and takes them back, and freed ones are poisoned."""

    def __init__(self, page: int, dtype: torch.dtype, sinks: bool) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        from swath.engines.sglang import make_backend, versions

        self.page, self.dtype = page, dtype
        self.pool = SWAKVPool(
            size=1024, size_swa=512, page_size=page, dtype=dtype, head_num=HKV, head_dim=DIM, device="cpu",
            swa_attention_layer_ids=[0], full_attention_layer_ids=[1], enable_memory_saver=False,
        )  # fmt: skip
        self.allocator = SWATokenToKVPoolAllocator(1024, 512, page, dtype, "cpu", self.pool, False)
        requests = ReqToTokenPool(size=8, max_context_len=CONTEXT, device="cpu", enable_memory_saver=False)
        self.table, self.rows = requests.req_to_token, [3, 5]
        self.layers = [
            RadixAttention(HQ, DIM, DIM**-0.5, HKV, layer_id=i, sliding_window_size=size)
            for i, size in enumerate((WINDOW - 1, -1))
        ]
        self.sink = torch.randn(HQ) if sinks else None
        runner = SimpleNamespace(
            req_to_token_pool=requests, token_to_kv_pool=self.pool, sliding_window_size=WINDOW - 1,
            model=torch.nn.ModuleList(self.layers), use_mla_backend=False,
            model_config=sglang_stub.model_config(dtype),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(versions, "settings", lambda runner: versions.Settings(False, "EAGLE", 1, 4))
            self.backend = make_backend(runner)
        self.lens, self.pages, self.freed = [0, 0], [0, 0], [0, 0]
        self.keys = {(layer, b): torch.zeros(2, 0, HKV, DIM, dtype=dtype) for layer in (0, 1) for b in (0, 1)}

    def allocate(self, new: list[int]) -> Tensor:
        """Slots of new tokens, ``out_cache_loc``."""
        slots = []
        for b, n in enumerate(new):
            need = -(-(self.lens[b] + n) // self.page) - self.pages[b]
            if need:
                tokens = need * self.page
                if self.page == 1:
                    got = self.allocator.alloc(tokens)
                else:  # by pages SGLang allocates with kernels for GPUs
                    got = self.allocator.full_attn_allocator.alloc(tokens)
                    self.allocator.full_to_swa_index_mapping[got] = self.allocator.swa_attn_allocator.alloc(tokens)
                at = self.pages[b] * self.page
                self.table[self.rows[b], at : at + tokens] = got.int()
                self.pages[b] += need
            slots.append(self.table[self.rows[b], self.lens[b] : self.lens[b] + n].long())
        return torch.cat(slots)

    def forward(self, mode: Any, new: list[int]) -> float:
        """One pass through both layers; the largest error against float64."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
        from sglang.srt.speculative.eagle_info import EagleVerifyInput

        slots, seq_lens = self.allocate(new), [a + b for a, b in zip(self.lens, new, strict=True)]
        verify, one_each = mode.is_target_verify(), mode.is_decode()
        of_sglang = self.lens if verify else seq_lens
        batch = ForwardBatch(
            forward_mode=mode, batch_size=2, input_ids=torch.zeros(sum(new), dtype=torch.long),
            req_pool_indices=torch.tensor(self.rows), seq_lens=torch.tensor(of_sglang), out_cache_loc=slots,
            seq_lens_sum=sum(of_sglang), seq_lens_cpu=torch.tensor(of_sglang),
        )  # fmt: skip
        if verify:
            batch.spec_info = EagleVerifyInput.create_idle_input(1, 3, new[0], "cpu")
        elif not one_each:
            batch.extend_seq_lens, batch.extend_seq_lens_cpu = torch.tensor(new), new
            batch.extend_num_tokens = sum(new)
        self.backend.init_forward_metadata(batch)
        worst = 0.0
        for layer in self.layers:
            q = torch.randn(sum(new), HQ * DIM).to(self.dtype)
            k, v = torch.randn(2, sum(new), HKV, DIM).to(self.dtype)
            sinks = {} if self.sink is None else {"sinks": self.sink}
            with ExitStack() as stack:
                stack.enter_context(forward_context(ForwardContext(attn_backend=self.backend), forward_batch=batch))
                out = layer(q, k, v, batch, **sinks)
            worst = max(worst, self.error(layer, q, k, v, out, new))
        self.lens = seq_lens
        self.free()
        return worst

    def error(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, new: list[int]) -> float:
        """Against float64 over all keys that a request ever had."""
        worst, at = 0.0, 0
        for b, n in enumerate(new):
            known = self.keys[layer.layer_id, b] = torch.cat(
                [self.keys[layer.layer_id, b], torch.stack([k, v])[:, at : at + n]], 1
            )
            total = known.shape[1]
            truth = oracle.dense(
                q[at : at + n].unflatten(1, (HQ, DIM)), *known, torch.tensor([0, n]), torch.tensor([0, total]),
                size=None if layer.sliding_window_size < 0 else WINDOW, global_tokens=0, causal=True,
                scale=DIM**-0.5, softcap=0.0, sink=self.sink,
            )  # fmt: skip
            worst = max(worst, (out[at : at + n].view_as(truth.out).double() - truth.out).abs().max().item())
            at += n
        return worst

    def free(self) -> None:
        """Give back what lies behind the window, and poison it."""
        for b, row in enumerate(self.rows):
            dead = max(0, self.lens[b] - WINDOW) // self.page * self.page
            if dead > self.freed[b]:
                slots = self.table[row, self.freed[b] : dead].long()
                of_window = self.allocator.full_to_swa_index_mapping[slots]
                self.allocator.free_swa(slots)
                for x in (self.pool.get_key_buffer(0), self.pool.get_value_buffer(0)):
                    x[of_window] = torch.nan
                self.freed[b] = dead


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_requests_over_sglangs_pools(page: int, dtype: torch.dtype, budget: float, sinks: bool) -> None:
    """A prompt, decode, a chunk, drafts, decode and a mixed batch; what was freed is NaN."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    torch.manual_seed(0)
    serving = Serving(page, dtype, sinks)
    passes = [
        (ForwardMode.EXTEND, [70, 9]), (ForwardMode.DECODE, [1, 1]), (ForwardMode.EXTEND, [33, 64]),
        (ForwardMode.TARGET_VERIFY, [4, 4]), (ForwardMode.DECODE, [1, 1]), (ForwardMode.MIXED, [1, 20]),
        (ForwardMode.DRAFT_EXTEND_V2, [4, 4]), (ForwardMode.DECODE, [1, 1]),
    ]  # fmt: skip
    worst = max(serving.forward(*one) for one in passes)
    assert serving.freed[0] >= 64
    print(f"page {page}, {dtype}, sinks {sinks}: within {worst:.1e} of float64")
    assert worst <= budget


# ---- the stub of the other tests, and the sources of SGLang ----------------------------------------------------------


def releases() -> Iterator[tuple[str, Path]]:
    """The release that is installed, and the older one whose sources ``make test-sglang`` lays beside it."""
    found = find_spec("sglang")
    assert found is not None
    assert found.origin is not None
    yield "0.5.23", Path(found.origin).parents[1]
    yield "0.5.15", Path(sys.prefix) / "sglang-0.5.15"


RELEASES = dict(releases())
LATER = {"SharedReadEnds", "shared_read_ends", "is_quantized_kv_cache"}
"""What 0.5.15 does not have; the adapter asks for it where it is, or is not asked."""
READ = {
    "sglang.srt.model_executor.forward_batch_info": {
        "ForwardBatch": (
            "forward_mode", "batch_size", "input_ids", "req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc",
            "extend_seq_lens", "extend_seq_lens_cpu", "spec_info",
        ),
    },
    "sglang.srt.speculative.eagle_info": {"EagleVerifyInput": ("topk", "tree_topk", "draft_token_num")},
    "sglang.srt.speculative.ngram_info": {"NgramVerifyInput": ("tree_topk", "draft_token_num")},
    "sglang.srt.speculative.dflash_info": {"DFlashVerifyInput": ("topk", "draft_token_num")},
    "sglang.srt.model_executor.model_runner": {
        "ModelRunner": ("req_to_token_pool", "token_to_kv_pool", "model", "use_mla_backend", "model_config"),
    },
    "sglang.srt.configs.model_config": {"ModelConfig": ("is_encoder_decoder", "dtype", "hf_text_config")},
    "sglang.srt.mem_cache.memory_pool": {"ReqToTokenPool": ("req_to_token",)},
}  # fmt: skip
"""Attributes that the adapter reads, of classes that the stub has not."""
OLD_READ = READ | {
    "sglang.srt.model_executor.model_runner": {
        "ModelRunner": ("req_to_token_pool", "model", "use_mla_backend", "model_config"),
    },
    "sglang.srt.model_executor.model_runner_kv_cache_mixin": {"ModelRunnerKVCacheMixin": ("token_to_kv_pool",)},
}


class Source:
    """A module's classes, functions and names, from its text."""

    def __init__(self, path: Path) -> None:
        self.classes: dict[str, ast.ClassDef] = {}
        self.names: dict[str, ast.AST] = {}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.FunctionDef):
                self.names[node.name] = node
            elif isinstance(node, ast.Assign):
                self.names |= {x.id: node for x in node.targets if isinstance(x, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.names[node.target.id] = node
            elif isinstance(node, ast.ImportFrom):
                self.names |= {x.asname or x.name: node for x in node.names}

    def methods(self, name: str) -> dict[str, ast.FunctionDef]:
        """Of a class and its bases in this module."""
        node = self.classes[name]
        own = {x.name: x for x in node.body if isinstance(x, ast.FunctionDef)}
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                own = self.methods(base.id) | own
        return own

    def attributes(self, name: str) -> set[str]:
        """What a class declares, or assigns to self; of its bases in this module too."""
        node, found = self.classes[name], set(self.methods(name))
        for x in ast.walk(node):
            if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store) and isinstance(x.value, ast.Name):
                found.add(x.attr)
        for x in node.body:
            if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name):
                found.add(x.target.id)
            elif isinstance(x, ast.Assign):
                found |= {y.id for y in x.targets if isinstance(y, ast.Name)}
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                found |= self.attributes(base.id)
        return found


def parameters(node: ast.FunctionDef) -> list[str]:
    """Names in order, without those of ``*args`` and ``**kwargs``."""
    return [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


@pytest.mark.parametrize("release", RELEASES)
def test_the_stub_is_like_sglang(release: str) -> None:
    """Every class, function, parameter and attribute of the stub is there, and modes have its methods."""
    root = RELEASES[release]
    if not (root / "sglang").is_dir():
        pytest.skip(f"the sources of SGLang {release} are not here: make test-sglang brings them")
    older = release == "0.5.15"
    stub, later = Source(Path(sglang_stub.__file__)), LATER if older else set()
    for module, names in (sglang_stub.OLD_MODULES if older else sglang_stub.MODULES).items():
        real = Source(root / f"{module.replace('.', '/')}.py")
        for name in set(names) - later:
            if name not in stub.classes:
                assert name in real.names, f"{module}.{name}"
                continue
            public = {x for x in stub.attributes(name) if x.startswith("__") or not x.startswith("_")}
            missing = public - real.attributes(name) - later
            assert not missing, f"{module}.{name}: {missing}"
            for method, node in stub.methods(name).items():
                if method not in later and not method.startswith("_pool"):
                    theirs = parameters(real.methods(name)[method])
                    unknown = [x for x in parameters(node) if x not in theirs]
                    assert not unknown, f"{module}.{name}.{method}: {unknown}"
    for module, classes in (OLD_READ if older else READ).items():
        real = Source(root / f"{module.replace('.', '/')}.py")
        for name, attributes in classes.items():
            missing = set(attributes) - real.attributes(name)
            assert not missing, f"{module}.{name}: {missing}"


def test_the_plugin_is_found() -> None:
    """By the entry point that is installed with swath."""
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins(); "
        "from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS; "
        "from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES; "
        "assert 'swath' in ATTENTION_BACKENDS and 'swath' in ATTENTION_BACKEND_CHOICES"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
