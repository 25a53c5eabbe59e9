"""How a process of a job begins and ends: it does not outlive its parent, and its end cannot look like a crash."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
#: What Python itself exits with when it cannot write out what was printed.
_NOT_WRITTEN = 120


def die_with_parent(number: int, parent: int | None = None) -> None:
    """Linux sends signal `number` to this process when the thread that started it ends; elsewhere nothing does.

    parent: the process id of the one that started it; if it is gone already, this process ends now, with code 1.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def leave(code: int) -> NoReturn:
    """End this process at once with `code`, with what it printed written out.

    For every process that was in a process group. Gloo's threads let go of a collective's tensors some time after it
    is done, and need the interpreter for that; if it is being torn down by then, the process aborts ("terminate called
    without an active exception", pytorch/pytorch#190489), after all work is done and saved. `destroy_process_group`
    waits for the threads only if nothing else holds the group, and modules of torch that are imported late do: their
    functions have it as a default argument.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = code or _NOT_WRITTEN
    os._exit(code)
