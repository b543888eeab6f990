"""Decode steps in a CUDA graph: captured once, replayed while sequences grow, with the bits of eager calls.

On a machine without a GPU the steps run one by one, which shows the same calls.
"""

import argparse
import time

import torch

import swath

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
WINDOW = swath.Window(1024, global_tokens=4)


class Decoder:
    """The tensors of a step. A graph knows them by their addresses, so they are changed in place."""

    def __init__(self, batch: int, max_len: int, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        pages = max_len // PAGE
        self.max_len = max_len
        self.cache = swath.PagedKV.empty(torch.int8, batch * pages, KV_HEADS, PAGE, DIM, device=device)
        self.table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.q = torch.zeros(batch, HEADS, DIM, dtype=dtype, device=device)
        self.k, self.v = torch.zeros(2, batch, KV_HEADS, DIM, dtype=dtype, device=device)
        self.out = torch.empty_like(self.q)

    def step(self) -> None:
        """Take in a token of each sequence: no sync, and nothing that depends on the lengths on the host."""
        self.seq_lens += 1
        where = swath.slots(self.table, self.seq_lens, PAGE, num_tokens=len(self.q))
        swath.append_kv(self.cache, self.k, self.v, where)
        swath.paged_attention(
            self.q, self.cache, self.table, self.seq_lens, max_kv_len=self.max_len, window=WINDOW, out=self.out
        )


def run(batch: int, steps: int, device: str, captured: bool) -> tuple[torch.Tensor, float]:
    """The last output of some steps over random tokens, and seconds a step."""
    decoder, random = Decoder(batch, steps // PAGE * PAGE + PAGE, device), torch.Generator(device).manual_seed(0)
    advance = decoder.step
    if captured:
        decoder.step()  # compiles; capturing does not run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.step()
        decoder.seq_lens.zero_()
        advance = graph.replay
    start = time.perf_counter()
    for _ in range(steps):
        for x in (decoder.q, decoder.k, decoder.v):
            x.normal_(generator=random)
        advance()
    if device == "cuda":
        torch.cuda.synchronize()
    return decoder.out, (time.perf_counter() - start) / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Decode, eager and in a CUDA graph.")
    parser.add_argument("--quick", action="store_true", help="few steps of few sequences")
    batch, steps = (2, 20) if parser.parse_args().quick else (64, 2000)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager, eager_s = run(batch, steps, device, captured=False)
    print(f"eager: {eager_s * 1e6:.0f} us a step")
    if device == "cuda":
        replayed, replayed_s = run(batch, steps, device, captured=True)
        print(f"graph: {replayed_s * 1e6:.0f} us a step, same bits: {torch.equal(eager, replayed)}")
