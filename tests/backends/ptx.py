"""The PTX of every pair of kernel options as digests: equal before and after a refactor of kernels. Needs no GPU.

    PYTHONPATH=src:tests:tests/backends python tests/backends/ptx.py sm_90 > before.txt
    ...
    PYTHONPATH=src:tests:tests/backends python tests/backends/ptx.py sm_90 | diff before.txt -

Comments, line marks, labels and the kernel's name do not count. A line has the variant's number, how many lines of PTX
it has, their digest, and the options that need it.
"""

from __future__ import annotations

import hashlib
import re
import sys

from compile_variants import paired_variants, stand_on


def digest(ptx: str, name: str) -> tuple[int, str]:
    """How many lines of code there are, and their digest."""
    code = re.sub(r"//.*|^\s*\.(loc|file).*|\$L__\w+:?", "", ptx.split(".section")[0], flags=re.MULTILINE)
    lines = [line.strip() for line in code.replace(name, "kernel").splitlines() if line.strip()]
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def main(arch: str) -> None:
    """Print the variants of an NVIDIA target; ptxas does not run."""
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda *_: b""
    stand_on(arch)
    for number, (_, row, call, operands) in enumerate(paired_variants(arch)):
        ptx = call.compile(operands).asm["ptx"]
        print(number, *digest(ptx, call.kernel.fn.__name__), " | ".join(row.values()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
