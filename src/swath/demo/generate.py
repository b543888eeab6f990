"""Text generation through ``model.generate``, a token at a time, as a user of Transformers would call it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swath.demo.measure import Case, full_bf16_bytes, open_cache, stored
from swath.errors import bad_value


@dataclass(frozen=True)
class Generation:
    """What was generated, how fast, and what the cache took against a 16-bit cache of every token."""

    prompt: str
    text: str
    attention: str
    kv: str
    prompt_tokens: int
    new_tokens: int
    decode_tokens_per_s: float
    peak_cache_bytes: int
    full_bf16_cache_bytes: int


class Stream:
    """A streamer for ``generate``: shows text as soon as its tokens spell whole characters, and keeps the time."""

    def __init__(self, tokenizer: Any, stop: set[int], show: Callable[[str], None]) -> None:
        self.tokenizer, self.stop, self.show = tokenizer, stop, show
        self.ids: list[int] = []
        self.times: list[float] = []
        self.prompt_tokens: int | None = None
        self.text = ""

    def put(self, ids: Tensor) -> None:
        """Take the prompt [1, N] first, then one token [1] at a time."""
        if self.prompt_tokens is None:
            self.prompt_tokens = ids.numel()
            return
        self.times.append(time.perf_counter())
        self.ids += [i for i in ids.tolist() if i not in self.stop]
        self._advance(whole=True)

    def end(self) -> None:
        """Show what was held back."""
        self._advance(whole=False)

    def _advance(self, whole: bool) -> None:
        text = self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False)
        # U+FFFD at the end is a character whose last bytes are still to come.
        if not (whole and text.endswith("\ufffd")):
            self.show(text[len(self.text) :])
            self.text = text

    def tokens_per_s(self) -> float:
        """Decode speed: the median step, so that compiling kernels in the first ones does not count."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return 1 / statistics.median(steps) if steps else 0.0


@torch.no_grad()
def generate(case: Case, tokenizer: Any, prompt: str, max_new_tokens: int, show: Callable[[str], None]) -> Generation:
    """Answer ``prompt`` greedily; ``show`` gets the text piece by piece."""
    cache = open_cache(case)
    ids = encode(tokenizer, prompt).to(case.model.device)
    if not ids.numel():
        raise bad_value("prompt", "a text of a token or more", repr(prompt))
    stream = Stream(tokenizer, _stop_ids(case.model), show)
    case.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=stream, do_sample=False,
        max_new_tokens=max_new_tokens, pad_token_id=0,
    )  # fmt: skip
    new = len(stream.times)
    full = full_bf16_bytes(case.model.config, ids.shape[1] + new)
    return Generation(
        prompt,
        stream.text,
        case.attention,
        stored(case),
        ids.shape[1],
        new,
        stream.tokens_per_s(),
        int(cache.nbytes_peak),
        full,
    )


def encode(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids [1, N]: one user turn where the model has a chat template, else the prompt as it is."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(prompt).input_ids])
    turn = [{"role": "user", "content": prompt}]
    return torch.as_tensor(
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    )


def _stop_ids(model: Any) -> set[int]:
    stop = model.generation_config.eos_token_id
    return set(stop) if isinstance(stop, (list, tuple)) else {stop}
