"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int, parent: int | None = None) -> None:
    """Linux sends signal `number` to this process when the thread that started it ends; elsewhere nothing does.

    parent: the process id of the one that started it; if it is gone already, this process ends now, with code 1.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
