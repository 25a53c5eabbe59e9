"""Takes every hostile fixture through index, check, read, decode, plan and sheet, under an audit hook.

Run as `python hostile_run.py FOLDER`: audit hooks cannot be removed, so this has a process of its own. Prints one JSON
line a fixture: {"name", "expect", "outcome", "why", "seconds", "events"}; then {"control"}, what the hook noticed of
things done on purpose, and {"peak_mb"}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma  # numpy loads it when it is first needed
from hostile_members import clip, lines, member_fixtures, picture, png, sound
from hostile_shards import GOOD, Fixture, shard_fixtures, tar_of

from ringweave.data_pipes.compression import Caps, unpack
from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.folder import build_from_folder, build_from_jsonl
from ringweave.data_pipes.formats import guess_plan
from ringweave.data_pipes.index import build_index, load_index, write_index
from ringweave.data_pipes.reader import ShardReader, check_shard
from ringweave.data_pipes.token_cache import TokenCache, cache_path
from ringweave.launch.cli import run as command
from ringweave.launch.data_check import check_jsonl, check_shards, decode_member
from ringweave.launch.data_sheet import write_sheet
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Document, Segment
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec

#: Running code, starting processes, loading code, talking to the network.
FORBIDDEN = frozenset(
    [
        "exec",
        "compile",
        "import",
        "marshal.loads",
        "marshal.load",
        "pickle.find_class",
        "subprocess.Popen",
    ]
    + [
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "pty.spawn",
        "ctypes.dlopen",
    ]
    + [
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "urllib.Request",
    ]
    + [
        "ftplib.connect",
        "http.client.connect",
        "webbrowser.open",
        "shutil.unpack_archive",
        "os.setuid",
        "os.chmod",
    ]
)
#: Changing files: allowed below the working folder only.
CHANGING = frozenset(
    ["os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"]
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
GIB = 1 << 30
TEXT = TokenizerSet({"text": TextCodec.fit(["a few words "] * 20, size=270)})


class Tokens:
    """Stands in for tokenizers: text goes through the real codec, sound through the real resampler."""

    def __init__(self) -> None:
        self._set = TEXT

    def text_segment(self, text: str, **more: Any) -> Segment:
        return self._set.text_segment(text, **more)

    def audio_segment(self, samples: np.ndarray, rate: int, **more: Any) -> Segment:
        return self._segment(len(resample(samples, rate, 16_000)) // 1000, "audio", more)

    def __getattr__(self, name: str) -> Callable[..., Segment]:
        return lambda *_, **more: self._segment(1, name.removesuffix("_segment"), more)

    def _segment(self, size: int, modality: str, more: dict[str, Any]) -> Segment:
        return Segment(np.zeros(size, np.int32), modality, np.zeros((size, 4), np.int32), more["role"])

    def document(self, key: str, segments: list[Segment]) -> Document:
        return Document(key, tuple(segments))


class Watch:
    """The audit hook: notes what must not happen, by the fixture it happened in."""

    def __init__(self, place: Path) -> None:
        self.place, self.events, self.armed = str(place), [], False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "compile" and arguments[0] == b"_getframe()":
            return  # how Cython names the line of an exception it raises
        changed = arguments[1] if event in ("os.link", "os.symlink") else arguments[0] if arguments else ""
        if (
            event in FORBIDDEN
            or (event == "open" and self._bad_open(arguments))
            or (event in CHANGING and not self._inside(changed))
        ):
            self.events.append(f"{event} {arguments!r:.160}")

    def _bad_open(self, arguments: tuple[Any, ...]) -> bool:
        path, _, flags = arguments
        if isinstance(path, int):
            return False
        return not self._inside(path) and (bool(flags & _WRITES) or "passwd" in str(path))

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        return os.path.abspath(os.fsdecode(path)).startswith(self.place + os.sep)


def through_shard(shard: Path, plan: tuple[str, ...] | None = None) -> list[str]:
    """Index, check, read, decode, encode, draw. Returns what was refused inside; DataError if the shard is."""
    refused: list[str] = []
    write_index(shard, build_index(shard))
    if check_shard(shard) and not load_index(shard).members(0)[0].ext.endswith((".gz", ".zst")):
        raise AssertionError("a shard that was just indexed is damaged")
    rows = check_shards([shard], decode=True)
    refused += [error.render() for row in rows for error in row.problems]
    with ShardReader(shard) as reader:
        for i in range(len(reader)):
            try:
                sample = reader.read(i)
                for ext, data in sample.members.items():
                    decode_member(ext, data, where=f"{sample.where}:{ext}")
                chosen = plan or guess_plan(
                    sample.members, {"text": ""} if "json" in sample.members else None
                )
                if chosen:
                    encode_sample(sample, chosen, Tokens())  # type: ignore[arg-type]
            except DataError as error:
                refused.append(error.render())
    write_sheet([shard], shard.with_suffix(".html"), title="t", per_source=3, seed=0)
    return refused


def lenient(shard: Path) -> None:
    """The same shard under the other answers to every question, whatever they give."""
    try:
        index = build_index(shard, hidden="skip", interleaved="regroup", dotted="keep")
        write_index(shard, index)
        check_shard(shard)
        write_index(shard, build_index(shard, tail="quarantine"))
        check_shard(shard)
    except DataError:
        pass


def run_tar(fixture: Fixture, place: Path) -> list[str]:
    shard = place / "x-0000.tar"
    shard.write_bytes(fixture.make())  # type: ignore[call-arg, arg-type]
    lenient(shard)
    shard.with_name("x-0000.tar.idx").unlink(missing_ok=True)
    return through_shard(shard)


def run_member(fixture: Fixture, place: Path) -> list[str]:
    data = fixture.make()  # type: ignore[call-arg]
    shard = place / "x-0000.tar"
    shard.write_bytes(tar_of([(f"k.{fixture.ext}", data), ("l.txt", b"fine")]))  # type: ignore[list-item]
    return through_shard(shard)


def run_packed(fixture: Fixture, place: Path) -> list[str]:
    shard = place / f"x-0000.{fixture.ext}"
    shard.write_bytes(fixture.make())  # type: ignore[call-arg, arg-type]
    codec: Any = "gzip" if fixture.ext.endswith("gz") else "zstd"
    with open(shard, "rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")
        unpack(pieces, place / "x.tar", codec, where=str(shard), caps=Caps(max_bytes=GIB))
    return through_shard(place / "x.tar")


def run_sidecar(fixture: Fixture, place: Path) -> list[str]:
    shard = place / "x-0000.tar"
    shard.write_bytes(GOOD + bytes(1024))
    sidecar = shard.with_name(f"{shard.name}.{fixture.ext}")
    sidecar.write_bytes(fixture.make())  # type: ignore[call-arg, arg-type]
    load_index(shard)
    return []


def run_cache(place: Path, data: bytes) -> None:
    """A token cache that is something else."""
    shard = place / "x-0000.tar"
    shard.write_bytes(GOOD + bytes(1024))
    write_index(shard, build_index(shard))
    cache_path(shard, ("text",), "m").write_bytes(data)
    TokenCache.open(shard, ("text",), "m")


def run_jsonl(fixture: Fixture, place: Path) -> list[str]:
    source = place / "x.jsonl"
    source.write_bytes(fixture.make())  # type: ignore[call-arg, arg-type]
    found = check_jsonl(source, fields="[q],a").problems
    made = build_from_jsonl(source, place / "out", name="x", fields="[q],a", shard_bytes=GIB)
    if len(found) != 1 or len(made["skipped"]) != 1 or made["samples"] != 60:
        raise AssertionError(
            f"{len(found)} problems, {len(made['skipped'])} skipped, {made['samples']} samples"
        )
    return [found[0].render()]


def run_folder(fixture: Fixture, place: Path) -> list[str]:
    (place / "in").mkdir()
    (place / "in" / "ok.txt").write_text("fine")
    fixture.make(place / "in")  # type: ignore[call-arg]
    made = build_from_folder(place / "in", place / "out", name="x", shard_bytes=GIB)
    if made["samples"] != 1 or len(made["skipped"]) != 3:
        raise AssertionError(f"{made}")
    return through_shard(place / "out" / "x-train-0000.tar")


RUNS = {
    "tar": run_tar, "member": run_member, "packed": run_packed, "sidecar": run_sidecar, "jsonl": run_jsonl,
    "folder": run_folder,
}  # fmt: skip


def attempt(name: str, expect: str, call: Callable[[Path], list[str]], watch: Watch) -> dict[str, Any]:
    """One fixture in a folder of its own."""
    watch.events.clear()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=watch.place) as place:
        os.chdir(place)
        try:
            refused = call(Path(place))
            outcome, why = ("unusable", refused[0]) if refused else ("harmless", "")
        except DataError as error:
            outcome, why = "refused", error.render()
        except Exception as error:
            outcome, why = "leaked", f"{type(error).__name__}: {error}"
        if Path("pwned").exists():
            outcome, why = "leaked", "code from the data ran"
        os.chdir(watch.place)
    seconds = time.perf_counter() - begun
    return {
        "name": name, "expect": expect, "outcome": outcome, "why": why[:300], "seconds": round(seconds, 2),
        "events": list(watch.events),
    }  # fmt: skip


def warm(place: Path) -> None:
    """Everything once on sound data and once on rubbish, so that every module is loaded before the hook is armed."""
    sane = [
        ("a.png", png(8, 8)),
        ("b.jpg", picture("JPEG")),
        ("c.webp", picture("WEBP")),
        ("d.flac", sound("FLAC")),
    ]
    sane += [
        ("e.wav", sound("WAV")),
        ("f.ogg", sound("OGG")),
        ("g.mp3", sound("MP3", 16_000)),
        ("h.mp4", clip()),
    ]
    sane += [
        ("i.webm", clip("libvpx", kind="webm")),
        ("j.json", b'{"text": "x"}'),
        ("k.txt", b"x"),
        ("l.layer0.png", png(8, 8)),
    ]
    rubbish = [(f"r{name}", b"rubbish" * 9) for name, _ in sane]
    for n, members in enumerate((sane, rubbish)):
        shard = place / f"warm-{n}.tar"
        shard.write_bytes(tar_of(members))
        through_shard(shard)
    lenient(place / "warm-0.tar")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command(["data", "check", str(place / "warm-0.tar")])
    jobs: list[Callable[[], Any]] = [
        lambda: run_cache(place, b"x"),
        lambda: check_jsonl(place / "none.jsonl", fields=""),
        lambda: build_from_jsonl(
            _written(place / "w.jsonl", next(lines())[1]), place / "w", name="w", shard_bytes=9
        ),
        lambda: build_from_folder(place / "w", place / "v", name="v", shard_bytes=9),
    ]
    for ending, codec in (("gz", "gzip"), ("zst", "zstd")):
        jobs.append(lambda c=codec: unpack(iter([b"x" * 9]), place / "u", c, where="w"))  # type: ignore[misc]
        jobs.append(
            lambda e=ending: through_shard(_written(place / f"{e}.tar", tar_of([(f"a.json.{e}", b"x")])))
        )  # type: ignore[misc]
    for job in jobs:
        with contextlib.suppress(DataError):
            job()


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def everything(watch: Watch) -> Iterator[dict[str, Any]]:
    """The results of all fixtures."""
    for fixture in [*shard_fixtures(), *member_fixtures()]:
        run = RUNS[fixture.kind]
        yield attempt(fixture.name, fixture.expect, lambda p, f=fixture, r=run: r(f, p), watch)  # type: ignore[misc]
    for name, data in (
        ("pickle as token cache", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
        ("token cache of 2^62", b"\xff" * 64),
    ):
        yield attempt(name, "refused", lambda p, d=data: run_cache(p, d) or [], watch)  # type: ignore[misc, func-returns-value]


def control(place: Path) -> list[str]:
    """What the hook must notice, done on purpose."""
    exec("1")
    pickle.loads(pickle.dumps(Path))
    socket.socket().close()
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), 0.1)
    with contextlib.suppress(OSError):
        Path("/proc/none/x").write_text("x")
    with contextlib.suppress(OSError):
        subprocess.Popen(["/nonexistent/program"])
    return []


def main(place: Path) -> None:
    """See the head of this file."""
    warnings.simplefilter("ignore")
    watch = Watch(place)
    sys.addaudithook(watch)
    warm(place)
    fixtures = everything(watch)
    resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))
    watch.armed = True
    for result in fixtures:
        print(json.dumps(result), flush=True)
    print(json.dumps({"control": attempt("control", "harmless", control, watch)["events"]}))
    watch.armed = False
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": round(peak)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
