"""Wrong calls of every public function, and the argument that each error must name. Also a program: see ``main``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import swath
from swath import KVQuant, PagedKV, Window
from swath.testing import Case, make

PAGED, DENSE = "paged_attention", "attention"
CASES = {
    PAGED: Case(),
    f"{PAGED} fp8": Case(dtype=torch.float8_e4m3fn, quant=KVQuant(torch.float8_e4m3fn, "tensor"), q_scale="token"),
    f"{PAGED} int8": Case(quant=KVQuant(torch.int8, "token")),
    f"{PAGED} ragged": Case(q_lens=(3, 0, 5), table="flat"),
    DENSE: Case(q_lens=(3, 0, 5), dense=True),
}
POSITIONAL = {
    PAGED: ("q", "cache", "block_table", "seq_lens"),
    DENSE: ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    "append_kv": ("cache", "k", "v", "slot_mapping"),
    "merge_states": ("out_a", "lse_a", "out_b", "lse_b"),
    "slots": ("block_table", "seq_lens", "page_size"),
    "PagedKV": ("k", "v"),
}


def right(what: str) -> dict[str, Any]:
    """Arguments by name of a call that works; the first word of ``what`` is the function."""
    function = what.split()[0]
    if what in CASES:
        inputs = make(CASES[what])
        out = torch.empty(inputs.q.shape, dtype=CASES[what].out_dtype)
        return dict(zip(POSITIONAL[function], inputs.args, strict=True)) | inputs.options | {"out": out}
    pool = torch.zeros(4, 2, 16, 64, dtype=torch.int8)
    token = torch.ones(4, 2, 16)
    cache = PagedKV(pool, pool.clone(), k_scale=token, v_scale=token.clone())
    new, table = torch.zeros(3, 2, 64), torch.zeros(3, 4, dtype=torch.int32)
    out, lse = torch.zeros(3, 4, 64), torch.zeros(3, 4)
    return {
        "PagedKV": {"k": pool, "v": pool.clone(), "k_scale": torch.ones(2), "v_scale": torch.ones(())},
        "append_kv": {"cache": cache, "k": new, "v": new.clone(), "slot_mapping": torch.arange(3)},
        "slots": {"block_table": table, "seq_lens": table[:, 0].clone(), "page_size": 16, "num_tokens": 6},
        "slots ragged": {"block_table": table, "seq_lens": table[:, 0].clone(), "page_size": 16, "num_tokens": 6,
                         "cu_seqlens_q": torch.tensor([0, 2, 3, 6], dtype=torch.int32)},
        "merge_states": {"out_a": out, "lse_a": lse, "out_b": out.clone(), "lse_b": lse.clone()},
    }[what]  # fmt: skip


def call(what: str, arguments: dict[str, Any]) -> Any:
    """Make the call."""
    function = what.split()[0]
    rest = {name: value for name, value in arguments.items() if name not in POSITIONAL[function]}
    return getattr(swath, function)(*(arguments[name] for name in POSITIONAL[function]), **rest)


@dataclass(frozen=True)
class Wrong:
    """A call with one argument changed, and the error that must come."""

    what: str
    name: str
    error: type[Exception]
    why: str
    change: Callable[[Any], Any]
    of: str | None = None
    """The argument that is changed, where the error names another one or a part of it."""

    def __str__(self) -> str:
        return f"{self.what}-{self.name}-{self.why}".replace(" ", "-")

    def complaint(self) -> str | None:
        """What is wrong with the error that the call raises, or None."""
        arguments, changed = right(self.what), self.of or self.name
        arguments[changed] = self.change(arguments.get(changed))
        try:
            call(self.what, arguments)
        except (TypeError, ValueError) as error:
            message = str(error)
            if (
                type(error) is not self.error
                or not message.startswith(f"{self.name}: wanted ")
                or ", got " not in message
            ):
                return f"wanted {self.error.__name__}('{self.name}: wanted ..., got ...'), got {error!r}"
            return None
        return "nothing was raised"


def values(what: str, name: str, error: type[Exception], *wrong: Any) -> Iterator[Wrong]:
    """Values that an argument cannot have."""
    for value in wrong:
        said = f"{value.dtype}{tuple(value.shape)}{value.device}" if isinstance(value, Tensor) else repr(value)
        yield Wrong(what, name, error, f"is {said}", lambda _, value=value: value)


def tensor(what: str, name: str, dtype: torch.dtype | None) -> Iterator[Wrong]:
    """What can be wrong with any tensor argument; ``dtype`` is one that it cannot have."""
    yield Wrong(what, name, TypeError, "no tensor", lambda x: x.tolist())
    yield Wrong(what, name, ValueError, "two dimensions more", lambda x: x[None, None])
    yield Wrong(what, name, ValueError, "on meta", lambda x: x.to("meta"))
    if dtype is not None:
        yield Wrong(what, name, TypeError, f"{dtype}", lambda x: x.to(dtype))


def columns_first(x: Tensor) -> Tensor:
    """The same values with a last stride that is not 1."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def scoring(what: str) -> Iterator[Wrong]:
    """Arguments that both attention operators have."""
    yield from values(what, "window", TypeError, 12.5, True, (127, 0), "local")
    for counts in (torch.ones(2, dtype=torch.int32), torch.ones(3, dtype=torch.int32, device="meta")):
        window = Window(4, counts)
        why = f"{len(counts)} counts on {counts.device}"
        yield Wrong(what, "window.global_tokens", ValueError, why, lambda _, window=window: window, "window")
    yield from values(what, "scale", TypeError, "1", True, [0.1])
    yield from values(what, "softcap", TypeError, None, "5", True)
    yield from values(what, "scale", ValueError, float("nan"), float("-inf"), 1e16, -1e-16)
    yield from values(what, "softcap", ValueError, -1.0, float("nan"), 1e16, 1e-300)
    yield from values(what, "sink", TypeError, 1.0, torch.zeros(4, dtype=torch.int32), torch.zeros(4).double())
    yield from values(what, "sink", ValueError, torch.zeros(3), torch.zeros(1, 4), torch.zeros(4, device="meta"))
    yield from values(what, "gqa", ValueError, "AABB", None, 0)
    yield from values(what, "q_start", TypeError, torch.zeros(3, dtype=torch.int64), 5)
    yield from values(what, "q_start", ValueError, torch.zeros(2, dtype=torch.int32))
    for bound in ("max_q_len", "max_kv_len"):
        yield from values(what, bound, TypeError, 2.0, True, torch.tensor(3))
        yield from values(what, bound, ValueError, -1)
    yield from values(what, "return_lse", TypeError, 1, None)
    yield from values(what, "impl", ValueError, "cuda", "", None)
    yield from tensor(what, "out", torch.float64)
    yield Wrong(what, "out", ValueError, "shape", lambda out: out[:-1])
    for name in ("q", "out"):
        yield Wrong(what, name, ValueError, "last stride", columns_first)
    yield Wrong(what, "q", ValueError, "heads that do not divide", lambda q: q[:, :3])
    yield Wrong(what, "q", ValueError, "other head_dim", lambda q: q[..., :32])
    yield Wrong(what, "q", ValueError, "requires grad", lambda q: q.clone().requires_grad_())


