"""Wrong calls of every public function, and the argument that each error must name. Also a program: see ``main``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

import swath
from swath import KVQuant, PagedKV, PageTable, Window
from swath.testing import Case, make

PAGED, DENSE = "paged_attention", "attention"
CASES = {
    PAGED: Case(),
    f"{PAGED} fp8": Case(dtype=torch.float8_e4m3fn, quant=KVQuant(torch.float8_e4m3fn, "tensor"), q_scale="token"),
    f"{PAGED} int8": Case(quant=KVQuant(torch.int8, "token")),
    f"{PAGED} ragged": Case(q_lens=(3, 0, 5), table="flat"),
    f"{PAGED} rows": Case(table="rows", unit="token"),
    DENSE: Case(q_lens=(3, 0, 5), dense=True),
}
POSITIONAL = {
    PAGED: ("q", "cache", "block_table", "seq_lens"),
    DENSE: ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    "append_kv": ("cache", "k", "v", "slot_mapping"),
    "merge_states": ("out_a", "lse_a", "out_b", "lse_b"),
    "quantise_q": ("q", "scale"),
    "slots": ("block_table", "seq_lens", "page_size"),
    "PagedKV": ("k", "v"),
    "PagedKV.empty": ("quant", "num_pages", "num_kv_heads", "page_size", "head_dim"),
    "PagedKV.from_nhd": ("k", "v"),
    "PagedKV.from_packed": ("kv",),
    "PagedKV.from_aiter": ("k", "v"),
    "PageTable": ("entries",),
    "check": ("cache", "block_table", "seq_lens"),
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
    bounds, blocked = torch.tensor([0, 2, 3, 6], dtype=torch.int32), torch.zeros(4, 2, 8, 16, 8)
    return {
        "PagedKV.empty": {"quant": KVQuant(torch.int8, "tensor"), "num_pages": 4, "num_kv_heads": 2, "page_size": 16,
                          "head_dim": 64, "k_scale": 0.5, "v_scale": torch.ones(())},
        "PagedKV.from_nhd": {"k": torch.zeros(4, 16, 2, 64), "v": torch.zeros(4, 16, 2, 64)},
        "PagedKV.from_packed": {"kv": torch.zeros(4, 16, 2, 128), "layout": "nhd"},
        "PagedKV.from_aiter": {"k": blocked, "v": torch.zeros(4, 2, 64, 16)},
        "PageTable": {"entries": table, "rows": bounds, "unit": "page"},
        "PageTable flat": {"entries": table[0], "indptr": bounds},
        "check": {"cache": cache, "block_table": table, "seq_lens": table[:, 0] + 3, "cu_seqlens_q": bounds,
                  "q_start": table[:, 1].clone(), "window": 5},
        "PagedKV": {"k": pool, "v": pool.clone(), "k_scale": torch.ones(2), "v_scale": torch.ones(())},
        "append_kv": {"cache": cache, "k": new, "v": new.clone(), "slot_mapping": torch.arange(3)},
        "slots": {"block_table": table, "seq_lens": table[:, 0].clone(), "page_size": 16, "num_tokens": 6},
        "slots ragged": {"block_table": table, "seq_lens": table[:, 0].clone(), "page_size": 16, "num_tokens": 6,
                         "cu_seqlens_q": bounds},
        "merge_states": {"out_a": out, "lse_a": lse, "out_b": out.clone(), "lse_b": lse.clone()},
        "quantise_q": {"q": new, "scale": torch.ones(())},
    }[what]  # fmt: skip


def call(what: str, arguments: dict[str, Any]) -> Any:
    """Make the call."""
    function = what.split()[0]
    rest = {name: value for name, value in arguments.items() if name not in POSITIONAL[function]}
    return attrgetter(function)(swath)(*(arguments[name] for name in POSITIONAL[function]), **rest)


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

    def complaint(self, mode: AbstractContextManager[Any] | None = None) -> str | None:
        """What is wrong with the error that the call raises, made in a dispatch mode if one is given; or None."""
        arguments, changed = right(self.what), self.of or self.name
        arguments[changed] = self.change(arguments.get(changed))
        try:
            with mode or nullcontext():
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
    yield Wrong(what, name, TypeError, "sparse", Tensor.to_sparse)
    yield Wrong(what, name, TypeError, "negated", torch._neg_view)
    if dtype is not None:
        yield Wrong(what, name, TypeError, f"{dtype}", lambda x: x.to(dtype))


def columns_first(x: Tensor) -> Tensor:
    """The same values with a last stride that is not 1."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def with_one_page(cache: PagedKV, name: str) -> PagedKV:
    """The cache with one page in the place of all of them, in one of its tensors; in k and v, if it is one of these."""
    names = ("k", "v") if name in "kv" else (name,)
    return replace(cache, **{n: getattr(cache, n)[:1].expand_as(getattr(cache, n)) for n in names})


