"""``paged_attention``: decode, n-step decode, chunked prefill and mixed batches over a paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from swath import checks
from swath.cache import PagedKeys, PagedKV
from swath.errors import bad_type, bad_value
from swath.ops import arguments
from swath.ops.attention import AttentionOperator, AttentionOptions, defaults_of
from swath.ops.operator import Operands, Options, Stages, spelled_out
from swath.ops.signature import coarse
from swath.pages import BlockTable, PageTable
from swath.problem import Accepted, Outputs, Problem, make_outputs
from swath.quant import LARGEST

if TYPE_CHECKING:
    from typing_extensions import Unpack

SPLIT_STEP, LARGEST_SPLIT = 64, 1 << 30


class PagedOptions(AttentionOptions, total=False):
    """The options of ``paged_attention``, which says what they mean."""

    cu_seqlens_q: Tensor | None
    q_scale: Tensor | None
    compute: str
    split_size: int | None


DEFAULTS = defaults_of(PagedOptions)


@overload
def paged_attention(
    q: Tensor, cache: PagedKV, block_table: BlockTable, seq_lens: Tensor, *,
    return_lse: Literal[False] = False, impl: str = "auto", **options: Unpack[PagedOptions],
) -> Tensor: ...  # fmt: skip
@overload
def paged_attention(
    q: Tensor, cache: PagedKV, block_table: BlockTable, seq_lens: Tensor, *,
    return_lse: Literal[True], impl: str = "auto", **options: Unpack[PagedOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def paged_attention(
    q: Tensor, cache: PagedKV, block_table: BlockTable, seq_lens: Tensor, *,
    return_lse: bool, impl: str = "auto", **options: Unpack[PagedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@spelled_out(PagedOptions, DEFAULTS)
def paged_attention(
    q: Tensor,
    cache: PagedKV,
    block_table: BlockTable,
    seq_lens: Tensor,
    *,
    return_lse: bool = False,
    impl: str = "auto",
    **options: Unpack[PagedOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query tokens over the paged keys of their sequence, the query tokens' own keys included.

    Args:
        q: [B, Hq, D] (decode), [B, S, Hq, D] (n-step decode), or [T, Hq, D] with ``cu_seqlens_q`` (chunked
            prefill, decode and mixed batches). bf16, fp16, fp32, or float8_e4m3fn over an int8 or fp8 cache. Any
            strides with the last one 1. An unquantised cache has q's dtype.
        cache: keys [.., D] and values [.., Dv], new tokens already appended (see ``append_kv``).
        block_table: [B, max_pages], flat ``(page_ids [N], page_indptr [B + 1])``, or a PageTable, which may also hold
            rows of a larger table or slots of tokens. Entries outside the pool (freed pages, -1) are never followed;
            their keys are not visible. All tables, lengths and positions are int32 or int64.
        seq_lens: [B], keys of each sequence; negative counts as 0.
        cu_seqlens_q: [B + 1]; sequence b owns query rows ``cu[b] .. cu[b + 1] - 1``.
        max_q_len, max_kv_len: host bounds of the lengths, for launch and scratch only; None: what the shapes allow.
        window: which keys a query sees (see ``Window``); an int n is ``Window(n)``, None is full causal attention.
        scale: multiplies q . k; None is ``D ** -0.5``.
        q_scale: fp32 scale of fp8 queries, [] or as q without D; None is 1.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 or inf is none.
        sink: [Hq] logits, bf16, fp16 or fp32, that join the softmax's denominator and nothing else (gpt-oss).
        gqa: "grouped" (kv head = q head // group) or "interleaved" (kv head = q head % Hkv).
        q_start: [B], position of each sequence's first query; None: the queries are the last keys.
        out: as q with rows of Dv (bf16 for fp8 queries), to write into; rows past ``cu_seqlens_q[-1]`` stay untouched.
            It may be q itself, and shares no memory with other arguments.
        return_lse: also return the log of the softmax denominator: natural log, fp32, as q without D.
        compute: "float"; "int8" to multiply in int8 (int8 cache with tensor, head or channel scales); "fast" to let
            scores, and under short windows p and values, multiply in 8 bits where that is faster, at errors of up to
            some percent (8-bit cache).
        split_size: a multiple of 64: cut the keys at its multiples, so that no bit of a row depends on the batch.
        impl: "auto" or the backend to use.

    Returns:
        out, as q with rows of Dv, or (out, lse). A row that sees no key is 0 and its LSE -inf (the sink logit with
        sinks).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    made: Tensor | tuple[Tensor, Tensor] = PAGED_ATTENTION(
        (q, cache, block_table, seq_lens), {"return_lse": return_lse, **options}, impl
    )
    return made


def _outputs(accepted: Accepted, operands: Operands, options: Options) -> Outputs:
    """Where the results of a call go that looks like an accepted one."""
    q, cache, _, _ = operands
    out = options.get("out")
    if type(out) is Tensor and type(cache.k) is Tensor and cache.holds(out):  # addresses are in no signature
        raise bad_value("out", "memory that is not the cache's", "a view of its pool")
    return make_outputs(q, accepted.v_head_dim, options)


def _case(accepted: Accepted, operands: Operands, options: Options, outputs: Outputs) -> Problem:
    q, cache, block_table, seq_lens = operands
    return accepted.problem(q, PagedKeys(cache, PageTable.of(block_table), seq_lens), options, outputs)


def prepare(q: Tensor, cache: PagedKV, block_table: BlockTable, seq_lens: Tensor, **options: Any) -> Problem:
    """Check the arguments of ``paged_attention`` (see there) and make its outputs."""
    return STAGES.prepare((q, cache, block_table, seq_lens), options)


def _check(q: Tensor, cache: PagedKV, block_table: Any, seq_lens: Tensor, **options: Any) -> Accepted:
    """Every check of a call whose signature was not met before."""
    arguments.check_names(options, DEFAULTS, "paged_attention")
    options = DEFAULTS | options
    if not isinstance(cache, PagedKV):
        raise bad_type("cache", "a PagedKV", type(cache).__name__)
    cu_seqlens_q = options["cu_seqlens_q"]
    checks.check_tensor("q", q, 3 if cu_seqlens_q is not None or getattr(q, "ndim", 3) != 4 else 4, cache.k.device)
    checks.check_ints("seq_lens", seq_lens, None, q.device)
    num_seqs = seq_lens.shape[0]
    _check_queries(q, options["q_scale"], cache, num_seqs, cu_seqlens_q)
    table = PageTable.checked(block_table, num_seqs, q.device)
    values = arguments.check_options(q, cache.v_head_dim, num_seqs, options)
    values |= {"compute": options["compute"], "split_size": options["split_size"]}
    _check_compute(options["compute"], cache)
    _check_split_size(options["split_size"])
    written = {"sink": options["sink"], "out": options["out"]}
    checks.check_no_grad(q=q, k=cache.k, v=cache.v, k_scale=cache.k_scale, v_scale=cache.v_scale, **written)
    most = q.shape[0] if cu_seqlens_q is not None else q.shape[1] if q.dim() == 4 else 1
    values["max_q_len"] = checks.check_bound("max_q_len", options["max_q_len"], most)
    capacity = table.max_pages(cache.page_size) * cache.page_size
    values["max_kv_len"] = checks.check_bound("max_kv_len", coarse(options["max_kv_len"]), capacity)
    return Accepted(values, cache.v_head_dim)


def _check_queries(
    q: Tensor, q_scale: Tensor | None, cache: PagedKV, num_seqs: int, cu_seqlens_q: Tensor | None
) -> None:
    checks.check_rows("q", q)
    quantised = cache.k.dtype in LARGEST
    if q.dtype == torch.float8_e4m3fn:
        if not quantised:
            raise bad_type("q", f"the cache's dtype {cache.k.dtype}; fp8 queries need an int8 or fp8 cache", q.dtype)
    elif q.dtype not in arguments.Q_DTYPES:
        raise bad_type("q", "bfloat16, float16, float32 or float8_e4m3fn", q.dtype)
    elif not quantised and q.dtype != cache.k.dtype:
        raise bad_type("q", f"the unquantised cache's dtype {cache.k.dtype}", q.dtype)
    arguments.check_heads(q, cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
    if cu_seqlens_q is not None:
        checks.check_ints("cu_seqlens_q", cu_seqlens_q, num_seqs + 1, q.device)
    elif q.shape[0] != num_seqs:
        raise bad_value("q", f"shape [{num_seqs}, ...], as seq_lens (or cu_seqlens_q)", tuple(q.shape))
    _check_q_scale(q, q_scale)


def _check_q_scale(q: Tensor, q_scale: Tensor | None) -> None:
    if q_scale is None:
        return
    if q.dtype != torch.float8_e4m3fn:
        raise bad_value("q_scale", f"None for {q.dtype} queries", "a tensor")
    if checks.check_is_tensor("q_scale", q_scale).dtype != torch.float32:
        raise bad_type("q_scale", "float32", q_scale.dtype)
    if q_scale.dim() and q_scale.shape != q.shape[:-1]:
        raise bad_value("q_scale", f"shape [] or {tuple(q.shape[:-1])}", tuple(q_scale.shape))
    if q_scale.device != q.device:
        raise bad_value("q_scale", f"a tensor on {q.device}, as q", q_scale.device)


def _check_compute(compute: str, cache: PagedKV) -> None:
    checks.check_choice("compute", compute, arguments.COMPUTES)
    if compute == "int8" and (cache.k.dtype != torch.int8 or "token" in (cache.quant.k, cache.quant.v_granularity)):
        came = f"{cache.k.dtype} with {cache.quant.k!r} and {cache.quant.v_granularity!r} scales"
        raise bad_value("compute", "'float', or an int8 cache with tensor, head or channel scales for 'int8'", came)
    if compute == "fast" and cache.k.dtype not in LARGEST:
        raise bad_value("compute", "'float', or an 8-bit cache for 'fast'", cache.k.dtype)


def _check_split_size(split_size: int | None) -> None:
    if split_size is None:
        return
    checks.check_int("split_size", split_size, "an int or None")
    if not SPLIT_STEP <= split_size <= LARGEST_SPLIT or split_size % SPLIT_STEP:
        raise bad_value("split_size", f"a multiple of {SPLIT_STEP}, at most {LARGEST_SPLIT}", split_size)


OPERANDS = {"q": Tensor, "cache": PagedKV, "block_table": BlockTable, "seq_lens": Tensor}
STAGES = Stages(_check, _outputs, _case)
PAGED_ATTENTION = AttentionOperator("paged_attention", prepare, STAGES, OPERANDS, PagedOptions)
