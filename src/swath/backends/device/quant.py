"""Stored values on the device: decoding to dot operands, encoding on append, and where scales fold.

The folding table is in swath/quant.py; this is its device twin. 8-bit values become float16 exactly, so that 8-bit
caches multiply in float16: query rows are divided by their largest magnitude, which becomes a factor of the scores, and
V's token scales are taken relative to the largest of their tile.

On NVIDIA two neighbouring 8-bit values of a row are read as one unit of 16 bits, a "pair". A 32-bit register of a dot
operand then holds (key k: columns 2d, 2d + 1; key k + 1: the same columns), and three or four instructions make two
float16 operands of it: one of the even columns, one of the odd ones. The int8 trick is the well-known one of LLM
dequantisation kernels: the byte becomes the low mantissa of 1024 or so.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_EVEN = tl.constexpr(
    "{ .reg .b32 t, c; lop3.b32 t, $1, 0x00ff00ff, 0x64806480, 0x6a; mov.b32 c, 0x64806480; sub.rn.f16x2 $0, t, c; }"
)
INT8_ODD = tl.constexpr(
    "{ .reg .b32 t, c; shr.b32 t, $1, 8; lop3.b32 t, t, 0x00ff00ff, 0x64806480, 0x6a; mov.b32 c, 0x64806480; "
    "sub.rn.f16x2 $0, t, c; }"
)
E4M3_EVEN = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 l, h; prmt.b32 t, $1, 0, 0x4420; mov.b32 {l, h}, t; cvt.rn.f16x2.e4m3x2 $0, l; }"
)
E4M3_ODD = tl.constexpr(
    "{ .reg .b32 t; .reg .b16 l, h; prmt.b32 t, $1, 0, 0x4431; mov.b32 {l, h}, t; cvt.rn.f16x2.e4m3x2 $0, l; }"
)
E5M2_EVEN = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 8; and.b32 $0, t, 0xff00ff00; }")
E5M2_ODD = tl.constexpr("{ and.b32 $0, $1, 0xff00ff00; }")


@triton.jit
def unpack_pair(x, ODD: tl.constexpr, F: tl.constexpr):
    """The even or the odd columns of pairs ``x`` as float16."""
    even: tl.constexpr = INT8_EVEN if F.stored == "int8" else E4M3_EVEN if F.stored == "e4m3" else E5M2_EVEN
    odd: tl.constexpr = INT8_ODD if F.stored == "int8" else E4M3_ODD if F.stored == "e4m3" else E5M2_ODD
    code: tl.constexpr = odd if ODD else even
    return tl.inline_asm_elementwise(code, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def decode_e4m3(x):
    """Bytes of float8_e4m3fn to float16 by bit moves, which every target has; exact, NaN stays NaN."""
    bits = x.to(tl.uint8, bitcast=True).to(tl.int16)
    magnitude = bits & 0x7F
    value = ((magnitude << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def decode_e5m2(x):
    """Bytes of float8_e5m2 to float16: they are its upper bytes."""
    return (x.to(tl.uint8, bitcast=True).to(tl.int16) << 8).to(tl.float16, bitcast=True)


@triton.jit
def decode(x, F: tl.constexpr):
    """Stored values as a dot operand: float16 for 8-bit values (float32 under float32 queries), else as they are."""
    value = x
    if F.stored == "e4m3":
        value = decode_e4m3(x)
    elif F.stored == "e5m2":
        value = decode_e5m2(x)
    elif F.stored == "int8" and not F.compute_int8:
        value = x.to(tl.float16)
    return value.to(tl.float32) if F.fp32 else value


@triton.jit
def unit_rows(q, divisor, F: tl.constexpr):
    """Query rows over an 8-bit cache as dot operands: divided by plus or minus their largest magnitude, in 127ths for
    int8, in which rows without a finite divisor are 0."""
    if F.compute_int8:
        return int8_rows(q, divisor)
    else:
        return (q / divisor[:, None]).to(tl.float16)


@triton.jit
def int8_rows(x, divisor):
    """Rows x [M, N] over divisors [M] in 127ths, rounded half to even, in few instructions an element: a product, not a
    division, and the integer is what adding 1.5 * 2^23 leaves in the lowest byte.

    ``lift``: without it the reciprocal of the smallest divisors would be infinite.
    """
    lift = tl.where(tl.abs(divisor) < 2.0**-60, 2.0**64, 1.0)
    inverse = 127.0 / (divisor * lift)
    bits = (x * lift[:, None] * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where((tl.abs(divisor) < float("inf"))[:, None], bits, 0).to(tl.int8)


@triton.jit
def head_scale(scale, head, OF_V: tl.constexpr, F: tl.constexpr):
    """K's (or V's) tensor or head scale as a float32 factor; 1 for the granularities that fold elsewhere."""
    fold: tl.constexpr = F.v_fold if OF_V else F.k_fold
    if fold == "tensor":
        return tl.load(scale).to(tl.float32)
    elif fold == "head":
        return tl.load(scale + head).to(tl.float32)
    else:
        return 1.0


@triton.jit
def sign_of(scale):
    """-1, 0, 1, or NaN: what of a scale a 16-bit copy of stored keys takes up."""
    sign = tl.where(scale < 0, -1.0, tl.where(scale == 0, 0.0, 1.0))
    return tl.where(scale == scale, sign, scale)


SMALLEST_FACTOR = tl.constexpr(2.0**-126)
"""Of scores that are all 0, or that a scale makes so: a factor may not be 0, for masked scores are -inf."""


@triton.jit
def score_factor(scale_log2, k_scale, head, F: tl.constexpr):
    """The score scale of 16-bit tiles: over a copy of 8-bit keys with K's tensor or head scale, whose sign is in the
    copy."""
    if F.k_fold == "tensor" or F.k_fold == "head":
        return tl.maximum(scale_log2 * tl.abs(head_scale(k_scale, head, False, F)), SMALLEST_FACTOR)
    else:
        return scale_log2


@triton.jit
def scale_values(acc, v_scale, head, column, F: tl.constexpr):
    """Accumulators or results [M, N] of the columns ``column`` of V, with its scale: all but a token scale.

    ``v_scale`` begins with the first column of the launch, which may have a part of V's (``Features.v_parts``).
    """
    if F.v_fold == "channel":
        dim: tl.constexpr = F.v_head_dim * F.v_parts
        return acc * channel_scale(v_scale, head, column, dim, column < F.v_head_dim)[None, :]
    else:
        return acc * head_scale(v_scale, head, True, F)


@triton.jit
def channel_scale(scale, head, column, dim, live):
    """A channel scale [Hkv, D] at the ``column`` indices of one head; 0 where not ``live``."""
    return tl.load(scale + head * dim + column, mask=live, other=0.0).to(tl.float32)


SMALLEST_SCALE = tl.constexpr(2.0**-126)
"""Of a token: as in swath/quant.py. V's scales are relative to that at least, for it has a reciprocal in float32."""


