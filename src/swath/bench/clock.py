"""Timing: a clean L2 before each run, CUDA graphs, the host's share, and the machine's own ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from swath.backends.triton.features import FUSED

Run = Callable[[], Tensor]

WRITE_BYTES, READ_BYTES = 256 << 20, 512 << 20
SMALL_BYTES = 1 << 30
READ_BLOCK = 8192
"""Elements that a program of the plain read takes: enough loads at once to hide their latency."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached on plain work: reading, copying (bytes read plus bytes written), a matrix product."""

    read_tb_per_s: float
    copy_tb_per_s: float
    matmul_tflop_per_s: float


class CpuClock:
    """Wall time of the host. Sizes for the ceilings: a matrix product of ``matmul_size``, ``stream_bytes`` moved."""

    matmul_size = 1024
    stream_bytes = 64 << 20
    pause_s = 0.0

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.device = torch.device(device)
        n = self.matmul_size
        self._a, self._b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        self._stream, self._copied = (torch.rand(self.stream_bytes // 4, device=device) for _ in range(2))

    def times_us(self, run: Run, count: int) -> list[float]:
        """Times of ``count`` runs."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - begin))
        return times

    def ceilings(self) -> Ceilings:
        """Measured now: the best of three for bytes, the median of three for the product, which heat moves."""
        read_us = min(self.times_us(lambda: self._stream.sum(), 3))
        copy_us = min(self.times_us(lambda: self._copied.copy_(self._stream), 3))
        matmul_us = median(self.times_us(lambda: self._a @ self._b, 3))
        return Ceilings(
            self._stream.nbytes / read_us / 1e6,
            2 * self._stream.nbytes / copy_us / 1e6,
            2 * self.matmul_size**3 / matmul_us / 1e6,
        )

    def extra_bytes(self, run: Run) -> int | None:
        """Memory that one call takes on top of its result; None where it is not counted."""
        del run
        return None

    def plain_read(self, nbytes: int) -> Run | None:
        """A call that reads ``nbytes`` in a stream and does little else; None where that says nothing."""
        del nbytes
        return None

    def pause(self) -> None:
        """Let the machine settle between providers."""


class GpuClock(CpuClock):
    """Device time by events, the L2 emptied and left clean before each run.

    Writing alone leaves dirty lines, whose write-back the next kernel would pay for; reading more than the cache holds
    after it evicts them first.
    """

    matmul_size = 8192
    stream_bytes = 2 << 30
    pause_s = 0.05

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(torch.bfloat16, device)
        self._written = torch.empty(WRITE_BYTES, dtype=torch.uint8, device=device)
        self._read = torch.zeros(READ_BYTES // 4, device=device)

    def flush(self) -> None:
        """Empty the L2, on the current stream."""
        self._written.zero_()
        self._read.sum()

    def times_us(self, run: Run, count: int) -> list[float]:
        """Device times of ``count`` runs, by events around each."""
        spans = []
        for _ in range(count):
            self.flush()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize(self.device)
        return [1e3 * begin.elapsed_time(end) for begin, end in spans]

    def extra_bytes(self, run: Run) -> int | None:
        """The peak of allocated memory during one call, less what was there before and what of it stays: the result."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        out = run()
        torch.cuda.synchronize(self.device)
        stays = torch.cuda.memory_allocated(self.device) - before
        del out
        return torch.cuda.max_memory_allocated(self.device) - before - stays

    def plain_read(self, nbytes: int) -> Run | None:
        """As a CUDA graph, for at most ``SMALL_BYTES``."""
        if nbytes > SMALL_BYTES:
            return None
        from swath.bench.stream_kernel import read_kernel

        x = torch.ones(nbytes // 4, device=self.device)
        blocks = -(-x.numel() // READ_BLOCK)
        sums = torch.empty(blocks, device=self.device)

        def run() -> Tensor:
            read_kernel[(blocks,)](x, sums, x.numel(), BLOCK=READ_BLOCK, num_warps=8, **FUSED)
            return sums

        return capture(run)

    def pause(self) -> None:
        """Wait for the device, then let it cool for a moment."""
        torch.cuda.synchronize(self.device)
        time.sleep(self.pause_s)


@dataclass(frozen=True)
class Graph:
    """A call captured in a CUDA graph: calling it replays, ``out`` is where its result appears."""

    graph: torch.cuda.CUDAGraph
    out: Tensor

    def __call__(self) -> Tensor:
        """Replay."""
        self.graph.replay()
        return self.out


def capture(run: Run) -> Graph:
    """``run`` in a CUDA graph, after one warm-up beside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return Graph(graph, out)


def host_us(run: Run, rounds: int = 200) -> float:
    """Host time of one eager call in microseconds: the median of calls without a wait."""
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
