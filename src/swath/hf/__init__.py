"""Transformers runs on swath: an attention implementation for any model, and a paged, quantised cache for generate.

import swath.hf

swath.hf.register()
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="swath")
model.generate(**inputs, past_key_values=swath.hf.PagedCache(model.config, quant="int8"))
"""

from swath.hf import versions  # noqa: F401 - first, since it says which releases work
from swath.hf.cache import PagedCache
from swath.hf.continuous import set_continuous_batching
from swath.hf.register import register

__all__ = ["PagedCache", "register", "set_continuous_batching"]
