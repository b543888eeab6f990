"""What ``swath explain`` answers: a made-up call, where it would run, and what the backends say to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from swath.checks import check_choice
from swath.cli.calls import arguments, case_of, form_of
from swath.cli.draw import spelled
from swath.cli.elsewhere import GPUS, cuda_is, interpreting, without_data
from swath.dispatch import Explanation
from swath.errors import bad_value
from swath.ops.explain import OPS, explain
from swath.quant import KVQuant, check_granularity
from swath.target import Target
from swath.testing import Case
from swath.testing.cases import DTYPES as NAMED

DTYPES = NAMED | {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
MAX_LENGTH, MAX_BATCH = 2**31 - 1, 1 << 20
"""Positions are int32; a larger batch is nothing that a server has."""


@dataclass(frozen=True)
class Answer:
    """A case in words, and what the library says to it."""

    description: dict[str, str]
    said: Explanation

    @property
    def reasons(self) -> dict[str, str]:
        """What each backend has against the call, in words."""
        words = {self.said.backend: "chosen"}
        return {name: words.get(name, why or "could run it too") for name, why in self.said.reasons.items()}

    def as_json(self) -> dict[str, Any]:
        """For programs; a reason of None: the backend can run the call."""
        said = self.said
        return {
            "op": said.op, "backend": said.backend, "launch": said.launch, "reasons": said.reasons,
            "call": self.description,
        }  # fmt: skip


def made_up(batch: int, q_len: int, kv_len: int, q_heads: int, kv_heads: int, **others: Any) -> Case:
    """A case of ``batch`` sequences alike.

    Raises:
        ValueError: naming what is too large, or heads that do not divide.
    """
    counts = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "q_heads": q_heads, "kv_heads": kv_heads}
    counts |= {name: others.get(name) or 0 for name in ("head_dim", "v_head_dim", "page_size")}
    for name, count in counts.items():
        most = MAX_BATCH if name == "batch" else MAX_LENGTH
        if count > most:
            raise bad_value(name, f"at most {most}", count)
    if q_heads % kv_heads:
        raise bad_value("q_heads", f"a multiple of the {kv_heads} kv heads", q_heads)
    return case_of(batch, q_len, kv_len, num_kv_heads=kv_heads, group=q_heads // kv_heads, **others)


def dtype_of(name: str, value: str) -> torch.dtype:
    """A dtype by its name; ``name``: the option that gave it."""
    check_choice(name, value, tuple(DTYPES))
    return DTYPES[value]


def storage(dtype: str, cache_dtype: str | None, granularity: str | None) -> KVQuant:
    """How the cache stores keys and values: 8 bits with a scale for each token and head unless said."""
    stored = dtype_of("cache_dtype", cache_dtype or dtype)
    granularity = granularity or ("token" if stored.itemsize == 1 else "none")
    check_granularity("granularity", stored, granularity)
    return KVQuant(stored, granularity)


def ask(op: str, case: Case, device: str | None, target: str | None) -> Answer:
    """Explain the call on a device that is here, or on a GPU that need not be.

    Raises:
        TypeError, ValueError: what the library says to the call, a device or GPU that is not known, or no memory for
            the tensors.
    """
    check_choice("op", op, OPS)
    if target is None:
        where = _device(device)
        args, options = _tensors(op, case, where)
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
        return Answer(_describe(op, case) | {"device": name}, explain(op, *args, **options))
    if device is not None:
        raise bad_value("target", "no --device with it", device)
    check_choice("target", target, tuple(GPUS))
    num_sms, names = GPUS[target]
    with interpreting(False), cuda_is(Target(target, num_sms)), without_data():
        args, options = _tensors(op, case, torch.device("cuda", 0))
        said = explain(op, *args, **options)
    device_name = f"{target} ({names}: {num_sms} multiprocessors), as if it were here"
    return Answer(_describe(op, case) | {"device": device_name}, said)


def _tensors(op: str, case: Case, where: torch.device) -> tuple[list[Any], dict[str, Any]]:
    try:
        return arguments(op, case, where)
    except RuntimeError as error:  # how torch says that memory is short, or a number too large
        raise bad_value("call", "tensors that torch can make here", str(error).splitlines()[0]) from error


def _device(name: str | None) -> torch.device:
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name is None:
        return torch.device(known[-1] if len(known) == 1 else known[1])
    if name == "cuda" and len(known) > 1:
        return torch.device("cuda", torch.cuda.current_device())
    if name != "cpu" and len(known) == 1:
        raise bad_value("device", "'cpu': torch sees no GPU here (--target asks about one that is not)", repr(name))
    check_choice("device", name, tuple(known))
    return torch.device(name)


def _describe(op: str, case: Case) -> dict[str, str]:
    """The case in words, as far as ``op`` looks at it."""
    q_len, kv_len, stored = case.row_counts[0], case.kv_lens[0], case.storage
    tokens = f"{case.num_seqs} x {q_len} token{'s' if q_len > 1 else ''}"
    kv_heads = f"{case.num_kv_heads} heads of {case.head_dim}"
    if case.v_dim != case.head_dim:
        kv_heads += f" (values of {case.v_dim})"
    new = f"{tokens}, {kv_heads}, {_name(case.dtype)}"
    q = f"{tokens}, {case.num_q_heads} heads of {case.head_dim}, {_name(case.dtype)}"
    keys = f"{case.num_seqs} x {kv_len} keys, {kv_heads}"
    scales = f" with {stored.k} scales" if stored.k != "none" else ""
    cache = f"{_name(stored.dtype)}{scales}, pages of {case.page_size}"
    scores = {"window": spelled(case.window)}
    if case.softcap:
        scores["softcap"] = str(case.softcap)
    if case.sink != "none":
        scores["sink"] = "a logit per query head"
    return {
        "attention": {"q": q, "k, v": keys} | scores,
        "paged_attention": {"q": f"{q} ({form_of(case)})", "k, v": keys, "cache": cache} | scores,
        "append_kv": {"k, v": new, "cache": cache},
        "quantise_q": {"q": q},
        "merge_states": {"states": q},
    }[op]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
