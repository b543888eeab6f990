"""FlashAttention's three functions on swath: the same names, arguments, conventions and results.

``from swath.compat import flash_attn_func`` takes the place of ``from flash_attn import flash_attn_func``. What swath
cannot do is a ValueError that names the argument: dropout, ALiBi slopes, gradients, a given number of splits. What is
different from FlashAttention 2:

- float32 is taken too, and values that are narrower than keys. Heads have a multiple of 8 elements, at most 512; pages
  hold 1, 8 or a multiple of 16 keys.
- ``s_aux``, [Hq], is a logit for each query head that joins the softmax's denominator, as in gpt-oss. It has the name
  that vLLM's FlashAttention gives it.
- The LSE of a row that sees no key is -inf, as in FlashAttention 3. FlashAttention 2 says +inf.
- ``return_attn_probs=True`` returns (out, lse, None): the probabilities are nowhere in memory.
- ``max_seqlen_q`` and ``max_seqlen_k`` only size launches. A tensor is taken and not read, which would be a sync.
- ``deterministic`` is about gradients and has no effect.

Keys and values are read where they lie. Copied are: a ``q`` whose sequences do not follow one another in memory; q, k
and v whose last stride is not 1; the k and v of ``flash_attn_func`` whose sequences do not lie a whole number of keys
apart, the same of both. With rotary embeddings q and the new k are copied, as they change.
"""

from swath.compat.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
