"""Random calls of the public functions against float64, each found again by its seed.

``python -m swath.testing.fuzz --calls 1000`` draws calls over the whole contract, runs them on a backend, and judges
each by its error budget, by canaries around what may be written, and by promises such as equal bits. A finding names
its seed, and ``--seed N --calls 1`` repeats that call. A call can also be made by hand::

    from swath.testing import Case
    from swath.testing.fuzz import Call, judge

    print(judge(Call("paged_attention", Case(kv_lens=(70, 33), size=20), twists=("dead-pages",)), "cpu"))
"""

from swath.testing.fuzz.calls import call_of
from swath.testing.fuzz.draw import SIZES, Call
from swath.testing.fuzz.judge import judge
from swath.testing.fuzz.sweep import Finding, Settings, Tally, sweep
from swath.testing.fuzz.verdict import Verdict

__all__ = ["SIZES", "Call", "Finding", "Settings", "Tally", "Verdict", "call_of", "judge", "sweep"]
