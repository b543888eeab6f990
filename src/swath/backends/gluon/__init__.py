"""Parts of kernels in Gluon, Triton's lower-level sibling: pipelines in shared memory, work tiles and their scheduler.

The words are those of CUTLASS and FlashAttention-3. A kernel is persistent: each of its programs takes work tiles
(``WorkTile``: some query rows of one sequence and head) from a scheduler until none is left. Load warps are the
producers of pipelines (``Pipeline``), MMA warpgroups are the consumers.

``C`` is the one constexpr of the helpers: what the kernel is compiled for. It has the fields of the launch, and the
``Features`` of the call as ``C.F``, which helpers that are shared with Triton's kernels take.
"""
