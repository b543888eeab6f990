"""How far from float64 a result may be: its own rounding, and the rounding of the sums behind it.

For an element t of the output, in the names of ``Truth`` (oracle.py), the budget is

    u |t| + (|t| + 4 quadrature) u (1 + V) + 4 (|t| + quadrature) (score + sum) + a (4 v_norm + keys |t|) peak + rest
    score = (noise + score_size / 4) K + noise D e + 8 score_size e,   sum = (sqrt(keys) + 8) e

- ``u`` is half a unit in the last place of the 16-bit type (2^-8 bf16, 2^-11 fp16, 2^-24 for fp32), ``e`` that of
  fp32, D the products in a score.
- ``u |t|``: the result is rounded once.
- ``u (1 + V)``: p is rounded to 16 bits before the product with V; so is a V that is multiplied with token scales first
  (V is 1 then, and 0 otherwise: stored 8-bit values are exact in 16 bits). Where all p are equal, so are their errors:
  that part goes with |t|.
- ``score``: scores are sums of D products in fp32. K is 0 for an unquantised cache, otherwise a rounding before them: u
  for channel and token scales, which are multiplied into K or q, and 2^-11 (or u, if that is less) for others, where
  kernels divide q by its largest element and round it to fp16. fp8 has few mantissas, and equal ones under one scale
  have equal errors: that part goes with the score. What follows (scale, soft cap, base 2) rounds in proportion to the
  score.
- fp8 queries and keys may multiply in e4m3 (``e4m3``). Hopper's tensor cores cut every product to 13 bits of the sum so
  far, and of products of one sign all one way: by half a step of 2^-13 of the sum, which is half of it on average. So
  a score is up to D 2^-15 of itself off, and D 2^-17 (noise + score_size) is one more part of ``score``, which counts 4
  times.
- So may p and V (``p_e4m3``, and ``compute="fast"`` beside such queries). Then u is 2^-4 for p, whose last steps are
  2^-18 of the largest, where kernels multiply p with 2^8. Sums over keys are cut alike, and equal keys may come last:
  keys times 2^-14 (|t| + 4 quadrature), but no more than for ``E4M3_KEYS``. Over an int8 cache "fast" rounds q to int8.
- ``rest``: no float32 p is below 2^-126, nor an element below the smallest of its type. Where ``4 score`` is 1 or more,
  as at scores of millions, another key may have the largest score: v_norm, for any of the values may come out.
- ``sum``: sums over the keys, running rescales, the exponential.
- ``a``: p rounded in absolute steps: fp16, which holds p of a quantised cache too, has no values below 2^-24;
  ``compute="int8"`` keeps p in 127ths of the largest. There q too has 127ths of its largest element, which adds
  coarse_noise / 254 to the scores. fp32 and unquantised bf16 have no such step.
- Where keys and values are one tensor, the error of one element of q moves scores as one column of the values goes.
  ``compute="int8"`` adds 4 coarse_noise / 254 x shared / sqrt(D) there.

The roundings of many terms add in quadrature (probabilistic rounding analysis, Higham and Mary, 2019): quadrature is
the root of the sum of squares of p_j v_j, and 4 stands where a normal distribution has its standard deviations; up
to 16 terms 4 is even the worst case. So the budget shrinks with the length of the sum, as the effect of a lost key
does, where a bound on the sum of absolute values would hide it.

A kernel that casts p to bf16 before the PV product uses about a third of its budget. One that loses a key among a
thousand random ones is some ten times over it, one that loses a spiked key (making.py) far more at any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swath.quant import E4M3_KEYS, KVQuant
from swath.testing.oracle import Truth

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a unit in the last place of 1."""

_DEVIATIONS = 4.0
_INT8_STEP = 1 / 254
_FP16_STEP = 2.0**-25
_FP8_UNIT, _FP8_STEP = 2.0**-4, 2.0**-18
"""Of p in e4m3: half a unit in the last place of 1, and the smallest steps, of p times 2^8."""
_FP8_CUT = 2.0**-14
"""Of a product of e4m3 numbers that is added to a sum, half a step of 13 bits, relative to the sum."""
_SMALLEST_P = 2.0**-126


@dataclass(frozen=True)
class Arithmetic:
    """How a result was computed, as far as its error budget depends on it.

    quant: of the cache, None for dense keys. compute: as of ``paged_attention``. e4m3: queries and keys multiply in
    e4m3. p_e4m3: so do p and V, as they may under ``compute="fast"`` where these do.
    """

    quant: KVQuant | None = None
    compute: str = "float"
    e4m3: bool = False
    p_e4m3: bool = False

    @property
    def quantised(self) -> bool:
        """Whether the cache holds 8-bit values."""
        return self.quant is not None and self.quant.is_quantised

    @property
    def fast_int8(self) -> bool:
        """Whether queries may be rounded to int8."""
        return self.compute == "fast" and self.quant is not None and self.quant.dtype == torch.int8

    def rounds_p(self, keys: Tensor) -> Tensor:
        """Of which rows p may be rounded to e4m3, by the keys that they see."""
        return (keys <= E4M3_KEYS) & (self.e4m3 and self.compute == "fast") | self.p_e4m3

    def key_rounding(self, dtype: torch.dtype) -> float:
        """Of an element of K, or of q, before the products of a score, relative."""
        if self.quant is None or not self.quantised:
            return 0.0
        return UNIT[dtype] if self.quant.k in ("channel", "token") else min(UNIT[dtype], UNIT[torch.float16])


PLAIN = Arithmetic()
"""Of dense keys and 16-bit caches."""


