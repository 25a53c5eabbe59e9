"""Commands as sources: lists only, with permission only, whole output or a named error, nothing left running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from ringweave.data_pipes.storage import ByteCache, StorageOptions, open_pipe
from ringweave.tokenizers.errors import DataError

ALLOWED = StorageOptions(allow_pipe=True, timeout_s=1.0)


@pytest.fixture
def cache(tmp_path: Path) -> ByteCache:
    return ByteCache(tmp_path / "cache", 64 << 20, block_bytes=1 << 20)


def python(program: str, *more: str) -> list[str]:
    return [sys.executable, "-c", program, *more]


def failed(argv: list[str], cache: ByteCache, **options: int) -> DataError:
    with pytest.raises(DataError) as caught:
        open_pipe(argv, options=ALLOWED, cache=cache, **options)
    assert not list((cache.dir / "tmp").iterdir()) and not list((cache.dir / "whole").iterdir())
    return caught.value


def test_output_is_kept_and_the_command_runs_once(cache: ByteCache, tmp_path: Path) -> None:
    program = (
        "import sys; open(sys.argv[1], 'a').write('x'); sys.stdout.buffer.write(bytes(range(256)) * 8192)"
    )
    argv = python(program, str(tmp_path / "runs"))
    for _ in range(3):
        source = open_pipe(argv, options=ALLOWED, cache=cache)
        assert source.size() == 256 * 8192 and source.read(255, 3) == b"\xff\x00\x01"
    assert (tmp_path / "runs").read_text() == "x"
    open_pipe([*argv, "other"], options=ALLOWED, cache=cache)
    open_pipe(argv, options=ALLOWED, cache=cache, version="2")
    assert (tmp_path / "runs").read_text() == "xxx"


def test_commands_need_permission(cache: ByteCache, tmp_path: Path) -> None:
    argv = python(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="allow_pipe"):
        open_pipe(argv, cache=cache)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("argv", ["touch ran", [], ["a", 3], ["a\0b"]])
def test_only_lists_of_texts_are_run(cache: ByteCache, argv: list[str]) -> None:
    assert "list" in failed(argv, cache).why


def test_no_shell_sees_the_arguments(cache: ByteCache, tmp_path: Path) -> None:
    argv = python("import sys; print(sys.argv[1])", f"$(touch {tmp_path}/ran); `touch {tmp_path}/ran`; $HOME")
    source = open_pipe(argv, options=ALLOWED, cache=cache)
    assert source.read(0, source.size()).decode() == argv[-1] + "\n"
    assert not (tmp_path / "ran").exists()


def test_a_failing_command_is_named_with_its_last_words(cache: ByteCache) -> None:
    program = "import sys; print('data', flush=True); sys.stderr.write('x' * 9000 + 'no: token=abc123'); sys.exit(7)"
    error = failed(python(program, "https://u:hunter2@h/x"), cache)
    assert "ended with status 7" in error.why and os.path.basename(sys.executable) in error.why
    assert error.why.endswith("no: token=***") and len(error.why) < 2500
    assert "hunter2" not in str(error)
    assert "killed by signal 9" in failed(python("import os; os.kill(os.getpid(), 9)"), cache).why
    assert "cannot run" in failed(["no-such-program-here"], cache).what


def test_output_over_the_cap_ends_the_command(cache: ByteCache) -> None:
    endless = python("import sys\nwhile True: sys.stdout.buffer.write(b'x' * 65536)")
    assert "5000000 bytes allowed" in failed(endless, cache, max_bytes=5_000_000).why
    assert cache.used() == 0
    assert failed(endless, cache).what == "object too large", "the cache's own cap"


def alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be collected does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("silent", ["itself", "its child", "after closing"])
def test_a_silent_command_is_killed_with_what_it_started(
    cache: ByteCache, tmp_path: Path, silent: str
) -> None:
    pids = tmp_path / "pids"
    program = (
        "import os, sys, time, subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
        "print('some', flush=True)\n"
    ) + {
        "itself": "time.sleep(60)",
        "its child": "sys.exit(0)",  # the child holds the output open
        "after closing": "os.close(1); child.kill(); child.wait(); time.sleep(60)",
    }[silent]
    began = time.monotonic()
    error = failed(python(program, str(pids)), cache)
    assert time.monotonic() - began < 20
    assert ("did not end" if silent == "after closing" else "wrote nothing for 1 s") in error.why
    until = time.monotonic() + 5
    while any(alive(int(pid)) for pid in pids.read_text().split()) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
