"""The operators as ``torch.library`` ops, for torch.compile, torch.export and dispatch modes.

A schema holds tensors and plain values only, so ``Window``, ``PagedKV`` and page tables are taken apart here and
built again inside. Eager calls do not pass here: the dispatcher would cost them several microseconds each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from swath.cache import PagedKV, locate_slots
from swath.checks import output_dtype
from swath.ops.append import call as append_call
from swath.ops.attention import call as attention_call
from swath.ops.merge import call as merge_call
from swath.ops.paged import call as paged_call
from swath.window import Window

_BOUNDS = "SymInt? max_q_len, SymInt? max_kv_len"
_WINDOW = "int? size, int global_tokens, Tensor? global_tokens_per_seq, bool causal, int? max_global_tokens"
_SCORING = "float? scale, float softcap, Tensor? sink, str gqa, Tensor? q_start"
_DENSE = f"Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, {_BOUNDS}, {_WINDOW}, {_SCORING}"
_PAGED = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor block_table, Tensor? page_indptr, "
    f"Tensor seq_lens, *, Tensor? cu_seqlens_q, {_BOUNDS}, {_WINDOW}, {_SCORING}, Tensor? q_scale, str compute, "
    "int? split_size"
)
_RESULT = "bool return_lse, str impl"

_lib = torch.library.Library("swath", "DEF")
_lib.define(f"attention({_DENSE}, {_RESULT}) -> (Tensor out, Tensor lse)")
_lib.define(f"attention.out({_DENSE}, {_RESULT}, Tensor(a!) out) -> Tensor")
_lib.define(f"paged_attention({_PAGED}, {_RESULT}) -> (Tensor out, Tensor lse)")
_lib.define(f"paged_attention.out({_PAGED}, {_RESULT}, Tensor(a!) out) -> Tensor")
_lib.define(
    "append_kv(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor k, Tensor v, "
    "Tensor slot_mapping, str impl) -> ()"
)
_lib.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str impl) -> (Tensor, Tensor)")
_lib.define(
    "slots(Tensor block_table, Tensor? page_indptr, Tensor seq_lens, int page_size, SymInt num_tokens, "
    "Tensor? cu_seqlens_q) -> Tensor"
)


def must_dispatch(*operands: object) -> bool:
    """Whether somebody watches the call: tracing, a dispatch mode (fake tensors among them), a tensor subclass.

    Or nothing but shapes is asked for: all operands are on "meta". Operands may be of any type (a PagedKV stands for
    its K): what cannot be one is for the checks to name.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    all_meta = None
    for x in operands:
        x = x.k if isinstance(x, PagedKV) else x
        if isinstance(x, Tensor):
            if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                return True
            all_meta = x.is_meta and all_meta is not False
    return bool(all_meta)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """``swath.attention`` through the dispatcher."""
    ops = torch.ops.swath.attention
    return _call(ops, (q, k, v, cu_seqlens_q, cu_seqlens_k), options)


