"""How cases are named, for wherever names are shown."""

from __future__ import annotations

KEY = {
    "B64 8k p16": "64 sequences of 8,192 keys each (k is 1,024), over pages of 16",
    "w1024, w1024+64": "a window of 1,024 keys, the query's own included; and 64 leading keys as well",
    "2k at 16k, 769+511": "2,048 query tokens at the end of 16,384 keys; 769 after 511 that are cached",
    "4 steps": "four query tokens of each sequence",
    "24/8, D96": "24 query heads over 8 kv heads of 96; 32/8 of 128 unless said",
    "int8 channel, fp8 e4m3": "how the cache is stored, and what a scale belongs to; 16 bits unless said",
    "full": "no window",
    "llama, mistral, gemma, gpt-oss": "prefill with the heads and the window of these models",
    "laguna, step, muse ...": "windowed layers of models of 2026, by their heads",
    "images, chunks": "bounds of rows: images of 256 tokens that see each other, chunks of 8,192 (Llama 4)",
    "stream": "prefill under a window of 1,024 and 64 leading keys",
    "8-bit 8k": "a call over pages whose cache is bf16, int8 (a scale a channel) or fp8 (a scale a head)",
    "int8 products, fast": '`compute="int8"` and `compute="fast"`',
    "fp8 q, fp8 q made": "fp8 queries under a static scale, given or made of bf16 ones within the time",
    "ragged, mixed, sweep": "lengths that differ; chunks of prefill among decodes; one number varied, for the plots",
    "000a, 000b": "mojo_opset's shapes under a window with leading tokens: decode, and prefill over int8",
    "001, 002": "mojo_opset's prefill over int8 without a window, and its n-step decode under one",
    "003": "aiter's shapes of paged decode",
    "004 N8192 S127": "SGLang's ragged table: its N, and its window S, without the query's own key; -1 is no window",
}
"""Parts of names and what they stand for."""

IN_SHORT = (
    "In names of cases B64 is 64 sequences, 8k the keys of each, p16 pages of 16 tokens, w1024 a window of 1,024 keys,"
    " and 2k at 16k 2,048 query tokens at the end of 16,384 keys; others are prefills in the shape of a model."
)
"""The same in a sentence, for where plots stand alone."""
