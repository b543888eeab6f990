"""SGLang under the benchmark: its own scheduler, in a thread of this process, with dummy weights made anew.

Backends go by SGLang's names, fa3, triton and so on; swath's is "swath". The scheduler's loop runs until it asks for
requests. There it waits for the benchmark, which hands it requests or lets it go on by one step.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from swath.bench.machine import version_of
from swath.bench.serving.engine import Call, Job, Load, Logprobs
from swath.bench.serving.measure import MOST_GRAPHED, MOST_REQUESTS
from swath.bench.serving.weights import make_weights
from swath.cache import PagedKV
from swath.engines.common import nhd_cache, window_size

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What is read when SGLang is imported, unless the user says otherwise."""
CACHES = {"bf16": "auto", "fp8": "fp8_e4m3"}
"""Names of caches that SGLang has other names for."""
PAGE = 64
TOP = 5
FORKS = False
"""SGLang asks the GPU what it is when it is imported: the process of each job imports it anew."""
CLOSED = {"gpt-oss-20b": "triton"}
"""Models whose list of backends is closed: swath serves them under another's name."""
FA3, TRITON = "FlashAttentionBackend", "TritonAttnBackend"
"""Classes of SGLang's backends. In decode TRITON leaves out the oldest key of a window: it takes ``min(seq_lens,
sliding_window_size)`` keys, the query's own among them, where its prefill and all others take one more."""
Given = tuple[Any, Any, Any]
"""q, k and v of the tokens of a step, as a layer hands them to its backend."""
TWO_POOLS = ("gpt-oss-20b",)
"""Models whose windows have a pool of their own."""


def prepare() -> str:
    """Import SGLang. Its version."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import sglang.srt.managers.scheduler

    return f"sglang {sglang.__version__}"


def served(job: Job) -> Job:
    """The job as SGLang runs it: Mistral has no window there."""
    windowless = job.model.name == "mistral-7b"
    return replace(job, model=replace(job.model, window=None)) if windowless else job


def start(job: Job, load: Load) -> SglangEngine:
    """An engine for one job. The process is good for one."""
    from sglang.srt.server_args import ServerArgs

    folder = Path(tempfile.mkdtemp(prefix="swath-serve-"))
    (folder / "config.json").write_text(json.dumps(job.model.config(job.layers)), encoding="utf-8")
    args = ServerArgs(
        model_path=str(folder), skip_tokenizer_init=True, load_format="dummy", random_seed=0, log_level="warning",
        context_length=load.longest, max_running_requests=most_requests(job), chunked_prefill_size=load.prompt_len,
        max_prefill_tokens=load.prompt_len, max_total_tokens=(load.context + load.new_tokens + PAGE) * MOST_REQUESTS,
        swa_full_tokens_ratio=1.0, disable_radix_cache=True, page_size=PAGE,
        kv_cache_dtype=CACHES.get(job.cache, job.cache),
        attention_backend=registered(job), sampling_backend="pytorch", grammar_backend="none", **_platform(),
    )  # fmt: skip
    engine = SglangEngine(args)
    make_weights(engine.runner.model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the scheduler has streams of its own
    return engine


def most_requests(job: Job) -> int | None:
    """Requests at once that SGLang is told of; None: it may have thousands.

    Where it is told, and keeps no prefixes, it gives a window's pool what decode needs: of gpt-oss 60,416 tokens, 7
    prompts of 8,192, which it lets go of every 128 steps. So 64 sequences were never decoded together.
    """
    return None if job.model.name in TWO_POOLS else MOST_REQUESTS


def registered(job: Job) -> str:
    """The name under which SGLang has the job's backend, which is registered for it."""
    if job.backend != "swath":
        return job.backend
    from swath.engines.sglang import STAND_IN, register

    name = CLOSED.get(job.model.name)
    if name is not None:
        os.environ[STAND_IN] = name
    register()
    return name or "swath"


def _platform() -> dict[str, Any]:
    """CUDA graphs of decode; on a CPU there are none."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "disable_cuda_graph": True, "disable_overlap_schedule": True}
    sizes = [2**i for i in range(MOST_GRAPHED.bit_length())]
    return {"cuda_graph_bs_decode": sizes, "disable_prefill_cuda_graph": True}


def publish(args: Any) -> None:
    """Make the arguments known to what SGLang runs in this process, as newer releases want it."""
    try:
        from sglang.srt.runtime_context import SpawnRanks, publish
    except ImportError:  # 0.5.15
        return
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))


class Turns:
    """A thread that runs while another waits for it, and at no other time."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._ours, self._its = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._run = run
        threading.Thread(target=self._begin, daemon=True).start()

    def _begin(self) -> None:
        self._its.acquire()
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            self._error = error
        self._ours.release()

    def give(self) -> None:
        """Let the thread run until it gives its turn back.

        Raises:
            RuntimeError: it has ended.
        """
        self._its.release()
        self._ours.acquire()
        if self._error is not None:
            raise RuntimeError("SGLang's scheduler has ended") from self._error

    def give_back(self) -> None:
        """Called by the thread: wait for the next turn."""
        self._ours.release()
        self._its.acquire()


