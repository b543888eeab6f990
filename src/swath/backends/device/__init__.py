"""Helpers that the kernels share: small @triton.jit functions, one file per noun, named as the host files.

They take index tensors and state as arguments and never create a range or call dot, so that Triton's and Gluon's
kernels can both use them. ``F`` is the constexpr ``Features`` of the launch (see triton/features.py).

Words: a row is one query token of one head. A band is the keys that some row of a program sees, a reach those that one
row sees. ``lead`` is the count of leading tokens, ``global_tokens`` at the public door. A page is live if its number is
one of the pool's.
"""
