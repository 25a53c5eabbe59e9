"""A process that decodes and tokenizes for another one: `python -m ringweave.data_pipes.worker_process FD FD`.

It is started by `workers.py`, which also kills it. Frames on the first descriptor (a socket) are bytes, never
pickled objects: JSON in, and out a letter followed by JSON ("r" ready, "s" begins a sample, "w" waits for storage, "e"
error) or by a block as safetensors ("b", or "l" if it is the last one of this process). The second is a pipe nothing
is ever written to: when its other end closes, because the parent has ended in whatever way, the kernel ends this
process by SIGIO, also in the middle of a decoder.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ringweave.data_pipes.encode import OUT_OF_MEMORY, Readers, encode_samples
from ringweave.data_pipes.shard_names import is_remote, shown
from ringweave.tokenizers.errors import DataError, VocabularyError

#: Seconds between two signs of life of a process that waits for storage.
_BEAT_S = 2.0


@dataclass(slots=True)
class Setup:
    """What a worker loads. load(*args) gives the tokenizers; reader(shard, **options) gives the reader of a shard.

    Both are named `package.module:object`, so that a fresh process finds them; path: folders to find them in beside
    the usual ones.
    """

    args: Sequence[str]
    load: str = "ringweave.tokenizers.set:TokenizerSet.load"
    reader: str = "ringweave.data_pipes.reader:ShardReader"
    reader_options: Mapping[str, Any] = field(default_factory=dict)
    path: Sequence[str] = ()


def load_object(spec: str) -> Callable[..., Any]:
    """`package.module:name.attribute` -> that object."""
    module, _, name = spec.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def end_with_parent(descriptor: int) -> None:
    """End this process when the other end of the pipe `descriptor` closes."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> (
        None
    ):  # also where there is no such signal, and if the parent was gone before it was asked for
        os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes of address space beyond what it has now. No effect where that is unknown."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Waiting:
    """While it is entered, says every `_BEAT_S` seconds that this process waits for storage: that is no decoder that
    hangs. Nothing else may be sent meanwhile."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock, self._on = connection, threading.Lock(), False
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(_BEAT_S)
                with self._lock:
                    if self._on:
                        self._connection.send_bytes(b"w")

    def __enter__(self) -> None:
        self._on = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._on = False

    def opening(self, open: Callable[[str], Any]) -> Callable[[str], Any]:
        """As `open`; shards that are not plain local files may take their time, to open and to read."""

        def opened(shard: str) -> Any:
            if not is_remote(shard):
                return open(shard)
            with self:
                return _Patient(open(shard), self)

        return opened


class _Patient:
    """A reader that waits."""

    def __init__(self, reader: Any, waiting: Waiting) -> None:
        self._reader, self._waiting = reader, waiting

    def read(self, number: int) -> Any:
        with self._waiting:
            return self._reader.read(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def serve(connection: Connection) -> None:
    """Work until the other side closes the connection."""
    setup = json.loads(connection.recv_bytes())
    sys.path[:0] = setup["path"]
    try:
        tokenizers = load_object(setup["load"])(*setup["args"])
        open_shard = partial(load_object(setup["reader"]), **setup["reader_options"])
    except DataError as error:
        connection.send_bytes(b"e" + _described(error))
        return
    waiting = Waiting(connection)
    if setup["memory_bytes"]:
        limit_memory(setup["memory_bytes"])
    readers = Readers(waiting.opening(open_shard))
    connection.send_bytes(b"r" + json.dumps({"manifest": str(tokenizers.manifest.hash)}).encode())
    while True:
        task = json.loads(connection.recv_bytes())
        try:
            block = encode_samples(
                task["shard"], task["samples"], task["plan"], readers=readers, tokenizers=tokenizers,
                begin=lambda number: connection.send_bytes(b"s" + str(number).encode()),
            )  # fmt: skip
        except DataError as error:
            connection.send_bytes(b"e" + _described(error))
            continue
        # After memory ran out, what is left of it is of no use to the next sample.
        last = any(entry["reason"] == OUT_OF_MEMORY for entry in block.skipped)
        connection.send_bytes((b"l" if last else b"b") + block.block(shown(task["shard"])).to_bytes())
        if last:
            return


def _described(error: DataError) -> bytes:
    kind = "vocabulary" if isinstance(error, VocabularyError) else "data"
    said = {"kind": kind, "what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
    return json.dumps(said).encode()


def main() -> None:
    """The process."""
    connection, life = Connection(int(sys.argv[1])), int(sys.argv[2])
    end_with_parent(life)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection)


if __name__ == "__main__":
    main()
