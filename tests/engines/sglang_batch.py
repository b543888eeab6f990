"""A forward pass as SGLang hands it to an attention backend, made by hand: pools, tables, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from sglang_stub import model_config
from torch import Tensor, nn

from swath.pages import page_count
from swath.quant import KVQuant
from swath.testing import Arithmetic, check_budget, oracle

NUM_ROWS, CONTEXT = 9, 320
"""Of the table of requests. Row 0 is for requests that pad a captured graph."""
WINDOWED, FULL = 0, 1
"""Layer ids."""


@dataclass(frozen=True)
class Batch:
    """One pass over a model of two layers: one sees ``window`` keys, the other one all.

    mode: SGLang's. q_lens, kv_lens: of each request, its new tokens counted. two_pools: the windowed layer's keys have
    a pool of their own. softcap, sink, head_dim, v_head_dim, num_kv_heads: of both layers. kv_dtype: of the pools,
    None: as q. scales: static, of the layer. padded: tokens of no request that follow the others (prefill).
    """

    mode: str = "DECODE"
    q_lens: tuple[int, ...] = (1, 1, 1)
    kv_lens: tuple[int, ...] = (70, 33, 129)
    window: int = 24
    two_pools: bool = True
    page_size: int = 16
    softcap: float = 0.0
    sink: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    scales: bool = False
    padded: int = 0
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    v_head_dim: int = 64
    deterministic: bool = False


class Served:
    """A model's backend, its pools and what they hold."""

    def __init__(self, batch: Batch, sglang: SimpleNamespace, impl: str, device: str) -> None:
        self.batch, self.sglang, self.device = batch, sglang, device
        self.generator = torch.Generator().manual_seed(3)
        stored = batch.kv_dtype or batch.dtype
        self.pages = 2 + sum(page_count(n, batch.page_size) for n in batch.kv_lens)
        common = dict(
            page_size=batch.page_size, dtype=stored, head_num=batch.num_kv_heads, head_dim=batch.head_dim,
            v_head_dim=batch.v_head_dim, device=device, enable_memory_saver=False,
        )  # fmt: skip
        # One token more than whole pages: what is left over is no page.
        size = self.pages * batch.page_size + (batch.page_size > 1)
        if batch.two_pools:
            self.pool = sglang.SWAKVPool(
                size=size, size_swa=size - batch.page_size, swa_attention_layer_ids=[WINDOWED],
                full_attention_layer_ids=[FULL], **common,
            )  # fmt: skip
        else:
            self.pool = sglang.MHATokenToKVPool(size=size, layer_num=2, **common)
        self.layers = [
            sglang.RadixAttention(
                batch.num_heads, batch.head_dim, batch.head_dim**-0.5, batch.num_kv_heads, layer_id,
                logit_cap=batch.softcap, v_head_dim=batch.v_head_dim, sliding_window_size=size,
            )
            for layer_id, size in ((WINDOWED, batch.window - 1), (FULL, -1))
        ]  # fmt: skip
        if batch.scales:
            for layer in self.layers:
                layer.k_scale, layer.v_scale = (
                    nn.Parameter(torch.tensor(x, device=device), requires_grad=False) for x in (0.04, 0.03)
                )
        for layer_id in (WINDOWED, FULL):
            for x in (self.pool.get_key_buffer(layer_id), self.pool.get_value_buffer(layer_id)):
                x.copy_(torch.full_like(x, torch.nan, dtype=torch.float32))
        # Stale rows name slots that others have.
        self.requests = torch.randint(0, size, (NUM_ROWS, CONTEXT), generator=self.generator).int().to(device)
        self.rows = (torch.randperm(NUM_ROWS - 1, generator=self.generator)[: len(batch.kv_lens)] + 1).to(device)
        self._place()
        runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=self.requests), token_to_kv_pool=self.pool,
            sliding_window_size=batch.window - 1, model=nn.ModuleList(self.layers), use_mla_backend=False,
            model_config=model_config(batch.dtype),
        )  # fmt: skip
        self.backend = sglang.backend.SwathBackend(runner)
        self.backend.impl = impl
        self.warm, self.backend._warm = self.backend._warm, lambda layer, kept: None  # compiles for minutes

    def _place(self) -> None:
        """Give each request slots, of the window's pool only where a new token sees or is one, and free the others."""
        batch, page = self.batch, self.batch.page_size
        counts = [page_count(n, page) for n in batch.kv_lens]
        own = (torch.randperm(self.pages - 1, generator=self.generator) + 1)[: sum(counts)].split(counts)
        others = (torch.randperm(self.pages - 1, generator=self.generator) + 1)[: sum(counts)].split(counts)
        self.tables = {FULL: own, WINDOWED: others if batch.two_pools else own}
        mapping = torch.zeros((self.pages + 1) * page + (page > 1), dtype=torch.int64)  # freed: slot 0
        for b, (mine, window) in enumerate(zip(own, others, strict=True)):
            slots = (mine[:, None] * page + torch.arange(page)).flatten()
            self.requests[self.rows[b], : slots.shape[0]] = slots.int().to(self.device)
            first_seen = batch.kv_lens[b] - batch.q_lens[b] - batch.window + 1
            for number in range(max(first_seen, 0) // page, counts[b]):
                at = mine[number] * page
                mapping[at : at + page] = window[number] * page + torch.arange(page)
        if batch.two_pools:
            self.pool.register_mapping(torch.cat([mapping, torch.tensor([-1])]).to(self.device))

    def slots(self, layer_id: int, b: int) -> Tensor:
        """Where the tokens of request b are, int64 [kv_len], also those that were freed."""
        page = self.batch.page_size
        table = self.tables[layer_id][b]
        return (table[:, None] * page + torch.arange(page)).flatten()[: self.batch.kv_lens[b]].to(self.device)

    def new_slots(self) -> Tensor:
        """``out_cache_loc``: slots of all keys' pool."""
        tokens = [self.slots(FULL, b)[-n:] for b, n in enumerate(self.batch.q_lens)]
        return torch.cat([*tokens, torch.zeros(self.batch.padded, dtype=torch.int64, device=self.device)])

    def write_old(self) -> None:
        """The keys and values of earlier passes that this one sees; the others stay NaN."""
        batch = self.batch
        for layer in self.layers:
            pools = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
            for b, (kv_len, q_len) in enumerate(zip(batch.kv_lens, batch.q_lens, strict=True)):
                first = max(kv_len - q_len - batch.window + 1, 0) if layer.layer_id == WINDOWED else 0
                at = self.slots(layer.layer_id, b)[first : kv_len - q_len]
                for pool in pools:
                    x = torch.randn(len(at), *pool.shape[1:], generator=self.generator).to(self.device)
                    as_bytes = pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool
                    as_bytes[at] = (x * 20 if batch.scales else x).to(pool.dtype).view(as_bytes.dtype)

    def forward_batch(self, **changed: Any) -> Any:
        """The fields of a ``ForwardBatch`` that the backend reads."""
        batch, mode = self.batch, self.sglang.ForwardMode[self.batch.mode]
        seq_lens, spec_info = list(batch.kv_lens), None
        if mode.is_target_verify():
            seq_lens = [n - q for n, q in zip(batch.kv_lens, batch.q_lens, strict=True)]
            spec_info = SimpleNamespace(draft_token_num=batch.q_lens[0], topk=1)
        ragged = not (mode.is_target_verify() or mode.is_decode_or_idle())
        tokens = sum(batch.q_lens) + batch.padded
        fields = dict(
            forward_mode=mode, batch_size=len(seq_lens), req_pool_indices=self.rows,
            input_ids=torch.zeros(tokens, dtype=torch.int64), seq_lens=torch.tensor(seq_lens, device=self.device),
            seq_lens_cpu=torch.tensor(seq_lens), out_cache_loc=self.new_slots(), spec_info=spec_info,
            extend_seq_lens=torch.tensor(batch.q_lens, device=self.device) if ragged else None,
            extend_seq_lens_cpu=list(batch.q_lens) if ragged else None,
        )  # fmt: skip
        return SimpleNamespace(**fields | changed)

    def attend(self, forward_batch: Any, spare: int = 0) -> list[Tensor]:
        """Both layers' new keys and attention, held to float64; ``spare``: rows that pad a captured graph."""
        batch, rows = self.batch, sum(self.batch.q_lens)
        results = []
        for layer in self.layers:
            shape = rows + batch.padded + spare
            q = torch.randn(shape, batch.num_heads * batch.head_dim, generator=self.generator).to(batch.dtype)
            k, v = (
                torch.randn(shape, batch.num_kv_heads, width, generator=self.generator).to(batch.dtype)
                for width in (batch.head_dim, batch.v_head_dim)
            )
            k[rows:] = v[rows:] = torch.nan
            q, k, v = (x.to(self.device) for x in (q, k, v))
            sink = torch.randn(batch.num_heads, generator=self.generator).to(self.device, batch.dtype)
            given = {"sinks": sink} if batch.sink else {}
            out = self.backend.forward(q, k, v, layer, forward_batch, **given)
            assert out.shape == (shape, batch.num_heads * batch.v_head_dim)
            if not spare:
                assert (out[rows:] == 0).all()
            self.check(layer, q, k, v, out, sink if batch.sink else None)
            results.append(out[:rows])
        return results

    def check(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sink: Tensor | None) -> None:
        """New keys are where they belong, and every row is within its error budget."""
        batch, layer_id, rows = self.batch, layer.layer_id, sum(self.batch.q_lens)
        pools = self.pool.get_key_buffer(layer_id), self.pool.get_value_buffer(layer_id)
        at = torch.cat([self.slots(layer_id, b)[-n:] for b, n in enumerate(batch.q_lens)])
        if batch.kv_dtype is None:
            assert all(torch.equal(pool[at], x[:rows]) for pool, x in zip(pools, (k, v), strict=True))
        whole = self.pages * batch.page_size
        paged = [
            x[:whole].unflatten(0, (-1, batch.page_size)).transpose(1, 2) for x in pools
        ]  # [pages, Hkv, page_size, D]
        longest = max(map(len, self.tables[layer_id]))
        table = torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x in self.tables[layer_id]])
        truth = oracle.paged(
            q[:rows].unflatten(1, (batch.num_heads, -1)), *paged, layer.k_scale, layer.v_scale, table.to(self.device),
            torch.tensor(batch.kv_lens), cu_seqlens_q=torch.tensor([0, *accumulate(batch.q_lens)]),
            size=batch.window if layer_id == WINDOWED else None, global_tokens=0, causal=True,
            scale=batch.head_dim**-0.5, softcap=batch.softcap, sink=sink,
        )  # fmt: skip
        quant = None if batch.kv_dtype is None else KVQuant(batch.kv_dtype)
        check_budget(out[:rows].unflatten(1, (batch.num_heads, -1)), None, truth, Arithmetic(quant))
