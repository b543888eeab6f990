"""Timing on a GPU: a clean L2 before each run, CUDA graphs, and the machine's own ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

WRITE_BYTES, READ_BYTES = 256 << 20, 512 << 20


class Flush:
    """Empty the L2 cache and leave it clean.

    Writing alone leaves dirty lines, whose write-back the next kernel would pay for; reading more than the cache holds
    after it evicts them first.
    """

    def __init__(self, device: torch.device) -> None:
        self._written = torch.empty(WRITE_BYTES, dtype=torch.uint8, device=device)
        self._read = torch.zeros(READ_BYTES // 4, device=device)

    def __call__(self) -> None:
        """Flush, on the current stream."""
        self._written.zero_()
        self._read.sum()


def as_graph(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` captured in a CUDA graph; calling the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def device_us(run: Callable[[], object], rounds: int, flush: Flush | None) -> list[float]:
    """Device time of each of ``rounds`` runs in microseconds, by events around it."""
    run()
    spans = []
    for _ in range(rounds):
        if flush is not None:
            flush()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in spans]


def host_us(run: Callable[[], object], rounds: int = 200) -> float:
    """Host time of one eager call in microseconds: the median of calls that nobody waits for."""
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    times = []
    for i in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - begin))
        if i % 20 == 19:
            torch.cuda.synchronize()  # a full queue would make the host wait
    return median(times)


def read_tb_per_s(flush: Flush) -> float:
    """Read bandwidth: torch's sum over 2 GiB of float32."""
    x = torch.randn(1 << 29, device="cuda")
    return x.nbytes / min(device_us(lambda: x.sum(), 10, flush)) / 1e6


def matmul_tflop_per_s() -> float:
    """bf16 matrix product of 8192 x 8192 x 8192 on random data."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / median(device_us(lambda: a @ b, 10, None)) / 1e6