def scoring(what: str) -> Iterator[Wrong]:
    """Arguments that both attention operators have."""
    yield from values(what, "window", TypeError, 12.5, True, (127, 0), "local")
    for counts in (torch.ones(2, dtype=torch.int32), torch.ones(3, dtype=torch.int32, device="meta")):
        window = Window(4, counts)
        why = f"{len(counts)} counts on {counts.device}"
        yield Wrong(what, "window.global_tokens", ValueError, why, lambda _, window=window: window, "window")
    yield from values(what, "scale", TypeError, "1", True, [0.1])
    yield from values(what, "scale", ValueError, 10**400, float("nan"), float("inf"), -float("inf"), 1e39, -1e-38)
    yield from values(what, "softcap", TypeError, None, "5", True)
    yield from values(what, "softcap", ValueError, -1.0, float("nan"), 1e39, 1e-300)
    yield from values(what, "sink", TypeError, 1.0, torch.zeros(4, dtype=torch.int32), torch.zeros(4).double())
    yield from values(what, "sink", ValueError, torch.zeros(3), torch.zeros(1, 4), torch.zeros(4, device="meta"))
    yield from values(what, "gqa", ValueError, "AABB", None, 0)
    yield from values(what, "q_start", TypeError, torch.zeros(3), 5)
    yield from values(what, "q_start", ValueError, torch.zeros(2, dtype=torch.int32))
    for bound in ("max_q_len", "max_kv_len"):
        yield from values(what, bound, TypeError, 2.0, True, torch.tensor(3))
        yield from values(what, bound, ValueError, -1)
    yield from values(what, "return_lse", TypeError, 1, None)
    yield from values(what, "impl", ValueError, "cuda", "", None, [])
    yield from values(what, "softmax_scale", TypeError, 1.0)
    yield from tensor(what, "out", torch.float64)
    yield Wrong(what, "out", ValueError, "shape", lambda out: out[:-1])
    yield Wrong(what, "out", ValueError, "expanded", lambda out: out[:1].expand(out.shape))
    yield Wrong(what, "out", ValueError, "requires grad", lambda out: out.clone().requires_grad_())
    yield Wrong(what, "q", TypeError, "quantised", lambda q: torch.quantize_per_tensor(q.float(), 0.1, 0, torch.qint8))
    yield Wrong(what, "q", TypeError, "nested", lambda q: torch.nested.nested_tensor(list(q), layout=torch.jagged))
    yield Wrong(what, "q", TypeError, "complex", lambda q: q.to(torch.complex64))
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
    yield from tensor(PAGED, "seq_lens", torch.int16)
    yield Wrong(PAGED, "block_table", TypeError, "int16", Tensor.short)
    yield Wrong(PAGED, "block_table", ValueError, "other batch", lambda table: table[:2])
    yield Wrong(PAGED, "block_table", ValueError, "on meta", lambda table: table.to("meta"))
    yield Wrong(PAGED, "block_table", ValueError, "one dimension", lambda table: table[0])
    yield from values(PAGED, "block_table", TypeError, None, [1, 2, 3])
    yield from values(PAGED, "compute", ValueError, "int4", None, "int8", "fast")
    yield Wrong(f"{PAGED} int8", "compute", ValueError, "int8 with token scales", lambda _: "int8")
    yield from values(PAGED, "split_size", ValueError, 0, 63, 96, -64, 2**31)
    yield from values(PAGED, "split_size", TypeError, 64.0, True, "64")
    yield from values(PAGED, "q_scale", ValueError, torch.ones(()))
    fp8, ragged, rows = f"{PAGED} fp8", f"{PAGED} ragged", f"{PAGED} rows"
    for name, changed in (("entries", "meta"), ("rows", "cpu")):

        def elsewhere(table: PageTable, name: str = name, device: str = changed) -> PageTable:
            return PageTable(table.entries.to(device), rows=table.rows.to(device)[1:], unit="token")

        yield Wrong(rows, f"block_table.{name}", ValueError, f"one fewer on {changed}", elsewhere, "block_table")
    yield from values(fp8, "q_scale", TypeError, torch.ones((), dtype=torch.bfloat16), 1.0)
    yield from values(fp8, "q_scale", ValueError, torch.ones(4), torch.ones(3), torch.ones((), device="meta"))
    yield from tensor(ragged, "cu_seqlens_q", torch.int16)
    yield Wrong(ragged, "cu_seqlens_q", ValueError, "length", lambda cu: cu[:3])
    yield Wrong(ragged, "q", ValueError, "steps too", lambda q: q[None])
    ids, indptr = "block_table.page_ids", "block_table.page_indptr"
    yield Wrong(ragged, ids, TypeError, "int16", lambda pair: (pair[0].short(), pair[1]), "block_table")
    yield Wrong(ragged, ids, ValueError, "two dimensions", lambda pair: (pair[0][None], pair[1]), "block_table")
    yield Wrong(ragged, indptr, TypeError, "int16", lambda pair: (pair[0], pair[1].short()), "block_table")
    yield Wrong(ragged, indptr, ValueError, "length", lambda pair: (pair[0], pair[1][:-1]), "block_table")
    yield Wrong(ragged, ids, ValueError, "ids on meta", lambda pair: (pair[0].to("meta"), pair[1]), "block_table")
    yield Wrong(ragged, indptr, ValueError, "indptr on meta", lambda pair: (pair[0], pair[1].to("meta")), "block_table")


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
    yield Wrong(DENSE, "v", ValueError, "wider than k", lambda v: torch.cat([v, v], -1))
    yield Wrong(DENSE, "v", ValueError, "a v_head_dim of 60", lambda v: v[..., :60])
    yield Wrong(DENSE, "v", ValueError, "an empty v_head_dim", lambda v: v[..., :0])
    yield Wrong(DENSE, "out", ValueError, "narrower than v", lambda out: out[..., :32])
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield from tensor(DENSE, name, torch.int16)
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
    yield from tensor("append_kv", "slot_mapping", torch.int16)
    yield Wrong("append_kv", "slot_mapping", ValueError, "length", lambda where: where[:2])
    yield from values("append_kv", "impl", ValueError, "cuda", None, [])
    for pool in ("k", "k_scale"):
        yield Wrong("append_kv", f"cache.{pool}", ValueError, "expanded", partial(with_one_page, name=pool), "cache")
    yield Wrong("merge_states", "out_a", TypeError, "float64", Tensor.double)
    yield from values("merge_states", "out_a", ValueError, torch.zeros(4))
    yield from values("merge_states", "out_a", TypeError, None, [1.0])
    yield from tensor("merge_states", "out_b", torch.bfloat16)
    yield Wrong("merge_states", "out_b", ValueError, "shape", lambda out: out[:2])
    for name in ("lse_a", "lse_b"):
        yield from tensor("merge_states", name, torch.bfloat16)
        yield Wrong("merge_states", name, ValueError, "shape", lambda lse: lse[:, :2])
    yield from values("merge_states", "out_b", TypeError, None)
    yield from values("merge_states", "lse_b", TypeError, None)
    yield from values("merge_states", "lse_base", ValueError, "10", 2)
    yield from values("merge_states", "dtype", TypeError, torch.int8, torch.float64)
    yield from values("merge_states", "impl", ValueError, "hopper-2")
    yield from values("quantise_q", "q", TypeError, None, torch.zeros(3, 2, 64, dtype=torch.int8))
    yield from values("quantise_q", "q", ValueError, torch.zeros(3, 64), torch.zeros(3, 2, 0), torch.zeros(3, 2, 513))
    yield Wrong("quantise_q", "q", ValueError, "last stride", columns_first)
    yield from values("quantise_q", "scale", TypeError, 0.5, torch.ones((), dtype=torch.bfloat16))
    yield from values("quantise_q", "scale", ValueError, torch.ones(3), torch.ones((), device="meta"))
    yield from values("quantise_q", "impl", ValueError, "cpu")
    yield from values("slots", "page_size", ValueError, 0, 17, 9, -16)
    yield from values("slots", "page_size", TypeError, None, 16.0)
    yield Wrong("slots", "block_table", ValueError, "on meta", lambda table: table.to("meta"))
    yield from values("slots", "num_tokens", ValueError, -3, 7)
    yield from values("slots", "num_tokens", TypeError, 6.0, True)
    yield Wrong("slots", "block_table", TypeError, "int16", Tensor.short)
    yield Wrong("slots", "block_table", ValueError, "other batch", lambda table: table[:2])
    yield from (w for w in tensor("slots", "seq_lens", torch.int16) if w.why != "on meta")
    yield from tensor("slots ragged", "cu_seqlens_q", torch.int16)
    yield Wrong("slots ragged", "cu_seqlens_q", ValueError, "length", lambda cu: cu[:-1])