def paged() -> Iterator[Wrong]:
    """``paged_attention``: what it does not share with ``attention``."""
    yield from tensor(PAGED, "q", torch.float64)
    yield Wrong(PAGED, "q", TypeError, "not the cache's dtype", Tensor.half)
    yield Wrong(PAGED, "q", TypeError, "fp8 over bf16", lambda q: q.to(torch.float8_e4m3fn))
    yield Wrong(PAGED, "q", ValueError, "other batch", lambda q: q[:2])
    yield Wrong(PAGED, "cache", TypeError, "a pair", lambda cache: (cache.k, cache.v))
    yield from tensor(PAGED, "seq_lens", torch.int64)
    yield Wrong(PAGED, "block_table", TypeError, "int64", Tensor.long)
    yield Wrong(PAGED, "block_table", ValueError, "other batch", lambda table: table[:2])
    yield Wrong(PAGED, "block_table", ValueError, "on meta", lambda table: table.to("meta"))
    yield Wrong(PAGED, "block_table", ValueError, "one dimension", lambda table: table[0])
    yield from values(PAGED, "block_table", TypeError, None, [1, 2, 3])
    yield from values(PAGED, "compute", ValueError, "int4", None, "int8")
    yield Wrong(f"{PAGED} int8", "compute", ValueError, "int8 with token scales", lambda _: "int8")
    yield from values(PAGED, "split_size", ValueError, 0, 63, 96, -64)
    yield from values(PAGED, "split_size", TypeError, 64.0, True, "64")
    yield from values(PAGED, "q_scale", ValueError, torch.ones(()))
    fp8, ragged = f"{PAGED} fp8", f"{PAGED} ragged"
    yield from values(fp8, "q_scale", TypeError, torch.ones((), dtype=torch.bfloat16), 1.0)
    yield from values(fp8, "q_scale", ValueError, torch.ones(4), torch.ones(3), torch.ones((), device="meta"))
    yield from tensor(ragged, "cu_seqlens_q", torch.int64)
    yield Wrong(ragged, "cu_seqlens_q", ValueError, "length", lambda cu: cu[:3])
    yield Wrong(ragged, "q", ValueError, "steps too", lambda q: q[None])
    ids, indptr = "block_table.page_ids", "block_table.page_indptr"
    yield Wrong(ragged, ids, TypeError, "int64", lambda pair: (pair[0].long(), pair[1]), "block_table")
    yield Wrong(ragged, ids, ValueError, "two dimensions", lambda pair: (pair[0][None], pair[1]), "block_table")
    yield Wrong(ragged, indptr, TypeError, "int64", lambda pair: (pair[0], pair[1].long()), "block_table")
    yield Wrong(ragged, indptr, ValueError, "length", lambda pair: (pair[0], pair[1][:-1]), "block_table")
    yield Wrong(ragged, "block_table", ValueError, "ids on meta", lambda pair: (pair[0].to("meta"), pair[1]))
    yield Wrong(ragged, "block_table", ValueError, "indptr on meta", lambda pair: (pair[0], pair[1].to("meta")))