@triton.jit
def relative(scale):
    """A tile's V token scales relative to the largest of them, and that largest (SMALLEST_SCALE at least)."""
    largest = tl.maximum(tl.max(tl.abs(scale), 0), SMALLEST_SCALE)
    return scale * (1.0 / largest), largest


@triton.jit
def round_half_even(x):
    """Nearest integer of |x| < 2^22 in float32: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """float32 to the byte of an 8-bit float: round half to even, saturated, any NaN the positive one. By bits, on every
    target."""
    dropped: tl.constexpr = 23 - MANTISSA
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + ((bits >> dropped) & 1) + ((1 << (dropped - 1)) - 1)
    normal = (rounded >> dropped) - ((127 - BIAS) << MANTISSA)
    subnormal = round_half_even(magnitude * (2.0 ** (BIAS - 1 + MANTISSA))).to(tl.int32)
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    code = code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit
def key_of_column(column):
    """The key in a column of V in e4m3, whose keys lie side by side: within 16 in the order in which a thread of wgmma
    that computed scores has them, so that p becomes an operand without an exchange."""
    return column // 16 * 16 + column // 2 % 2 * 8 + column // 4 % 4 * 2 + column % 2


TO_E4M3 = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
    "mov.b32 $0, {low, high}; }"
)
"""Four floats to bytes: half to even, saturated, any NaN the positive one, as ``encode_fp8`` does it."""


@triton.jit
def encode_e4m3(x, HARDWARE: tl.constexpr):
    """float32 to bytes of float8_e4m3fn, by an instruction where the target has one (``Target.has_pairs``)."""
    if HARDWARE:
        return tl.inline_asm_elementwise(TO_E4M3, "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return encode_fp8(x, 3, 7, 448.0)


@triton.jit
def own_scale(largest, LARGEST: tl.constexpr):
    """The scale of rows by their largest magnitude, infinite for NaN: 1 for zeros, NaN for infinity, as ``token_scale``
    of swath/quant.py."""
    own = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST_SCALE)
    own = tl.where(largest < float("inf"), own, float("nan"))
    return tl.where(largest != 0, own, 1.0)


@triton.jit
def encode(x, F: tl.constexpr, HARDWARE: tl.constexpr):
    """float32 values, scale divided out, as stored: int8 clamped to +-127 and 0 for NaN, fp8 as bytes, other types as
    they are. ``HARDWARE``: see ``encode_e4m3``."""
    if F.stored == "int8":
        x = tl.where(x == x, x, 0.0)
        return round_half_even(tl.minimum(tl.maximum(x, -127.0), 127.0)).to(tl.int8)
    elif F.stored == "e4m3":
        return encode_e4m3(x, HARDWARE)
    elif F.stored == "e5m2":
        return encode_fp8(x, 2, 15, 57344.0)
    else:
        return x
