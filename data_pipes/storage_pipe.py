"""The output of a command as a byte source: run once, without a shell, its bytes kept in the cache.

Only a list of arguments from the user's own config is run, and only with `allow_pipe`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Generator, Iterator

from ringweave.data_pipes.storage_base import LocalFile, StorageOptions, redact
from ringweave.data_pipes.storage_cache import ByteCache
from ringweave.tokenizers.errors import DataError

_PIECE = 1 << 20
#: Bytes of what a command says on stderr that a message shows.
_TAIL = 2000


def open_pipe(
    argv: list[str],
    *,
    cache: ByteCache,
    options: StorageOptions | None = None,
    version: str = "",
    max_bytes: int | None = None,
) -> LocalFile:
    """What a command writes to its output, as a file in the cache; it runs only if the file is not there.

    argv: the command and its arguments, given to no shell. version: to tell outputs of one command apart.
    max_bytes: of its output (default: the cache's cap). A command that says nothing for `timeout_s` is killed with all
    it started. Raises DataError without `allow_pipe`, for a string, and for any failure of the command.
    """
    options = StorageOptions() if options is None else options
    if (
        isinstance(argv, str)
        or not argv
        or not all(isinstance(word, str) and "\0" not in word for word in argv)
    ):
        why = "a command is a list of at least one text; a string would need a shell"
        raise DataError(
            "unusable command", where=redact(repr(argv)), why=why, fix="write [program, argument, ...]"
        )
    shown = redact(" ".join(argv))
    if not options.allow_pipe:
        fix = "set data.allow_pipe: true in your own config if you trust this command"
        raise DataError("commands are not allowed", where=shown, why="allow_pipe is off", fix=fix)
    # Arguments as they are: two commands that differ in a secret may well give different bytes.
    digest = hashlib.blake2b("\0".join(argv).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    output = _output(argv, options.timeout_s, shown)
    with contextlib.closing(output):
        return cache.materialise(f"pipe {shown}", f"{digest} {version}", output, max_bytes=max_bytes)


def _output(argv: list[str], timeout_s: float, shown: str) -> Generator[bytes, None, None]:
    """Pieces of a command's output. Whatever ends this generator also ends the command's process group."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        fix = "install the program or correct its name"
        raise DataError("cannot run command", where=shown, why=str(error), fix=fix) from None
    assert process.stdout is not None and process.stderr is not None
    tail = bytearray()
    try:
        with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
            for stream in (process.stdout, process.stderr):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            yield from _pump(selector, process, tail, timeout_s, shown)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise _failed(
                shown, f"it closed its output but did not end within {timeout_s:g} s", tail
            ) from None
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise _failed(shown, f"{os.path.basename(argv[0])} {how}", tail)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it left running
        process.wait()


def _pump(
    selector: selectors.BaseSelector,
    process: subprocess.Popen[bytes],
    tail: bytearray,
    timeout_s: float,
    shown: str,
) -> Iterator[bytes]:
    """Pieces of stdout until it ends; stderr goes into `tail`."""
    last = time.monotonic()
    while process.stdout in {key.fileobj for key in selector.get_map().values()}:
        left = last + timeout_s - time.monotonic()
        if left <= 0:
            raise _failed(shown, f"it wrote nothing for {timeout_s:g} s and was killed", tail)
        for key, _ in selector.select(left):
            piece = os.read(key.fd, _PIECE)
            if not piece:
                selector.unregister(key.fileobj)
            elif key.fileobj is process.stdout:
                yield piece
                last = time.monotonic()
            else:
                tail += piece
                del tail[:-_TAIL]
    if process.stderr in {key.fileobj for key in selector.get_map().values()}:
        # The last words of a command that fails come while its output already ended.
        until = time.monotonic() + min(1.0, timeout_s)
        while (left := until - time.monotonic()) > 0 and selector.select(left):
            piece = os.read(process.stderr.fileno(), _PIECE)
            if not piece:
                break
            tail += piece
            del tail[:-_TAIL]


def _failed(shown: str, why: str, tail: bytearray) -> DataError:
    said = redact(tail.decode("utf-8", "replace").strip())
    why += f"; it said: {said}" if said else "; it said nothing"
    fix = "run the command by hand: it has to write the shard to its output and end with status 0"
    return DataError("command failed", where=shown, why=why, fix=fix)