def dense() -> Iterator[Wrong]:
    """``attention``: what it does not share with ``paged_attention``."""
    yield Wrong(DENSE, "q", TypeError, "no tensor", Tensor.tolist)
    yield Wrong(DENSE, "q", ValueError, "four dimensions", lambda q: q[None])
    yield from values(
        DENSE, "q", TypeError, torch.zeros(8, 4, 64).to(torch.float8_e4m3fn), torch.zeros(8, 4, 64).double()
    )
    for name in ("k", "v"):
        yield from tensor(DENSE, name, torch.float16)
        yield Wrong(DENSE, name, ValueError, "last stride", columns_first)
    yield Wrong(DENSE, "v", ValueError, "shape", lambda v: v[:-1])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield from tensor(DENSE, name, torch.int64)
    yield Wrong(DENSE, "cu_seqlens_k", ValueError, "length", lambda cu: cu[:-1])
    yield Wrong(DENSE, "cu_seqlens_q", ValueError, "empty", lambda cu: cu[:0])


def others() -> Iterator[Wrong]:
    """``append_kv``, ``merge_states``, ``slots`` and ``PagedKV``."""
    yield Wrong("append_kv", "cache", TypeError, "a tensor", lambda cache: cache.k)
    for name in ("k", "v"):
        yield from tensor("append_kv", name, torch.float64)
        yield Wrong("append_kv", name, ValueError, "other heads", lambda x: x[:, :1])
        yield Wrong("append_kv", name, ValueError, "other head_dim", lambda x: x[..., :32])
        yield Wrong("append_kv", name, ValueError, "last stride", columns_first)
        yield Wrong("append_kv", name, ValueError, "requires grad", lambda x: x.clone().requires_grad_())
    yield Wrong("append_kv", "v", ValueError, "fewer tokens", lambda v: v[:2])
    yield Wrong("append_kv", "v", TypeError, "other dtype than k", Tensor.half)
    yield from tensor("append_kv", "slot_mapping", torch.int32)
    yield Wrong("append_kv", "slot_mapping", ValueError, "length", lambda where: where[:2])
    yield from values("append_kv", "impl", ValueError, "cuda", None)
    yield Wrong("merge_states", "out_a", TypeError, "float64", Tensor.double)
    yield from values("merge_states", "out_a", ValueError, torch.zeros(4))
    yield from tensor("merge_states", "out_b", torch.bfloat16)
    yield Wrong("merge_states", "out_b", ValueError, "shape", lambda out: out[:2])
    for name in ("lse_a", "lse_b"):
        yield from tensor("merge_states", name, torch.bfloat16)
        yield Wrong("merge_states", name, ValueError, "shape", lambda lse: lse[:, :2])
    yield from values("merge_states", "impl", ValueError, "hopper-2")
    yield from values("slots", "page_size", ValueError, 0, 17, 9, -16)
    yield from values("slots", "num_tokens", ValueError, -3, 7)
    yield from values("slots", "num_tokens", TypeError, 6.0, True)
    yield Wrong("slots", "block_table", TypeError, "int64", Tensor.long)
    yield Wrong("slots", "block_table", ValueError, "other batch", lambda table: table[:2])
    yield from (w for w in tensor("slots", "seq_lens", torch.int64) if w.why != "on meta")
    yield from tensor("slots ragged", "cu_seqlens_q", torch.int64)
    yield Wrong("slots ragged", "cu_seqlens_q", ValueError, "length", lambda cu: cu[:-1])


