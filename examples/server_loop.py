"""Continuous batching by hand: one call of each operator a step, for prompts in chunks and for decode alike.

The model is one layer of attention with random weights; a real one has more layers between the same calls.
"""

import argparse
from collections import deque
from dataclasses import dataclass, field

import torch

import swath

HEADS, KV_HEADS, DIM, VOCABULARY, PAGE = 4, 2, 32, 100, 16
WINDOW = swath.Window(64, global_tokens=4)


@dataclass
class Request:
    """Tokens read and generated, how many are still wanted, how many are in the cache, and in which pages."""

    tokens: list[int]
    wanted: int
    cached: int = 0
    pages: list[int] = field(default_factory=list)


def serve(requests: list[Request], num_pages: int, budget: int, device: str = "cpu") -> None:
    """Generate for all requests, with at most ``budget`` query tokens a step."""
    random = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, HEADS * DIM, generator=random).to(device)
    weights = torch.randn(HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM, generator=random).to(device) / (HEADS * DIM) ** 0.5
    cache = swath.PagedKV.empty(torch.float32, num_pages, KV_HEADS, PAGE, DIM, device=device)
    free, waiting, running = list(range(num_pages)), deque(requests), []
    most = (WINDOW.size + budget) // PAGE + 3  # pages of a request at once: leading keys, window, a chunk
    if num_pages < most:
        raise ValueError(f"num_pages: wanted {most} or more, got {num_pages}")

    while waiting or running:
        while waiting and (len(running) + 1) * most <= num_pages:
            running.append(waiting.popleft())
        batch, left = [], budget
        for r in running:  # one token of those that decode; of the others as much of the prompt as the budget allows
            count = min(len(r.tokens) - r.cached, left)
            if count:
                r.pages += [free.pop() for _ in range(-(-(r.cached + count) // PAGE) - len(r.pages))]
                batch.append((r, count))
                left -= count

        new = torch.tensor([t for r, n in batch for t in r.tokens[r.cached : r.cached + n]], device=device)
        cu_seqlens_q = torch.tensor([0, *(n for _, n in batch)], device=device).cumsum(0)
        seq_lens = torch.tensor([r.cached + n for r, n in batch], device=device)
        rows = [torch.tensor(r.pages, device=device) for r, _ in batch]
        table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        q, k, v = (embedding[new] @ weights).unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        swath.append_kv(cache, k, v, swath.slots(table, seq_lens, PAGE, num_tokens=len(new), cu_seqlens_q=cu_seqlens_q))
        options = {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max(n for _, n in batch), "window": WINDOW}
        out = swath.paged_attention(q, cache, table, seq_lens, **options)
        chosen = (out.flatten(1) @ embedding.T)[cu_seqlens_q[1:] - 1].argmax(1).tolist()

        for (r, count), token in zip(batch, chosen, strict=True):
            r.cached += count
            if r.cached == len(r.tokens):  # all was read, so the next token is known
                r.tokens.append(token)
                r.wanted -= 1
            behind = range(1, max(r.cached - WINDOW.size, 0) // PAGE) if r.wanted else range(len(r.pages))
            free += [r.pages[i] for i in behind if r.pages[i] >= 0]  # no later query sees them
            r.pages = [-1 if i in behind else page for i, page in enumerate(r.pages)]
        running = [r for r in running if r.wanted]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve random prompts.")
    parser.add_argument("--quick", action="store_true", help="few short ones")
    count, length = (4, 60) if parser.parse_args().quick else (32, 1000)
    served = [Request(torch.randint(VOCABULARY, (length + 7 * i,)).tolist(), 10 + i) for i in range(count)]
    serve(served, 16 * count, 64, "cuda" if torch.cuda.is_available() else "cpu")
    print(*(f"request {i}: {r.tokens[-10:]}" for i, r in enumerate(served)), sep="\n")
