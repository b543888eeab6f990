"""Functions of these folders in processes of their own, because Triton keeps one active driver.

They are forked from one process that has imported torch and Triton: that takes longer than many kernels do to compile.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from conftest import python_environment

HERE = Path(__file__).parent
OUT, ERR = "out", "err"


def printed(module: str, function: str, *args: str) -> str:
    """What a function without parameters prints, with ``args`` as the command line.

    Raises:
        AssertionError: it raises; with the end of its traceback.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as folder:
        print(json.dumps([folder, module, function, args]), file=server.stdin, flush=True)
        status = server.stdout.readline()
        out, err = (path.read_text() if path.exists() else "" for path in (Path(folder, OUT), Path(folder, ERR)))
    assert status == "0\n", err[-2000:]
    return out


@cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one."""
    environment = python_environment()
    environment["PYTHONPATH"] += f":{HERE}:{HERE.parent}:{HERE.parent / 'ops'}"
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", "import own_process; own_process.serve()"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.communicate)
    return server


def serve() -> None:
    """Fork for each line of the input, and say how it ended. Nothing here may start a thread: forks have none."""
    from triton.runtime.jit import JITFunction

    import_module("compile_variants")  # what most of them need
    # Triton parses a device function anew for every set of types that it is called with. And nothing that is imported
    # becomes garbage: it need not be looked through for some.
    JITFunction.parse = cache(JITFunction.parse)
    gc.freeze()
    gc.set_threshold(100_000)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _call(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _call(folder: str, module: str, function: str, args: Sequence[str]) -> NoReturn:
    status = 1
    try:
        for stream, name in ((sys.stdout, OUT), (sys.stderr, ERR)):
            os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), stream.fileno())
        sys.argv[1:] = args
        getattr(import_module(module), function)()
        status = 0
    except BaseException:  # noqa: BLE001 -- whatever it is belongs to the caller, and not into ``serve``
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