def caches() -> Iterator[Wrong]:
    """``PagedKV``."""
    what = "PagedKV"
    yield Wrong(what, "k", TypeError, "int16", Tensor.short)
    yield Wrong(what, "k", ValueError, "three dimensions", lambda k: k[0])
    yield Wrong(what, "k", ValueError, "last stride", columns_first)
    yield Wrong(what, "v", TypeError, "other dtype than k", lambda v: v.to(torch.float8_e5m2))
    yield Wrong(what, "v", ValueError, "shape", lambda v: v[:2])
    yield Wrong(what, "v", ValueError, "strides", lambda v: v.transpose(1, 2).contiguous().transpose(1, 2))
    yield Wrong(what, "v", ValueError, "on meta", lambda v: v.to("meta"))
    for name in ("k_scale", "v_scale"):
        yield from values(what, name, TypeError, torch.ones((), dtype=torch.float16), torch.ones(2).double())
        yield from values(what, name, ValueError, None, torch.ones(3), torch.ones(64), torch.ones(1, 2), torch.ones(1))
        yield from values(what, name, ValueError, torch.ones(4, 16, 2), torch.ones(4, 2, 16, 64))
        yield from values(what, name, ValueError, torch.ones((), device="meta"))


WRONG = [*paged(), *scoring(PAGED), *dense(), *scoring(DENSE), *others(), *caches()]


def main() -> int:
    """Make every call, print those that do not raise what they should, and return how many."""
    complaints = [f"{wrong}: {complaint}" for wrong in WRONG if (complaint := wrong.complaint()) is not None]
    print("\n".join([*complaints, f"{len(WRONG)} wrong calls, asserts {'on' if __debug__ else 'off'}"]))
    return len(complaints)


if __name__ == "__main__":
    sys.exit(main())