def out_budget(truth: Truth, dtype: torch.dtype, how: Arithmetic = PLAIN) -> Tensor:
    """The largest error allowed for each element of ``out``, float64 [R, Hq, D]; ``dtype`` is out's."""
    u, e = UNIT[dtype], UNIT[torch.float32]
    t = truth.out.abs()
    e4m3 = how.rounds_p(truth.keys)[..., None]  # [R, 1, 1]
    cuts = truth.keys.clamp(max=E4M3_KEYS)[..., None] * _FP8_CUT
    rounding = torch.where(e4m3, _FP8_UNIT + cuts, u)
    if how.quant is not None and how.quant.v_granularity == "token":
        rounding += u
    rounded_p = rounding * (t + _DEVIATIONS * truth.quadrature)
    score_error = _score_error(truth, dtype, how)[..., None]
    weights = score_error + _sum_error(truth)[..., None]
    has_fp16 = dtype == torch.float16 or (how.quantised and dtype == torch.bfloat16)
    step = torch.where(e4m3, _FP8_STEP, _FP16_STEP if has_fp16 else 0.0) if how.compute != "int8" else _INT8_STEP
    steps = step * (_DEVIATIONS * truth.v_norm + truth.keys[..., None] * t) * truth.peak[..., None]
    if how.compute == "int8":
        steps += _DEVIATIONS * step * (truth.coarse_noise / truth.products.sqrt())[..., None] * truth.shared
    rest = torch.finfo(dtype).tiny * 2 * u + _SMALLEST_P * truth.keys.sqrt()[..., None] * truth.v_norm
    rest += truth.v_norm.where(_DEVIATIONS * score_error >= 1, 0.0)
    return (u + e) * t + rounded_p + _DEVIATIONS * (t + truth.quadrature) * weights + steps + rest


def lse_budget(truth: Truth, dtype: torch.dtype, how: Arithmetic = PLAIN) -> Tensor:
    """The largest error allowed for each LSE, float64 [R, Hq]; ``dtype`` is out's, the LSE itself is fp32."""
    magnitude = 1 + truth.lse.abs().where(truth.lse > -torch.inf, 0.0)
    p_error = _INT8_STEP * truth.keys * truth.peak if how.compute == "int8" else 0.0
    errors = _score_error(truth, dtype, how) + _sum_error(truth) * magnitude
    return _DEVIATIONS * errors + p_error


def _score_error(truth: Truth, dtype: torch.dtype, how: Arithmetic) -> Tensor:
    """Of one score, [R, Hq]."""
    e = UNIT[torch.float32]
    rounded_k = (truth.noise + truth.score_size / _DEVIATIONS) * how.key_rounding(dtype)
    error = rounded_k + truth.noise * truth.products * e + 8 * truth.score_size * e
    if how.e4m3:
        error += truth.products * _FP8_CUT / 2 / _DEVIATIONS * (truth.noise + truth.score_size)
    return error + truth.coarse_noise * _INT8_STEP if how.compute == "int8" or how.fast_int8 else error


def _sum_error(truth: Truth) -> Tensor:
    """Of fp32 sums over the keys and of the exponential, relative, [R, 1]."""
    return (truth.keys.sqrt() + 8) * UNIT[torch.float32]


def budget_used(out: Tensor, lse: Tensor | None, truth: Truth, how: Arithmetic = PLAIN) -> float:
    """The share of its budget that the worst element uses: at most 1 for a right kernel, inf for NaN.

    ``out`` and ``lse`` are shaped as the operator returns them; only ``truth.rows`` of them are looked at.
    """
    return max(map(_worst, _shares(out, lse, truth, how)))


def check_budget(out: Tensor, lse: Tensor | None, truth: Truth, how: Arithmetic = PLAIN) -> float:
    """``budget_used``, raising where it is above 1.

    Raises:
        AssertionError: with the worst row, head and element, and what came there.
    """
    shares = _shares(out, lse, truth, how)
    for name, got, want, share in zip(("out", "lse"), (out, lse), (truth.out, truth.lse), shares, strict=False):
        if got is not None and not _worst(share) <= 1:
            at = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
            came, over = _flat(got, want)[truth.rows][at], int((share > 1).sum())
            raise AssertionError(
                f"{name}: row {int(truth.rows[at[0]])}, head and element {at[1:]} uses {_worst(share):.3g} of its "
                f"error budget: wanted {float(want[at]):.7g}, got {float(came):.7g}; "
                f"{over} of {share.numel()} elements are over theirs"
            )
    return max(map(_worst, shares))


def _shares(out: Tensor, lse: Tensor | None, truth: Truth, how: Arithmetic) -> list[Tensor]:
    """Error over budget of each element of out and, where there is one, of the LSE."""
    shares = [_share(out, truth.rows, truth.out, out_budget(truth, out.dtype, how))]
    if lse is not None:
        shares.append(_share(lse, truth.rows, truth.lse, lse_budget(truth, out.dtype, how)))
    return shares


def _share(got: Tensor, rows: Tensor, want: Tensor, allowed: Tensor) -> Tensor:
    came = _flat(got, want)[rows].double()
    error = torch.where(came == want, 0.0, (came - want).abs())  # two infinities of one sign differ by nothing
    return torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _flat(got: Tensor, want: Tensor) -> Tensor:
    """The rows of an operator's result laid flat, as ``Truth`` counts them."""
    return got.reshape(-1, *want.shape[1:])


def _worst(share: Tensor) -> float:
    return float(share.max()) if share.numel() else 0.0
