"""Workers give what the training process would make itself, and survive, or name, what kills a decoder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parent))

from token_fixtures import HERE, Bytes, png, same, setup, texts, write_shard

from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.index import build_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.workers import Setup, Task, TokenWorkers, WorkersClosed
from ringweave.tokenizers.errors import DataError, VocabularyError

TEXT = ("text",)


@pytest.fixture(scope="module")
def shared() -> Iterator[TokenWorkers]:
    """Two workers for the tests that do not count them."""
    with TokenWorkers(2, setup(), timeout_s=2.0, memory_bytes=48 << 20) as workers:
        yield workers


def reasons(workers: TokenWorkers, shard: Path, samples: tuple[int, ...]) -> dict[str, str]:
    """key -> reason of what could not be made."""
    [block] = workers.run([Task(str(shard), samples, TEXT)])
    assert len(block) == len(samples)
    return {e["key"]: e["reason"] for e in block.skipped}


@pytest.mark.parametrize("count", [0, 2])
def test_documents_equal_those_made_in_this_process_in_the_order_asked_for(
    shared: TokenWorkers, tmp_path: Path, count: int
) -> None:
    plan = ("caption?", "image")
    shards = [
        write_shard(
            tmp_path / f"image-{n}.tar", [{"png": png(1 + i, n), "txt": b"c%d" % i} for i in range(6)]
        )
        for n in range(3)
    ]
    tasks = [Task(str(s), order, plan) for s in shards for order in ((0, 1, 2), (5, 3), (4,))]
    workers = shared if count else TokenWorkers(0, setup())
    blocks = workers.run(tasks)
    for task, block in zip(tasks, blocks, strict=True):
        with ShardReader(Path(task.shard)) as reader:
            fresh = [encode_sample(reader.read(i), plan, Bytes()) for i in task.samples]
        assert [same(block.document(k), d) for k, d in enumerate(fresh)] == [True] * len(fresh)
        assert block.skipped == []
    if not count:
        workers.close()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("segfault", "decoder killed: SIGSEGV"),
        ("kill", "decoder killed: memory (SIGKILL)"),
        pytest.param("hang", "decoder killed: timeout (2 s)", marks=pytest.mark.slow),
        ("eat", "decoder killed: memory"),
        ("mistake", "ValueError: a mistake in a decoder"),
        ("undecodable", "cannot decode this text"),
    ],
)
def test_what_kills_a_decoder_costs_one_sample_and_has_a_reason(
    shared: TokenWorkers, tmp_path: Path, order: str, reason: str
) -> None:
    """Also with the next good samples behind it, and twice in one task."""
    shard = write_shard(tmp_path / "text.tar", texts(9, orders={3: order, 7: order}))
    found = reasons(shared, shard, tuple(range(9)))
    assert set(found) == {"text-3", "text-7"}
    assert all(reason in r for r in found.values())
    [block] = shared.run([Task(str(shard), (8, 3, 0), TEXT)])
    assert [int(n) for n in block.lengths] == [16, 0, 6]
    assert block.skipped[0]["offset"] == build_index(shard).samples[3].members[0].offset


def test_one_killed_worker_does_not_lose_or_repeat_a_document(shared: TokenWorkers, tmp_path: Path) -> None:
    """A sample that dies once is made at its second try; the other tasks do not notice."""
    shard = write_shard(tmp_path / "text.tar", texts(20, orders={4: f"once {tmp_path / 'mark'}"}))
    blocks = shared.run([Task(str(shard), tuple(range(s, s + 5)), TEXT) for s in range(0, 20, 5)])
    assert [key for b in blocks for key in b.keys] == [f"text-{i}" for i in range(20)]
    assert all(b.skipped == [] for b in blocks)
    assert (tmp_path / "mark").exists()


def test_a_worker_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text.tar", texts(8, orders={i: "slow 0.2" for i in range(8)}))
    with TokenWorkers(2, setup()) as workers:
        workers.run([Task(str(shard), (0,), TEXT)])
        threading.Timer(0.3, lambda: os.kill(workers.processes[0], signal.SIGKILL)).start()
        blocks = workers.run([Task(str(shard), tuple(range(s, s + 4)), TEXT) for s in (0, 4)])
        assert [len(b) for b in blocks] == [4, 4]
        assert all(b.skipped == [] for b in blocks)
        assert workers.counts.started == 3
        assert len(workers.processes) == 2


def test_memory_is_limited_but_a_worker_within_it_is_not_replaced(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text.tar", texts(6, orders={2: "eat"}))
    with TokenWorkers(1, setup(), memory_bytes=64 << 20) as workers:
        reasons(workers, shard, (0, 1))
        before = workers.processes
        reasons(workers, shard, (3, 4))
        assert workers.processes == before
        assert reasons(workers, shard, (2,)) == {"text-2": "decoder killed: memory"}
        assert reasons(workers, shard, (5,)) == {}
        assert workers.processes != before, "what ran out of memory is not used again"


@pytest.mark.slow
def test_workers_are_recycled(tmp_path: Path) -> None:
    """Decoders leak: a worker ends after its share of samples, and what it has open ends with it."""
    log = tmp_path / "log"
    shard = write_shard(tmp_path / "text.tar", texts(12))
    with TokenWorkers(1, setup(log), recycle_after=4) as workers:
        for start in range(0, 12, 2):
            reasons(workers, shard, (start, start + 1))
    processes = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(processes) == 12
    assert len(set(processes)) == 3
    assert processes == sorted(processes, key=processes.index), "one after the other"
    assert str(os.getpid()) not in processes, "decoders are opened in the worker, never before a fork"


def test_errors_that_end_a_run_come_through(shared: TokenWorkers, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text.tar", texts(4, orders={1: "foreign"}))
    with pytest.raises(VocabularyError, match="not of this vocabulary"):
        reasons(shared, shard, (0, 1))
    with pytest.raises(DataError, match="unknown plan item"):
        shared.run([Task(str(shard), (0,), ("sound",))])
    with pytest.raises(DataError):
        shared.run([Task(str(tmp_path / "absent.tar"), (0,), TEXT)])
    assert reasons(shared, shard, (0, 2)) == {}


def test_damage_of_a_shard_is_a_skip_that_says_so(shared: TokenWorkers, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text.tar", texts(4))
    data = bytearray(shard.read_bytes())
    offset = build_index(shard).samples[1].members[0].offset
    data[offset + 1] ^= 1
    shard.write_bytes(data)
    [block] = shared.run([Task(str(shard), (0, 1, 2), TEXT)])
    [entry] = block.skipped
    assert entry["key"] == "text-1"
    assert "damaged sample" in entry["reason"]
    assert (entry["damage"], entry["lasting"], entry["offset"]) == (True, False, offset)


def test_workers_that_cannot_start_are_an_error_with_a_way_out() -> None:
    with (
        TokenWorkers(2, Setup(args=[], load="token_fixtures:absent", path=(HERE,))) as workers,
        pytest.raises(DataError, match="do not start") as caught,
    ):
        workers.run([Task("x.tar", (0,), TEXT)])
    assert "workers" in caught.value.fix


def test_closing_from_another_thread_ends_a_run_and_all_processes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text.tar", texts(2, orders={0: "hang", 1: "hang"}))
    workers = TokenWorkers(2, setup())
    processes = workers.processes
    threading.Timer(0.5, workers.close).start()
    with pytest.raises(WorkersClosed):
        workers.run([Task(str(shard), (0,), TEXT), Task(str(shard), (1,), TEXT)])
    assert not any(psutil.pid_exists(p) for p in processes)
    with pytest.raises(WorkersClosed):
        workers.run([Task(str(shard), (0,), TEXT)])


def test_a_stop_event_ends_a_run_but_not_the_workers(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text.tar", texts(2, orders={0: "hang"}))
    stop = threading.Event()
    with TokenWorkers(1, setup()) as workers:
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(WorkersClosed):
            workers.run([Task(str(shard), (0,), TEXT)], stop=stop)
        assert reasons(workers, shard, (1,)) == {}


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
sys.path[:0] = [{here!r}]
from token_fixtures import setup
from ringweave.data_pipes.workers import Task, TokenWorkers
workers = TokenWorkers(2, setup())
workers.run([Task({shard!r}, (1,), ("text",)), Task({shard!r}, (2,), ("text",))])
print(*workers.processes, flush=True)
workers.run([Task({shard!r}, (0,), ("text",))])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    """In the middle of a sample that never ends; a job that is started again finds nothing in its way."""
    shard = write_shard(tmp_path / "text.tar", texts(3, orders={0: "hang"}))
    program = PARENT.format(here=HERE, shard=str(shard))
    for _ in range(2):
        parent = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert parent.stdout is not None
        workers = [psutil.Process(int(p)) for p in parent.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(0.2)
        if psutil.LINUX:  # what is in /dev/shm may be another process's; what these have mapped is not
            held = [m.path for p in (psutil.Process(parent.pid), *workers) for m in p.memory_maps()]
            assert held
            assert not [p for p in held if p.startswith("/dev/shm")], "no shared memory to leave behind"
        parent.send_signal(how)
        assert parent.wait(20) != 0
        parent.stdout.close()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.tar", "text.tar.idx"]
