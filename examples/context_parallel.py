"""Decode over a context that several ranks share: each holds every other token, and the results are merged.

    python examples/context_parallel.py                          # two processes on this machine, gloo on CPUs
    torchrun --nproc-per-node 2 examples/context_parallel.py     # NCCL, where there is a GPU for each rank

Token p of a sequence is held by rank ``p % world_size``, in the order of positions. A rank appends the new tokens that
are its own, attends to its own keys, and gathers what the others found. Each rank's mask is a range of its own keys for
each query row: ``bounds.shard`` makes it from that of the whole context. The sinks are given to rank 0 alone.

Every step is compared with one pass over the whole context, which a real engine would not have.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import Tensor

import swath
from swath import bounds

HEADS, KV_HEADS, HEAD_DIM, PAGE = 8, 2, 64, 16
PROMPTS = (37, 150)
"""Tokens of each sequence before the first step."""
STEPS, TOKENS = 4, 3
"""Decode steps, and new tokens of each sequence in a step, as with speculative decoding."""
WINDOW, LEADING = 40, 4
MAX_PAGES = -(-(max(PROMPTS) + STEPS * TOKENS) // PAGE)


class Shard:
    """The keys of one rank: a paged cache like any other, with fewer tokens in it."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size = rank, world_size
        num_seqs = len(PROMPTS)
        self.cache = swath.PagedKV.empty(torch.float32, num_seqs * MAX_PAGES, KV_HEADS, PAGE, HEAD_DIM, device=device)
        pages = torch.randperm(num_seqs * MAX_PAGES, device=device)
        self.table = pages.view(num_seqs, MAX_PAGES).to(torch.int32)

    def own(self, count: Tensor) -> Tensor:
        """How many of the first ``count`` tokens of a sequence this rank holds."""
        return bounds.own_tokens(count, self.rank, self.world_size)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Store the tokens k, v [B, S, Hkv, D] at ``positions`` [B, S] that are this rank's; a slot of -1 is none."""
        index = self.own(positions)
        slot = self.table.gather(1, (index // PAGE).long()) * PAGE + index % PAGE
        mine = positions % self.world_size == self.rank
        swath.append_kv(self.cache, k.flatten(0, 1), v.flatten(0, 1), slot.where(mine, -1).flatten())

    def attend(self, q: Tensor, seq_lens: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of q [B, S, Hq, D], the last tokens of the whole sequences, over this rank's keys."""
        whole = bounds.window(bounds.positions_of(seq_lens, q.shape[1]), WINDOW)
        mine = bounds.shard(whole, self.rank, self.world_size)
        window = swath.Window(bounds=mine, global_tokens=self.own(torch.full_like(seq_lens, LEADING)))
        return swath.paged_attention(
            q, self.cache, self.table, self.own(seq_lens), window=window, sink=sink if self.rank == 0 else None,
            return_lse=True,
        )  # fmt: skip


def gather(x: Tensor) -> Tensor:
    """The tensors of all ranks, [world_size, ...]."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def steps(rank: int, world_size: int, device: torch.device) -> float:
    """All steps; the largest difference from one pass over the whole context."""
    torch.manual_seed(0)  # the same tensors on each rank
    shard, whole = Shard(rank, world_size, device), Shard(0, 1, device)
    sink, worst = torch.randn(HEADS, device=device), 0.0
    seq_lens = torch.zeros(len(PROMPTS), dtype=torch.int32, device=device)

    def grow(count: int, lengths: Tensor) -> None:
        k, v = torch.randn(2, len(PROMPTS), count, KV_HEADS, HEAD_DIM, device=device)
        positions = bounds.positions_of(lengths, count)
        for held in (shard, whole):
            held.append(k, v, positions)

    prompts = torch.tensor(PROMPTS, dtype=torch.int32, device=device)
    grow(max(PROMPTS), torch.full_like(prompts, max(PROMPTS)))  # what is past a prompt is overwritten later
    for step in range(1, STEPS + 1):
        seq_lens = prompts + step * TOKENS
        grow(TOKENS, seq_lens)
        q = torch.randn(len(PROMPTS), TOKENS, HEADS, HEAD_DIM, device=device)
        out, lse = shard.attend(q, seq_lens, sink)
        merged, merged_lse = swath.merge_states(gather(out), gather(lse))
        want, want_lse = whole.attend(q, seq_lens, sink)
        difference = torch.stack([(merged - want).abs().max(), (merged_lse - want_lse).abs().max()])
        worst = max(worst, float(difference.max()))
    return worst


def run(rank: int, world_size: int, init_method: str) -> None:
    """One process."""
    on_gpu = torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method, rank=rank, world_size=world_size)
    try:
        worst = float(gather(torch.tensor([steps(rank, world_size, device)], device=device)).max())
        if not worst < 1e-5:
            raise RuntimeError(f"{worst:.3g} off one pass over the whole context")
        if rank == 0:
            print(f"{world_size} ranks on {device.type}: {STEPS} steps, at most {worst:.2g} off one pass")
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Under torchrun one process of many; otherwise two processes on this machine."""
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        return
    with tempfile.TemporaryDirectory() as folder:
        context, store = get_context("spawn"), f"file://{folder}/store"
        ranks = [context.Process(target=run, args=(rank, 2, store)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
