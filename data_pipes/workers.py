"""`TokenWorkers`: processes that decode and tokenize, and that may be killed at any time.

Decoders of hostile media hang, take all memory, or crash. So each worker has a cap of memory and a limit of time
per sample; one that breaks either is killed and replaced. The sample that was being decoded is tried once more,
alone, in a fresh process; if that one ends as well, the sample is a skip with the reason. Nothing is pickled:
tasks are JSON, results are blocks as safetensors. Workers end with their parent, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from ringweave.data_pipes.encode import OUT_OF_MEMORY, Readers, encode_samples, offset_of
from ringweave.data_pipes.shard_names import shown
from ringweave.data_pipes.token_block import BlockWriter, TokenBlock, join_blocks
from ringweave.data_pipes.worker_process import Setup, load_object
from ringweave.tokenizers.errors import DataError, VocabularyError

#: How often a run looks whether it was told to stop, in seconds.
_TICK = 0.2
#: Jobs that each worker gets of a run, if the run has so many samples.
_SHARES = 4
#: Workers that may end in a row before one has come up.
_STARTS = 3


@dataclass(frozen=True, slots=True)
class Task:
    """Samples of one shard (its whole address, see `address_of`) to be made into documents by a plan."""

    shard: str
    samples: tuple[int, ...]
    plan: tuple[str, ...]

    @property
    def where(self) -> str:
        """The shard as messages name it: an address may hold secrets."""
        return shown(self.shard)


class WorkersClosed(Exception):
    """`close` was called, possibly by another thread, while a run was under way."""


@dataclass(slots=True)
class _Job:
    """Samples of task number `task`; `deaths`: how often a worker ended over them."""

    task: int
    samples: list[int]
    deaths: int = 0


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    life: int
    deadline: float
    ready: bool = False
    job: _Job | None = None
    sample: int | None = None
    made: int = 0


@dataclass(slots=True)
class Counts:
    """What the workers did so far. documents: made or skipped, each attempt that ended; killed: by their parent."""

    documents: int = 0
    started: int = 0
    killed: int = 0
    died: int = 0


class TokenWorkers:
    """`count` processes, started when there is work; 0: it is done in this one, without protection against it.

    memory_bytes: what a worker may take beyond what it has once loaded (0: no cap); timeout_s: seconds for one
    sample, without those spent on stores, which have limits of their own; recycle_after: samples after which a worker
    is replaced (decoders leak); start_s: seconds to come up.
    Use it from one thread at a time; `close` may be called from any. Raises DataError if workers cannot start.
    """

    def __init__(
        self,
        count: int,
        setup: Setup,
        *,
        memory_bytes: int = 2 << 30,
        timeout_s: float = 60.0,
        recycle_after: int = 4096,
        start_s: float = 300.0,
    ) -> None:
        if count < 0 or memory_bytes < 0 or timeout_s <= 0 or recycle_after < 1:
            raise ValueError("count and memory_bytes must be 0 or above, timeout_s and recycle_after above 0")
        self.count, self.setup, self.counts = count, setup, Counts()
        self._memory, self._timeout, self._start = memory_bytes, timeout_s, start_s
        self._recycle_after = recycle_after
        self._workers: list[_Worker] = []
        self._fallen = 0
        self._closed = threading.Event()
        self._running = threading.Lock()
        self._stop: threading.Event | None = None
        self._here: tuple[Any, Readers] | None = None

    # --- the work --------------------------------------------------------------------------------------

    def run(self, tasks: Sequence[Task], *, stop: threading.Event | None = None) -> list[TokenBlock]:
        """The documents of each task, in the order of the tasks and of their samples.

        Samples that cannot be made are skips of their block. Raises VocabularyError, and DataError for a wrong plan
        or a shard that cannot be opened; WorkersClosed once closed, or once `stop` is set.
        """
        with self._running:
            self._stop = stop
            self._look()
            if self.count == 0:
                return [self._run_here(task) for task in tasks]
            try:
                return self._run(tasks)
            finally:
                self._drop_unfinished()
                if self._closed.is_set():
                    self._end_all()

    def _look(self) -> None:
        if self._closed.is_set() or (self._stop is not None and self._stop.is_set()):
            raise WorkersClosed

    def _run_here(self, task: Task) -> TokenBlock:
        if self._here is None:
            sys.path[:0] = [p for p in self.setup.path if p not in sys.path]
            tokenizers = load_object(self.setup.load)(*self.setup.args)
            reader = partial(load_object(self.setup.reader), **self.setup.reader_options)
            self._here = tokenizers, Readers(reader)
        self._look()
        tokenizers, readers = self._here
        self.counts.documents += len(task.samples)
        return encode_samples(
            task.shard, task.samples, task.plan, readers=readers, tokenizers=tokenizers
        ).block(task.where)

    def _run(self, tasks: Sequence[Task]) -> list[TokenBlock]:
        waiting = deque(self._jobs(tasks))
        blocks: list[list[tuple[list[int], TokenBlock]]] = [[] for _ in tasks]
        missing = [len(task.samples) for task in tasks]
        while any(missing):
            self._look()
            self._keep_up(len(waiting))
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    self._give(worker, waiting, tasks)
            for job, block in self._events(waiting, tasks):
                blocks[job.task].append((job.samples, block))
                missing[job.task] -= len(job.samples)
        return [_joined(task, parts) for task, parts in zip(tasks, blocks)]

    def _jobs(self, tasks: Sequence[Task]) -> list[_Job]:
        """The tasks, cut so that every worker has something to do until the end."""
        total = sum(len(task.samples) for task in tasks)
        most = max(1, -(-total // (_SHARES * self.count)))
        return [
            _Job(n, list(task.samples[first : first + most]))
            for n, task in enumerate(tasks)
            for first in range(0, len(task.samples), most)
        ]

    def _give(self, worker: _Worker, waiting: deque[_Job], tasks: Sequence[Task]) -> None:
        job = waiting.popleft()
        worker.job, worker.sample = job, None
        worker.deadline = time.monotonic() + self._timeout
        task = tasks[job.task]
        request = {"shard": task.shard, "samples": job.samples, "plan": task.plan}
        with contextlib.suppress(OSError):  # it died since: its end is an event of its own
            worker.connection.send_bytes(json.dumps(request).encode())

    def _events(self, waiting: deque[_Job], tasks: Sequence[Task]) -> list[tuple[_Job, TokenBlock]]:
        """Waits for news of the workers; gives what they finished."""
        now = time.monotonic()
        busy = [w for w in self._workers if w.job is not None or not w.ready]
        first = min((w.deadline for w in busy), default=now)
        heard = wait([w.connection for w in self._workers], timeout=min(_TICK, max(0.0, first - now)))
        done: list[tuple[_Job, TokenBlock]] = []
        for worker in list(self._workers):
            if worker.connection in heard:
                try:
                    self._frame(worker, worker.connection.recv_bytes(), tasks, done)
                except (EOFError, OSError):
                    self._ended(worker, _how(worker.process), waiting, tasks, done)
            elif worker in busy and worker.deadline < time.monotonic():
                self.counts.killed += 1
                why = f"decoder killed: timeout ({self._timeout:g} s)" if worker.ready else "it did not start"
                self._ended(worker, why, waiting, tasks, done)
        return done

    def _frame(
        self, worker: _Worker, frame: bytes, tasks: Sequence[Task], done: list[tuple[_Job, TokenBlock]]
    ) -> None:
        kind, body = frame[:1], frame[1:]
        if kind == b"r":
            worker.ready = True
        elif kind == b"w":
            worker.deadline = time.monotonic() + self._timeout
        elif kind == b"s":
            worker.sample, self._fallen = int(body), 0
            worker.deadline = time.monotonic() + self._timeout
        elif kind == b"e":
            said = json.loads(body)
            kinds = {"vocabulary": VocabularyError, "data": DataError}
            raise kinds[said["kind"]](said["what"], where=said["where"], why=said["why"], fix=said["fix"])
        elif worker.job is not None:
            job, worker.job = worker.job, None
            worker.made += len(job.samples)
            self.counts.documents += len(job.samples)
            done.append((job, TokenBlock.from_bytes(body, tasks[job.task].where)))
            if kind == b"l":
                self._end(worker)

    def _ended(
        self,
        worker: _Worker,
        why: str,
        waiting: deque[_Job],
        tasks: Sequence[Task],
        done: list[tuple[_Job, TokenBlock]],
    ) -> None:
        """A worker is gone: its job goes back, split so that the sample to blame ends up alone."""
        self._end(worker)
        job = worker.job
        if not worker.ready or (job is not None and worker.sample is None):
            self._fallen += 1  # before any sample was begun: none is to blame
            if self._fallen >= max(_STARTS, self.count):
                raise DataError(
                    "token workers do not start",
                    where=self.setup.load,
                    why=f"{self._fallen} in a row ended before they began a sample ({why})",
                    fix="see the messages above; data workers: 0 does the work in the training process",
                )
            waiting.extendleft([job] if job is not None else [])
            return
        if job is None:
            return
        self.counts.died += 1
        if len(job.samples) == 1 and job.deaths:
            writer = BlockWriter()
            task = tasks[job.task]
            key, offset = self._name(task, job.samples[0])
            writer.skip(key, why, lasting=False, offset=offset)
            self.counts.documents += 1
            done.append((job, writer.block(task.where)))
        elif len(job.samples) == 1 or job.deaths:
            waiting.extendleft(_Job(job.task, [s], job.deaths + 1) for s in reversed(job.samples))
        else:
            suspect = worker.sample if worker.sample in job.samples else job.samples[0]
            rest = [s for s in job.samples if s != suspect]
            waiting.appendleft(_Job(job.task, rest, 1))
            waiting.appendleft(_Job(job.task, [suspect], 1))

    def _name(self, task: Task, sample: int) -> tuple[str, int | None]:
        """Key and offset of a sample, which its worker can no longer tell."""
        try:
            reader = partial(load_object(self.setup.reader), **self.setup.reader_options)(task.shard)
            with contextlib.closing(reader):
                return str(reader.keys[sample]), offset_of(reader, sample)
        except DataError:
            return f"sample {sample}", None

    # --- the processes ---------------------------------------------------------------------------------

    def _begin(self) -> _Worker:
        ours, theirs = socket.socketpair()
        reading, life = os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__.rpartition(".")[0] + ".worker_process"]
                + [str(theirs.fileno()), str(reading)],
                pass_fds=[theirs.fileno(), reading],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C is the parent's to answer
            )
        except OSError as error:
            os.close(life)
            ours.close()
            raise DataError("cannot start a token worker", why=str(error)) from None
        finally:
            theirs.close()
            os.close(reading)
        connection = Connection(ours.detach())
        setup = {
            "args": [str(a) for a in self.setup.args],
            "load": self.setup.load,
            "reader": self.setup.reader,
            "reader_options": dict(self.setup.reader_options),
            "path": [str(p) for p in self.setup.path],
            "memory_bytes": self._memory,
        }
        with contextlib.suppress(OSError):
            connection.send_bytes(json.dumps(setup).encode())
        self.counts.started += 1
        return _Worker(process, connection, life, time.monotonic() + self._start)

    def _keep_up(self, waiting: int) -> None:
        """Replaces workers that are gone, as far as there is work, and those that have done their share."""
        for worker in list(self._workers):
            if worker.job is None and worker.made >= self._recycle_after:
                self._end(worker)
        wanted = min(self.count, waiting + sum(w.job is not None for w in self._workers))
        while len(self._workers) < wanted:
            self._workers.append(self._begin())

    def _end(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        worker.connection.close()
        with contextlib.suppress(OSError):
            worker.process.kill()
        os.close(worker.life)
        worker.process.wait()

    def _drop_unfinished(self) -> None:
        """After an error: workers in the middle of a task would hand its results to the next run."""
        for worker in list(self._workers):
            if worker.job is not None:
                self._end(worker)

    def _end_all(self) -> None:
        for worker in list(self._workers):
            self._end(worker)
        if self._here is not None:
            self._here[1].close()
            self._here = None

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers there are now."""
        return [w.process.pid for w in self._workers]

    def close(self) -> None:
        """End all workers. A run under way in another thread ends with WorkersClosed."""
        self._closed.set()
        if self._running.acquire(timeout=10 * _TICK):
            try:
                self._end_all()
            finally:
                self._running.release()

    def __enter__(self) -> TokenWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _how(process: subprocess.Popen[bytes]) -> str:
    """Why a worker ended that nobody here killed."""
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "decoder closed its connection"
    if code >= 0:
        return f"decoder ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    # The kernel's way to say that memory is out; and what libraries do that cannot get any.
    return f"{OUT_OF_MEMORY} ({name})" if -code == signal.SIGKILL else f"decoder killed: {name}"


def _joined(task: Task, parts: list[tuple[list[int], TokenBlock]]) -> TokenBlock:
    """The block of a task from those of its jobs."""
    ordered = sorted(parts, key=lambda part: task.samples.index(part[0][0]))
    if [sample for samples, _ in ordered for sample in samples] == list(task.samples):
        blocks = [block for _, block in ordered]
        return join_blocks(blocks, task.where) if blocks else BlockWriter().block(task.where)
    place = {sample: (block, i) for samples, block in parts for i, sample in enumerate(samples)}
    writer = BlockWriter()
    for sample in task.samples:
        block, i = place[sample]
        entry = block.entry(i)
        if entry is None:
            writer.add(block.keys[i], block.document(i))
        else:
            writer.skip(**entry)
    return writer.block(task.where)
