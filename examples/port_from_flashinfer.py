"""FlashInfer's two wrappers for paged caches, with ``plan`` and ``run``, on swath: what a port has to say."""

import argparse
import math

import torch

import swath


class BatchPrefillWithPagedKVCacheWrapper:
    """Prefill, chunked prefill and mixed batches. The workspace is not needed."""

    def __init__(self, workspace: torch.Tensor | None = None, kv_layout: str = "NHD") -> None:
        del workspace
        self.kv_layout = kv_layout

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal=False, window_left=-1, logits_soft_cap=None, sm_scale=None,
    ):  # fmt: skip
        """Keep the arguments; head counts and sizes are read from the tensors."""
        del num_qo_heads, num_kv_heads, head_dim_qk
        self.table = paged_kv_indices, paged_kv_indptr
        self.seq_lens = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
        self.options = {
            "cu_seqlens_q": qo_indptr,
            "window": swath.Window.from_flash(window_left, -1, causal=causal),
            "scale": sm_scale,
            "softcap": logits_soft_cap or 0.0,
        }

    def run(self, q, paged_kv_cache, *, k_scale=None, v_scale=None, out=None, return_lse=False):
        """q [tokens, Hq, D]; the cache is a pair, or one tensor [num_pages, 2, ...]. Its LSE is to base 2."""
        k, v = paged_kv_cache if isinstance(paged_kv_cache, tuple) else paged_kv_cache.unbind(1)
        view = swath.PagedKV.from_nhd if self.kv_layout == "NHD" else swath.PagedKV
        cache = view(k, v, k_scale=k_scale, v_scale=v_scale)
        options = {**self.options, "out": out, "return_lse": return_lse}
        made = swath.paged_attention(q, cache, self.table, self.seq_lens, **options)
        return (made[0], made[1] / math.log(2)) if return_lse else made


class BatchDecodeWithPagedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Decode: one query token a sequence, q [B, Hq, D]."""

    def plan(self, indptr, indices, last_page_len, *sizes, **options):
        """As above, without bounds of queries."""
        super().plan(None, indptr, indices, last_page_len, *sizes, causal=True, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Decode through the wrapper, and compare with plain torch.")
    parser.add_argument("--quick", action="store_true", help="short sequences")
    pages = 4 if parser.parse_args().quick else 200
    indptr, last_page_len = torch.tensor([0, pages, 2 * pages]), torch.tensor([16, 3])
    indices, kv_cache = torch.randperm(2 * pages), torch.randn(2 * pages, 2, 16, 2, 64)
    q = torch.randn(2, 8, 64)

    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    wrapper.plan(indptr, indices, last_page_len, 8, 2, 64, 16, window_left=127)
    out = wrapper.run(q, kv_cache)
    for b, last in enumerate(last_page_len.tolist()):
        k, v = kv_cache[indices[indptr[b] : indptr[b + 1]]].transpose(0, 1).flatten(1, 2)[:, : (pages - 1) * 16 + last]
        k, v = (x[-128:].repeat_interleave(4, 1) for x in (k, v))
        p = torch.einsum("hd,nhd->hn", q[b] / 8, k).softmax(1)
        print(f"sequence {b}: largest difference {(torch.einsum('hn,nhd->hd', p, v) - out[b]).abs().max():.1e}")
