"""Rotary embeddings as ``flash_attn_with_kvcache`` applies them, in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swath.checks import check_alike, check_tensor
from swath.errors import bad_type, bad_value


class Rotary(NamedTuple):
    """cos and sin [positions, R / 2] of the angles by which the first R elements of a head are rotated.

    interleaved: pairs are elements 0 and 1, 2 and 3, ..., and not 0 and R / 2, 1 and R / 2 + 1, ...
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn(self, x: Tensor, first: Tensor, *, advance: bool) -> Tensor:
        """x [B, S, H, D] rotated, in float32: token s of sequence b has position ``first[b] + s``.

        ``advance=False``: all of them have position ``first[b]``.
        """
        steps = torch.arange(x.shape[1] if advance else 1, device=x.device)
        at = (first.long()[:, None] + steps).clamp(0, self.cos.shape[0] - 1)  # [B, S]; beyond them no cache has slots
        c, s = (angles[at].float().unsqueeze(2) for angles in (self.cos, self.sin))  # [B, S, 1, R / 2]
        size, inner = 2 * self.cos.shape[1], 4 if self.interleaved else 3
        turned, rest = x.split([size, x.shape[3] - size], dim=3)
        a, b = turned.float().unflatten(3, (-1, 2) if self.interleaved else (2, -1)).unbind(inner)
        turned = torch.stack((a * c - b * s, a * s + b * c), inner).flatten(3)
        return torch.cat((turned.to(x.dtype), rest), 3)


def rotary_of(
    cos: Tensor | None, sin: Tensor | None, k: Tensor | None, head_dim: int, positions: int, interleaved: bool
) -> Rotary | None:
    """The rotation that arguments ask for: cos and sin are given both, or neither of them; k too if they are.

    Raises:
        TypeError, ValueError: naming ``rotary_cos``, ``rotary_sin`` or ``k``.
    """
    if cos is None and sin is None:
        return None
    cos, sin = check_tensor("rotary_cos", cos, 2), check_tensor("rotary_sin", sin, 2)
    if not cos.dtype.is_floating_point:
        raise bad_type("rotary_cos", "cosines, floating point", cos.dtype)
    check_alike("rotary_sin", sin, "rotary_cos", cos)
    check_tensor("k", k, 4, cos.device)
    if cos.shape[0] < positions or 2 * cos.shape[1] > head_dim:
        raise bad_value("rotary_cos", f"shape [{positions} or more, at most {head_dim // 2}]", tuple(cos.shape))
    return Rotary(cos, sin, interleaved)