def paged_attention(
    q: Tensor, cache: PagedKV, block_table: Tensor | Sequence[Tensor], seq_lens: Tensor, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """``swath.paged_attention`` through the dispatcher."""
    operands = (q, cache.k, cache.v, cache.k_scale, cache.v_scale, *_flat_table(block_table), seq_lens)
    return _call(torch.ops.swath.paged_attention, operands, options)


def append_kv(cache: PagedKV, k: Tensor, v: Tensor, slot_mapping: Tensor, impl: str) -> None:
    """``swath.append_kv`` through the dispatcher."""
    torch.ops.swath.append_kv(cache.k, cache.v, cache.k_scale, cache.v_scale, k, v, slot_mapping, impl)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """``swath.merge_states`` through the dispatcher."""
    out, lse = torch.ops.swath.merge_states(out_a, lse_a, out_b, lse_b, impl)
    return out, lse


def slots(
    block_table: Tensor | Sequence[Tensor],
    seq_lens: Tensor,
    page_size: int,
    *,
    num_tokens: int,
    cu_seqlens_q: Tensor | None,
) -> Tensor:
    """``swath.slots`` through the dispatcher."""
    table, indptr = _flat_table(block_table)
    placed: Tensor = torch.ops.swath.slots(table, indptr, seq_lens, page_size, num_tokens, cu_seqlens_q)
    return placed


def _call(op: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    window = options.pop("window") or Window()
    per_seq = isinstance(window.global_tokens, Tensor)
    options |= {
        "size": window.size,
        "global_tokens": 0 if per_seq else window.global_tokens,
        "global_tokens_per_seq": window.global_tokens if per_seq else None,
        "causal": window.causal,
        "max_global_tokens": window.max_global_tokens,
    }
    out = options.pop("out")
    if out is None:
        out, lse = op.default(*operands, **options)
    else:
        lse = op.out(*operands, **options, out=out)
    return (out, lse) if options["return_lse"] else out


def _flat_table(block_table: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return (block_table, None) if isinstance(block_table, Tensor) else (block_table[0], block_table[1])


def _table(entries: Tensor, indptr: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return entries if indptr is None else (entries, indptr)


def _with_window(options: dict[str, Any]) -> dict[str, Any]:
    per_seq, count = options.pop("global_tokens_per_seq"), options.pop("global_tokens")
    g = count if per_seq is None else per_seq
    options["window"] = Window(options.pop("size"), g, options.pop("causal"), options.pop("max_global_tokens"))
    return options


def _out_and_lse(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A schema's results are fixed: an LSE nobody asked for is an empty tensor."""
    return (result, result.new_empty(0, dtype=torch.float32)) if isinstance(result, Tensor) else result


def _run_attention(*operands: Any, impl: str, **options: Any) -> tuple[Tensor, Tensor]:
    problem = attention_call.prepare(*operands, **_with_window(options))
    return _out_and_lse(attention_call.execute(problem, impl))


def _run_paged(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, entries: Tensor,
    indptr: Tensor | None, seq_lens: Tensor, *, impl: str, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cache = PagedKV(k, v, k_scale=k_scale, v_scale=v_scale)
    problem = paged_call.prepare(q, cache, _table(entries, indptr), seq_lens, **_with_window(options))
    return _out_and_lse(paged_call.execute(problem, impl))


def _run_append(
    cache_k: Tensor, cache_v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, k: Tensor, v: Tensor,
    slot_mapping: Tensor, impl: str,
) -> None:  # fmt: skip
    cache = PagedKV(cache_k, cache_v, k_scale=k_scale, v_scale=v_scale)
    append_call.execute(append_call.prepare(cache, k, v, slot_mapping), impl)


def _run_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return merge_call.execute(merge_call.prepare(out_a, lse_a, out_b, lse_b), impl)


def _run_slots(
    entries: Tensor, indptr: Tensor | None, seq_lens: Tensor, page_size: int, num_tokens: int, cu: Tensor | None
) -> Tensor:
    return locate_slots(_table(entries, indptr), seq_lens, page_size, num_tokens, cu)


def _fake_attention(q: Tensor, *_: Any, return_lse: bool, **__: Any) -> tuple[Tensor, Tensor]:
    lse_shape = q.shape[:-1] if return_lse else (0,)
    return q.new_empty(q.shape, dtype=output_dtype(q)), q.new_empty(lse_shape, dtype=torch.float32)


def _register(name: str, run: Any, fake: Any) -> None:
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"swath::{name}", fake, lib=_lib)


for _name, _run in (("attention", _run_attention), ("paged_attention", _run_paged)):
    _register(_name, _run, _fake_attention)
    _register(f"{_name}.out", lambda *a, _run=_run, **o: _run(*a, **o)[1], lambda *a, **o: _fake_attention(*a, **o)[1])
_register("append_kv", _run_append, lambda *_: None)
_register("merge_states", _run_merge, lambda a, lse_a, *_: (a.new_empty(a.shape), lse_a.new_empty(lse_a.shape)))
_register("slots", _run_slots, lambda t, i, lens, size, n, cu: lens.new_empty((n,), dtype=torch.int64))
