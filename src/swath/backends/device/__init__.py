"""The kernel vocabulary: small @triton.jit helpers, one file per noun, named as the host files.

Helpers take index tensors and state as arguments and never create a range or call dot, so that Triton and Gluon
kernels share them. ``F`` is the constexpr ``Features`` of the launch (see features.py).
"""
