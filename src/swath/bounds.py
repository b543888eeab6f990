"""Bounds for ``Window(bounds=...)``: the masks of models and engines that are one range of keys for each query row.

All of these are tensor operations on the device of their arguments, and none waits for it. Rows stand at ``positions``,
an int32 or int64 tensor shaped as q without heads and D: [B] (decode), [B, S] (every sequence has S rows), or [T] with
``cu_seqlens_q`` [B + 1]. ``positions_of`` computes those that swath's operators have by default. Bounds come in their
dtype, with a last dimension [lo, hi).
"""

from __future__ import annotations

import torch
from torch import Tensor

from swath.checks import check_count, check_int_dtype, check_ints, check_is_tensor, check_tensor
from swath.errors import bad_value
from swath.window import LARGEST_SIZE


def positions_of(
    seq_lens: Tensor,
    num_tokens: int | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """Where query rows stand: as the last keys of their sequence, or from ``q_start`` on.

    Lengths 5 and 9 with 2 tokens each: [[3, 4], [7, 8]]. As q of 3 rows with cu_seqlens_q [0, 1, 3]: [4, 7, 8].

    Args:
        seq_lens: [B], keys of each sequence, those of the query tokens included.
        num_tokens: S for [B, S], None for [B], as decode has it; with cu_seqlens_q T, the rows of q.
        cu_seqlens_q: [B + 1]; sequence b owns rows ``cu[b] .. cu[b + 1] - 1``.
        q_start: [B], position of each sequence's first row.

    Returns:
        Positions [B], [B, S] or [T], int32 or int64 as the tensors they come from.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_ints("seq_lens", seq_lens, None, check_is_tensor("seq_lens", seq_lens).device)
    if q_start is not None:
        check_ints("q_start", q_start, seq_lens.shape[0], seq_lens.device)
    if cu_seqlens_q is None:
        steps = 1 if num_tokens is None else check_count("num_tokens", num_tokens, "an int >= 0 or None")
        first = seq_lens - steps if q_start is None else q_start
        rows = _moved(first[:, None], torch.arange(steps, dtype=first.dtype, device=first.device))
        return rows[:, 0] if num_tokens is None else rows
    count = check_count("num_tokens", num_tokens, "T, the rows of q, where there is a cu_seqlens_q")
    _check_owners(cu_seqlens_q, seq_lens.shape[0], count, seq_lens.device)
    rows = torch.arange(count, dtype=seq_lens.dtype, device=seq_lens.device)
    cu = cu_seqlens_q.clamp(0, count).to(seq_lens.dtype)
    first = seq_lens - cu.diff() if q_start is None else q_start
    owner = sequence_of(rows, cu)
    return _moved(first[owner], (rows - cu[:-1][owner]).to(first.dtype))


def sequence_of(rows: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The sequence that has each of the rows: [0, 1, 1] for the rows 0, 1, 2 with cu_seqlens_q [0, 1, 3].

    Rows past the last sequence's end count as its own. The result is int64, shaped as ``rows``.
    """
    ends = cu_seqlens_q[1:].contiguous().to(rows.dtype)
    return torch.searchsorted(ends, rows, right=True).clamp(max=max(ends.shape[0] - 1, 0))


def window(positions: Tensor, size: int) -> Tensor:
    """A causal window of ``size`` keys, the row's own included: what ``Window(size)`` shows.

    With a size of 3 the rows at 0, 1 and 5 see [0, 1), [0, 2) and [3, 6). The result is [..., 2], in the dtype of
    ``positions``.
    """
    p = _positions(positions)
    return _ranges((p - (_size(size) - 1)).clamp(min=0), _next(p))


def chunked(positions: Tensor, size: int) -> Tensor:
    """Causal attention within chunks of ``size`` positions (Llama 4).

    With a size of 4 the rows at 2, 3, 4 and 6 see [0, 3), [0, 4), [4, 5) and [4, 7). The result is [..., 2], in the
    dtype of ``positions``.
    """
    p, size = _positions(positions), _size(size)
    return _ranges(p.div(size, rounding_mode="floor") * size, _next(p))


def prefix(positions: Tensor, prefix_lens: Tensor, *, cu_seqlens_q: Tensor | None = None) -> Tensor:
    """Causal attention, but for the first keys of each sequence, which every row sees (prefix LM: PaliGemma, T5).

    With a prefix of 4 the rows at 1, 3 and 5 see [0, 4), [0, 4) and [0, 6). A prefix of 0 is causal attention, one as
    long as the sequence full attention: so a batch may have both.

    Args:
        positions: of the rows.
        prefix_lens: [B], keys of each sequence's prefix.
        cu_seqlens_q: [B + 1], where positions are [T].

    Returns:
        Bounds [..., 2], in the dtype of ``positions``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    p = _positions(positions)
    check_ints("prefix_lens", prefix_lens, None, p.device)
    end = _by_row("prefix_lens", prefix_lens.to(p.dtype), p, cu_seqlens_q)
    return _ranges(torch.zeros_like(p), torch.maximum(_next(p), end))


def blocks(
    positions: Tensor,
    spans: Tensor,
    *,
    size: int | None = None,
    whole: bool = True,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Causal attention in which the rows of a span, such as those of an image, also see all of the span.

    With one span [2, 5) the rows at 1, 2, 4 and 6 see [0, 2), [0, 5), [0, 5) and [0, 7). Under a window of 2 they see
    [0, 2), [1, 5), [2, 5) and [5, 7): the row at 4 sees key 2, which its window does not reach. With ``whole=False`` it
    sees [3, 5).

    Args:
        positions: of the rows.
        spans: [B, R, 2], the ranges [begin, end) of keys of each sequence's spans, which do not overlap; [0, 0) is no
            span.
        size: keys of a causal window; None is no window.
        whole: under a window a row sees all of its span, as in Gemma 3; False: only what lies after the window's begin,
            as in Gemma 4.
        cu_seqlens_q: [B + 1], where positions are [T].

    Returns:
        Bounds [..., 2], in the dtype of ``positions``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    p = _positions(positions)
    check_int_dtype("spans", check_tensor("spans", spans, 3, p.device))
    if spans.shape[-1] != 2:
        raise bad_value("spans", "shape [B, R, 2]", tuple(spans.shape))
    begin, end = _by_row("spans", spans.to(p.dtype), p, cu_seqlens_q).unbind(-1)  # [..., R]
    inside = (begin <= p[..., None]) & (p[..., None] < end)
    low, high = window(p, size).unbind(-1) if size is not None else (torch.zeros_like(p), _next(p))
    if spans.shape[1]:
        high = torch.maximum(high, end.where(inside, 0).amax(-1))
        if whole:
            low = torch.minimum(low, begin.where(inside, p[..., None]).amin(-1))
    return _ranges(low, high)


def shard(bounds: Tensor, rank: int, world_size: int, *, interleave: int = 1) -> Tensor:
    """Bounds over a whole context as bounds over the keys that one rank holds (decode context parallel).

    Keys are dealt out ``interleave`` at a time: key k is held by rank ``k // interleave % world_size``, and a rank's
    keys follow one another in its cache. Every rank attends to its own keys, and ``merge_states`` joins the results.

    Of 2 ranks that hold every other key, the range [3, 8) is [2, 4) to rank 0, which holds 0, 2, 4, 6, and [1, 4) to
    rank 1, which holds 1, 3, 5, 7. For lengths and counts of leading tokens there is ``own_tokens``. The result has the
    shape and dtype of ``bounds``.
    """
    check_int_dtype("bounds", check_is_tensor("bounds", bounds))
    return own_tokens(bounds, rank, world_size, interleave=interleave)


def own_tokens(count: Tensor, rank: int, world_size: int, *, interleave: int = 1) -> Tensor:
    """How many of the first ``count`` tokens of a context a rank holds; see ``shard``.

    Of 7 tokens rank 0 of 2 holds 4, and rank 1 holds 3; dealt out 2 at a time, also 4 and 3. ``count`` is an int32 or
    int64 tensor of any shape, and the result is like it.
    """
    check_int_dtype("count", check_is_tensor("count", count))
    check_count("world_size", world_size, "an int >= 1", least=1, most=LARGEST_SIZE)
    check_count("interleave", interleave, "an int >= 1", least=1, most=LARGEST_SIZE // world_size)
    check_count("rank", rank, "an int >= 0", most=world_size - 1)
    count = count.clamp(min=0)
    turn = interleave * world_size
    rounds = count.div(turn, rounding_mode="floor")
    return rounds * interleave + (count - rounds * turn - rank * interleave).clamp(0, interleave)


def _positions(positions: Tensor) -> Tensor:
    check_int_dtype("positions", check_is_tensor("positions", positions))
    if positions.dim() not in (1, 2):
        raise bad_value("positions", "shape [B], [B, S] or [T]", tuple(positions.shape))
    return positions


def _next(p: Tensor) -> Tensor:
    """p + 1; the largest of its type stays, for no key stands there."""
    return _moved(p, torch.ones_like(p))


def _moved(p: Tensor, by: Tensor) -> Tensor:
    """p + by, at most the largest of their type: rows may stand past it."""
    return torch.minimum(p, torch.iinfo(p.dtype).max - by.clamp(min=0)) + by


def _size(size: int) -> int:
    return check_count("size", size, "an int >= 1", least=1, most=LARGEST_SIZE)


def _check_owners(cu_seqlens_q: object, num_seqs: int, num_rows: int, device: torch.device) -> None:
    """Check that cu_seqlens_q is one of ``num_seqs`` sequences, and that rows have one to belong to."""
    check_ints("cu_seqlens_q", cu_seqlens_q, num_seqs + 1, device)
    if num_seqs == 0 and num_rows > 0:
        raise bad_value("cu_seqlens_q", f"a sequence or more for {num_rows} rows", "none")


def _by_row(name: str, x: Tensor, positions: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """What each sequence has, x [B, ...], for each row: [..., ...]."""
    if cu_seqlens_q is not None:
        check_tensor("positions", positions, 1)
        _check_owners(cu_seqlens_q, x.shape[0], positions.shape[0], positions.device)
        return x[sequence_of(torch.arange(positions.shape[0], device=x.device), cu_seqlens_q)]
    if x.shape[0] != positions.shape[0]:
        raise bad_value(name, f"one for each of {positions.shape[0]} sequences (or cu_seqlens_q)", tuple(x.shape))
    return x if positions.dim() == 1 else x[:, None]


def _ranges(low: Tensor, end: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(low, end), -1)