def caches() -> Iterator[Wrong]:
    """``PagedKV``."""
    what = "PagedKV"
    for name in ("k", "v"):
        yield from values(what, name, TypeError, None, [1])
        yield Wrong(what, name, TypeError, "sparse", Tensor.to_sparse)
        yield Wrong(what, name, TypeError, "negated", torch._neg_view)
    yield Wrong(what, "k", TypeError, "int16", Tensor.short)
    yield Wrong(what, "k", ValueError, "three dimensions", lambda k: k[0])
    yield Wrong(what, "k", ValueError, "last stride", columns_first)
    yield Wrong(what, "v", TypeError, "other dtype than k", lambda v: v.to(torch.float8_e5m2))
    yield Wrong(what, "v", ValueError, "shape", lambda v: v[:2])
    yield Wrong(what, "v", ValueError, "wider than k", lambda v: torch.cat([v, v], -1))
    yield Wrong(what, "v", ValueError, "last stride", columns_first)
    yield Wrong(what, "v", ValueError, "on meta", lambda v: v.to("meta"))
    for name in ("k_scale", "v_scale"):
        yield from values(what, name, TypeError, torch.ones((), dtype=torch.float16), torch.ones(2).double())
        yield from values(what, name, TypeError, torch.ones(2).cfloat(), torch.ones(2).to(torch.float8_e4m3fn), "1")
        yield from values(what, name, ValueError, 0.0, -0.5, 1e300)
        yield from values(what, name, ValueError, None, torch.ones(3), torch.ones(64), torch.ones(1, 2), torch.ones(1))
        yield from values(what, name, ValueError, torch.ones(4, 16, 2), torch.ones(4, 2, 16, 64))
        yield from values(what, name, ValueError, torch.ones((), device="meta"))


