"""Cases, an independent float64 truth and an error budget: what the tests and the benchmarks of swath share.

A worked example::

    from swath.testing import Case, make

    inputs = make(Case(kv_lens=(1000, 77), size=128, spiked=True))
    out, lse = inputs.run(impl="cpu")
    inputs.check(out, lse)  # raises where an element is out of its error budget
"""

from swath.testing.budget import Arithmetic, budget_used, check_budget, lse_budget, out_budget
from swath.testing.cases import Case
from swath.testing.filling import make_filled, make_unset
from swath.testing.inputs import Canary, Inputs
from swath.testing.making import make, spike
from swath.testing.oracle import Truth, visible
from swath.testing.pairs import pairwise

__all__ = [
    "Arithmetic",
    "Canary",
    "Case",
    "Inputs",
    "Truth",
    "budget_used",
    "check_budget",
    "lse_budget",
    "make",
    "make_filled",
    "make_unset",
    "out_budget",
    "pairwise",
    "spike",
    "visible",
]
