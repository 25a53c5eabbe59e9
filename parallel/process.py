"""How a process of a job begins and ends: it does not outlive its parent, what it prints cannot end it, and its end
cannot look like a crash."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, NoReturn, TextIO

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


class LossyStream:
    """Stands for stdout or stderr: text that cannot be written (a full disk) is lost, where it would end what said it.

    lost: the first such failure; `told`, another stream, is told of it then. log: it is a job's log and nobody's
    result; then a reader that went away (`| tee`, a session) ends nothing either, where it raises BrokenPipeError
    otherwise. A stream that was closed takes everything.
    """

    def __init__(self, stream: TextIO | None, *, told: TextIO | None = None, log: bool = False) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self._told, self.log = told, log
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """The number of characters taken."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Write out what is held back."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError) and not self.log:
            raise error
        if self.lost is None:
            self.lost = error
            if self._told is not None:
                print(f"warning: what is printed is lost: {error}", file=self._told, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_on(*, log: bool = False) -> None:
    """From now on what cannot be printed ends this process no more; see LossyStream. stderr is a log always."""
    errors: Any = LossyStream(sys.stderr, log=True)
    sys.stdout, sys.stderr = LossyStream(sys.stdout, told=errors, log=log), errors  # type: ignore[assignment]


def leave(code: int) -> NoReturn:
    """End this process at once with `code`, with what it printed written out; 120 for 0 where that is not possible.

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
            failed = isinstance(stream, LossyStream) and stream.lost is not None and not stream.log
        except OSError:
            failed = True
        code = code or (_NOT_WRITTEN if failed else 0)
    os._exit(code)