def makers() -> Iterator[Wrong]:
    """Other ways to a cache, page tables, and ``check``."""
    what = "PagedKV.empty"
    yield from values(what, "quant", TypeError, "int8", None)
    for name in ("num_pages", "num_kv_heads", "head_dim"):
        yield from values(what, name, ValueError, -1)
        yield from values(what, name, TypeError, 4.0, None)
    yield from values(what, "v_head_dim", ValueError, -1, 65)
    yield from values(what, "v_head_dim", TypeError, 32.0, True)
    yield from values(what, "page_size", ValueError, 17)
    yield from values(what, "k_scale", ValueError, None, 0.0, torch.ones(2), torch.ones(1, 1, 1, 1, 1))
    yield from values(what, "k_scale", TypeError, "0.5", True)
    for what in ("PagedKV.from_nhd", "PagedKV.from_aiter"):
        for name in ("k", "v"):
            yield Wrong(what, name, TypeError, "an array", Tensor.numpy)
            yield from values(what, name, TypeError, None)
            yield Wrong(what, name, ValueError, "three dimensions", lambda x: x.flatten(2))
    yield from values("PagedKV.from_packed", "kv", TypeError, None, [1])
    yield from values("PagedKV.from_packed", "kv", ValueError, torch.zeros(4, 16, 2, 127), torch.zeros(4, 16, 2))
    yield from values("PagedKV.from_packed", "layout", ValueError, "NHD", None)
    yield from values("PagedKV.from_packed", "v_head_dim", ValueError, -1, 65)
    yield from values("PagedKV.from_packed", "v_head_dim", TypeError, 32.0)
    yield Wrong("PageTable", "entries", ValueError, "three dimensions", lambda x: x[None])
    for what, name in (("PageTable", "entries"), ("PageTable", "rows"), ("PageTable flat", "indptr")):
        yield Wrong(what, name, TypeError, "floats", Tensor.float)
        yield Wrong(what, name, TypeError, "a list", Tensor.tolist)
    yield Wrong("PageTable flat", "indptr", ValueError, "on meta", lambda x: x.to("meta"))
    yield Wrong("PageTable flat", "rows", ValueError, "too", lambda _: torch.zeros(3, dtype=torch.int32))
    yield from values("PageTable", "unit", ValueError, "slot", None)
    yield from values("check", "cache", TypeError, None)
    yield from values("check", "window", TypeError, "local")
    yield from values("check", "num_steps", TypeError, 1.0)
    for name in ("seq_lens", "cu_seqlens_q", "q_start"):
        yield from tensor("check", name, torch.float32)
    yield Wrong("check", "cu_seqlens_q", ValueError, "of another batch", lambda cu: cu[1:])
    yield Wrong("check", "q_start", ValueError, "short", lambda start: start[1:])
    yield Wrong("check", "block_table", ValueError, "of another batch", lambda table: table[1:])


WRONG = [*paged(), *scoring(PAGED), *dense(), *scoring(DENSE), *others(), *caches(), *makers()]


def main() -> int:
    """Make every call, print those that do not raise what they should, and return how many."""
    complaints = [f"{wrong}: {complaint}" for wrong in WRONG if (complaint := wrong.complaint()) is not None]
    print("\n".join([*complaints, f"{len(WRONG)} wrong calls, asserts {'on' if __debug__ else 'off'}"]))
    return len(complaints)


if __name__ == "__main__":
    sys.exit(main())
