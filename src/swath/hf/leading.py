"""Leading tokens that stay right before the window, however far the text has gone: positions inside the cache.

StreamingLLM (Xiao et al., 2023) counts the positions of the keys it keeps: leading tokens at ``0 .. g - 1``, the window
behind them, and a query never later than ``W + g - 1``. The keys in our cache are rotated to their positions in the
text. Rotary scores depend on the distance alone, so the window needs nothing; a query that stands further back is
turned back for the leading keys. Stored keys stay as they are, which is exact for each query, also over 8-bit caches
and in prefill.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from swath.cache import PagedKV
from swath.hf.attention import Scoring
from swath.hf.pages import Pass
from swath.hf.rotary import Rotary
from swath.ops.merge import merge_states
from swath.ops.paged import paged_attention
from swath.pages import page_count
from swath.window import Window


def leaves_leading(window: Window) -> bool:
    """Whether queries leave leading keys behind that they still see."""
    return window.size is not None and not isinstance(window.global_tokens, Tensor) and window.global_tokens > 0


def held_keys(window: Window) -> int:
    """The keys that a query sees where it has left the leading ones behind; up to here all have their places."""
    return cast(int, window.size) + cast(int, window.global_tokens)


def attend_near(
    q: Tensor, store: PagedKV, p: Pass, window: Window, rotary: Rotary, scoring: Scoring, impl: str
) -> Tensor:
    """Attention of one pass, q [B, T, Hq, D] to [B, T, Hq, Dv], with the leading keys right before the window.

    Each row sees the keys that ``window`` shows it. Those in its window have their places in the text; the others are
    leading keys, and have the places that StreamingLLM gives them.
    """
    size, leading = cast(int, window.size), cast(int, window.global_tokens)
    q_start = p.seq_lens - q.shape[1]
    position = q_start[:, None] + torch.arange(q.shape[1], device=q.device)  # [B, T]
    near = rotary.turn_back(q, (position - (held_keys(window) - 1)).clamp(min=0))
    # The leading keys that a row's window does not reach are those up to its position less the size: causal rows that
    # stand so much earlier. Sinks count once, in the other part.
    without_sink: Any = {**scoring, "sink": None}
    lead, lead_lse = paged_attention(
        near, store, p.block_table[:, : page_count(leading, store.page_size)], p.seq_lens.clamp(max=leading),
        max_kv_len=leading, window=Window(), q_start=q_start - size, return_lse=True, impl=impl, **without_sink,
    )  # fmt: skip
    out, lse = paged_attention(
        q, store, p.block_table, p.seq_lens, max_kv_len=p.max_kv_len, window=Window(size), return_lse=True,
        impl=impl, **scoring,
    )  # fmt: skip
    return merge_states(lead, lead_lse, out, lse)[0]
