"""The public functions, one a file, and their way to a backend, eager (operator.py) or traced (torch_ops.py).

Importing this package puts all of them into ``torch.ops.swath``.
"""

from swath.ops import append, attention, check, explain, merge, paged, quantise, slots

__all__ = ["append", "attention", "check", "explain", "merge", "paged", "quantise", "slots"]