class SglangEngine:
    """``Scheduler`` as the benchmark sees it."""

    def __init__(self, args: Any) -> None:
        self.version = f"sglang {version_of('sglang')}"
        self._args, self._came, self._live = args, list[Any](), dict[str, Any]()
        self._seen: dict[str, int] = {}
        self._count = 0
        self._turns = Turns(self._serve)
        self._turns.give()
        graphs = args.cuda_graph_config
        self.graphs = "none" if args.disable_cuda_graph else f"decode {graphs.decode.backend}"
        self.runner = self.scheduler.tp_worker.model_runner

    def _serve(self) -> None:
        """The scheduler's life, in a thread of its own."""
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.server_args import PortArgs

        publish(self._args)
        ranks = [name for name in inspect.signature(Scheduler).parameters if name.endswith(("_rank", "_id"))]
        of_rank = {name: None if name == "dp_rank" else 0 for name in ranks}
        self.scheduler = Scheduler(self._args, PortArgs.init_new(self._args), **of_rank)
        self.scheduler.request_receiver = SimpleNamespace(recv_requests=self._receive)
        self.scheduler.output_streamer.send_to_detokenizer = SimpleNamespace(send_output=lambda *_: None)
        take = self.scheduler._add_request_to_queue

        def taken(request: Any, *others: Any, **named: Any) -> None:
            self._live[request.rid] = request
            take(request, *others, **named)

        self.scheduler._add_request_to_queue = taken
        self.scheduler.run_event_loop()

    def _receive(self, *_: object, **__: object) -> list[Any]:
        self._turns.give_back()
        came, self._came = self._came, []
        return came

    @property
    def is_busy(self) -> bool:
        """Whether requests are unfinished."""
        return bool(self._live or self._came)

    def add(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Take a request."""
        self._ask(prompt, new_tokens)

    def _ask(self, prompt: Sequence[int], new_tokens: int, **options: Any) -> str:
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
        params.normalize(None)
        self._count += 1
        name = str(self._count)
        defaults = dict(return_logprob=False, logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None)
        self._came.append(
            TokenizedGenerateReqInput(
                rid=name, input_text="", input_ids=array("q", prompt), input_embeds=None, mm_inputs=None,
                token_type_ids=None, sampling_params=params, stream=False, **defaults | options,
            )
        )  # fmt: skip
        self._seen[name] = 0
        return name

    def step(self) -> Mapping[str, int]:
        """One round of the scheduler's loop."""
        self._turns.give()
        came = {}
        for name, request in list(self._live.items()):
            came[name], self._seen[name] = len(request.output_ids) - self._seen[name], len(request.output_ids)
            if request.finished():
                del self._live[name]
        return came

    def logprobs(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Logprobs]:
        """Answers with the likeliest tokens, the chosen one first."""
        for prompt in prompts:
            self._ask(prompt, new_tokens, return_logprob=True, top_logprobs_num=TOP)
        requests: dict[str, Any] = {}
        while self.is_busy:
            self.step()
            requests |= self._live
        return [_by_token(requests[name]) for name in sorted(requests, key=int)]

    @contextmanager
    def watched(self, look: Callable[[Call], None]) -> Iterator[None]:
        """Stand between the layers and their backend."""
        backend = self.runner.attn_backend
        backend.forward = _watching(backend.forward, look, self.runner)
        try:
            yield
        finally:
            del backend.forward


def _by_token(request: Any) -> Logprobs:
    """What a finished request says of its tokens."""
    said = request.logprob
    likely = zip(said.output_top_logprobs_idx, said.output_top_logprobs_val, strict=True)
    chosen = zip(request.output_ids, said.output_token_logprobs_val, strict=True)
    return [
        {token: float(logprob)} | {int(i): float(x) for i, x in zip(*of_step, strict=True) if int(i) != token}
        for (token, logprob), of_step in zip(chosen, likely, strict=True)
    ]


def _watching(forward: Callable[..., Any], look: Callable[[Call], None], runner: Any) -> Callable[..., Any]:
    """``forward`` of a backend, followed by a look at what it did."""

    def watched(q: Any, k: Any, v: Any, layer: Any, batch: Any, *others: Any, **named: Any) -> Any:
        out = forward(q, k, v, layer, batch, *others, **named)
        look(_call(runner, layer, batch, (q, k, v), out, named.get("sinks")))
        return out

    return watched


def _call(runner: Any, layer: Any, batch: Any, given: Given, out: Any, sinks: Any) -> Call:
    """What a layer's backend was given and gave, whichever backend it is."""
    pool, requests, seq_lens = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token, batch.seq_lens
    slots = requests[batch.req_pool_indices, : int(seq_lens.max())][:, ::PAGE].long()
    new = torch.ones_like(seq_lens) if batch.extend_seq_lens is None else batch.extend_seq_lens
    q, cache = _read(runner.attn_backend, pool, layer, batch, given)
    return Call(
        q=q,
        out=out.reshape(-1, layer.tp_q_head_num, layer.v_head_dim),
        cache=cache,
        block_table=(_in_pool(pool, layer, slots) // PAGE).int(),
        seq_lens=seq_lens,
        cu_seqlens_q=torch.nn.functional.pad(new.cumsum(0), (1, 0)),
        size=window_size(layer.sliding_window_size),
        scale=layer.scaling,
        sink=sinks,
        left_out=int(_is(runner.attn_backend, TRITON) and batch.extend_seq_lens is None),
    )


def _is(backend: Any, name: str) -> bool:
    return type(backend).__name__ == name


def _in_pool(pool: Any, layer: Any, slots: Any) -> Any:
    """Slots as the layer's pool numbers them: that of windows has numbers of its own."""
    if hasattr(pool, "layers_mapping") and pool.layers_mapping[layer.layer_id][1]:
        return pool.translate_loc_from_full_to_swa(slots)
    return slots


def _read(backend: Any, pool: Any, layer: Any, batch: Any, given: Given) -> tuple[Any, PagedKV]:
    """Queries [T, Hq, D] and the cache, as the backend's kernels multiply them.

    Over a cache of e4m3 fa3 casts queries to it, without a scale, and they count as they are then, as those do that
    vLLM hands to FLASH_ATTN. triton casts them too where it reads the cache.
    """
    q, cache = given[0].reshape(-1, layer.tp_q_head_num, layer.head_dim), _cache(pool, layer)
    stored = cache.k.dtype
    if stored.itemsize > 1:
        return q, cache
    if _is(backend, TRITON) and batch.extend_seq_lens is not None:
        return _two_kinds(pool, layer, batch, q, given)
    casts = (_is(backend, FA3) and layer.head_dim <= 256) or _is(backend, TRITON)
    return (q.to(stored) if casts else q), cache


def _two_kinds(pool: Any, layer: Any, batch: Any, q: Any, given: Given) -> tuple[Any, PagedKV]:
    """What triton multiplies in prefill over e4m3: old keys with queries cast to e4m3, a step's own keys with queries.

    Its own keys and values are those that came, before they were stored. Both kinds are in one cache here: old keys in
    the first half of the channels, own ones in the second, and zeros in the other half.
    """
    stored = [x[: x.shape[0] // PAGE * PAGE] for x in pool.get_kv_buffer(layer.layer_id)]
    k, v = (
        x.float() if scale is None else x.float() * scale
        for x, scale in zip(stored, (layer.k_scale, layer.v_scale), strict=True)
    )
    new_k, new_v = (x.reshape(-1, *y.shape[1:]).float() for x, y in zip(given[1:], (k, v), strict=True))
    own = _in_pool(pool, layer, batch.out_cache_loc)
    k = torch.cat([k, torch.zeros_like(k)], -1)
    k[own] = torch.cat([torch.zeros_like(new_k), new_k], -1)
    v[own] = new_v
    return torch.cat([q.to(stored[0].dtype).float(), q.float()], -1), nhd_cache(k, v, PAGE, k.dtype)


def _cache(pool: Any, layer: Any) -> PagedKV:
    """A layer's pool of keys and values. SGLang keeps no scale where the checkpoint has none."""
    k, v = (x[: x.shape[0] // PAGE * PAGE] for x in pool.get_kv_buffer(layer.layer_id))
    if k.dtype.itemsize > 1:
        return nhd_cache(k, v, PAGE, k.dtype)
    one = torch.ones((), device=k.device)
    k_scale, v_scale = (one if x is None else x.float().reshape(()) for x in (layer.k_scale, layer.v_scale))
    return nhd_cache(k, v, PAGE, k.dtype, k_scale=k_scale, v_scale=v_scale)
