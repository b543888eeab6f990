"""Who computes a case: swath's backends, other libraries where they are installed, and two baselines.

One small file for each, with its window convention at the top. A file imports its library only when a case is prepared.
"""

from __future__ import annotations

from swath.bench.providers import fa3, fa4, flashinfer, flex, own, scalar, sdpa, sglang, vllm, xformers
from swath.bench.providers.provider import Provider
from swath.errors import bad_value

MODULES = (own, fa3, fa4, flashinfer, vllm, sglang, flex, sdpa, xformers, scalar)
PROVIDERS: dict[str, Provider] = {p.name: p for module in MODULES for p in module.PROVIDERS}
"""By name, swath first, baselines last."""


def choose(names: tuple[str, ...] = ()) -> tuple[Provider, ...]:
    """The providers of these names, a name being also the start of several ("swath", "sdpa"); none named: all.

    Raises:
        ValueError: no provider has this name.
    """
    chosen: dict[str, Provider] = {}
    for name in names or ("",):
        found = {n: p for n, p in PROVIDERS.items() if not name or n == name or n.startswith(f"{name}-")}
        if not found:
            raise bad_value("provider", f"one of {', '.join(PROVIDERS)}", name)
        chosen |= found
    return tuple(chosen.values())


__all__ = ["PROVIDERS", "Provider", "choose"]
