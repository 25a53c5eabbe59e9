"""Plain folders and JSONL files into shards: what goes in, what stays out, and why.

Files that share a path without their ending are one sample (`cats/1.jpg` and `cats/1.txt` are `cats/1`).
Links, special files, and names that no shard may hold are skipped and reported, hidden files are skipped and
counted. The order of the samples is that of their keys, and the side a sample is on (train or held-out)
follows from a hash of its key: the same folder gives the same bytes on any machine.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from ringweave.data_pipes.jsonl import Line, check_line, read_lines
from ringweave.data_pipes.shard_writer import Member, ShardWriter
from ringweave.tokenizers.errors import DataError

Report = Callable[[str, int, int], None]
#: Endings of two parts; anything else ends behind its last dot.
_DOUBLE = re.compile(r"(?i)\.((?:layer\d+|flat|seg)\.png|timemap\.json)$")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u202a-\u202e\u2066-\u2069]")
#: Left behind by file managers; nobody means them.
_LITTER = frozenset(["thumbs.db", "desktop.ini", "__macosx"])
_ENDING = re.compile(r"[A-Za-z0-9_+-]{1,32}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass
class Scan:
    """samples: key -> {extension: path below the folder}; skipped: [{"file", "reason"}]; hidden: a count."""

    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    hidden: int = 0
    _stems: dict[str, str] = field(default_factory=dict)

    def skip(self, path: str, reason: str) -> None:
        self.skipped.append({"file": path, "reason": reason})


def scan_folder(folder: Path) -> Scan:
    """Groups the files of a folder into samples. Raises DataError when it cannot be read or holds none."""
    scan = Scan()
    try:
        _walk(Path(folder), "", scan)
    except OSError as error:
        raise DataError("cannot read the folder", where=str(folder), why=str(error)) from None
    if not scan.samples:
        why = f"{len(scan.skipped)} files cannot be used, {scan.hidden} are hidden"
        raise DataError("no samples in this folder", where=str(folder), why=why, fix="give a folder of files")
    return scan


def _walk(folder: Path, below: str, scan: Scan) -> None:
    with os.scandir(folder / below) as found:
        listed = sorted(found, key=lambda entry: os.fsencode(entry.name))
    for entry in listed:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            scan.hidden += 1
        elif entry.is_symlink():
            scan.skip(path, "a symbolic link")
        elif _CONTROL.search(entry.name) or not _is_utf8(entry.name):
            scan.skip(path, "an unsafe name (control or text-direction characters, backslash, not UTF-8)")
        elif entry.is_dir(follow_symlinks=False):
            _walk(folder, path, scan)
        elif not entry.is_file(follow_symlinks=False):
            scan.skip(path, "not a regular file")
        else:
            _take(path, scan)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _take(path: str, scan: Scan) -> None:
    folder, slash, base = path.rpartition("/")
    double = _DOUBLE.search(base)
    stem, ext = (base[: double.start()], double[1]) if double else base.rpartition(".")[::2]
    if not stem or not _ENDING.fullmatch(ext.rpartition(".")[2]):
        return scan.skip(path, "no ending that could name its kind")
    # A key ends at its first dot wherever WebDataset is read, so dots inside it cannot stay.
    key, original = folder + slash + stem.replace(".", "_"), folder + slash + stem
    if scan._stems.setdefault(key, original) != original:
        return scan.skip(path, f"its key {key!r} is that of {scan._stems[key]!r}")
    members = scan.samples.setdefault(key, {})
    if ext.lower() in members:
        return scan.skip(path, f"a second member {ext.lower()!r} of {key!r}")
    members[ext.lower()] = path
    return None


def build_from_folder(
    folder: Path,
    out: Path,
    *,
    name: str,
    shard_bytes: int,
    heldout: float = 0.0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Writes the folder's samples into `out` as `name-train-0000.tar` ... and, with `heldout`, held-out ones.

    Returns {"samples", "heldout", "bytes", "shards", "members": {extension: samples with it}, "skipped",
    "hidden"}. Raises DataError for a folder without samples, `out` inside it, or existing shards.
    """
    check_name(name)
    root, target = Path(folder).resolve(), Path(out).resolve()
    if target == root or target.is_relative_to(root):
        raise DataError("the output lies inside the folder", where=str(out), fix="give a folder outside it")
    scan = scan_folder(root)
    samples = ((key, _Files(root, members)) for key, members in sorted(scan.samples.items(), key=_by_key))
    facts = _write(samples, len(scan.samples), out, name, shard_bytes, heldout, progress)
    counts = Counter(ext for members in scan.samples.values() for ext in members)
    return {**facts, "members": dict(sorted(counts.items())), "skipped": scan.skipped, "hidden": scan.hidden}


def _by_key(item: tuple[str, Any]) -> bytes:
    return item[0].encode()


def check_name(name: str) -> None:
    """DataError unless `name` can begin a shard's file name: letters, digits, "_" and "-"."""
    if not _NAME.fullmatch(name):
        raise DataError(
            f"bad source name {name!r}", why="letters, digits, '_' and '-' only", fix="give --name NAME"
        )


def is_heldout(key: str, share: float) -> bool:
    """Side of a key, by its hash alone."""
    digest = blake2b(b"ringweave-heldout/" + key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class _Files:
    """The members of a sample, opened when they are written."""

    def __init__(self, root: Path, members: dict[str, str]) -> None:
        self._root, self._members = root, members

    def open(self, stack: ExitStack) -> list[Member]:
        return [(ext, self._file(path, stack)) for ext, path in sorted(self._members.items())]

    def _file(self, path: str, stack: ExitStack) -> tuple[BinaryIO, int]:
        """Opened without following a link that took the file's place since the scan."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            file = stack.enter_context(os.fdopen(os.open(self._root / path, flags), "rb"))
            status = os.fstat(file.fileno())
        except OSError as error:
            raise DataError("cannot read a file", where=str(self._root / path), why=str(error)) from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError("no longer a regular file", where=str(self._root / path))
        return file, status.st_size


class _Bytes:
    """The members of a sample that is in memory."""

    def __init__(self, members: list[Member]) -> None:
        self._members = members

    def open(self, stack: ExitStack) -> list[Member]:
        return self._members


def _write(
    samples: Iterable[tuple[str, _Files | _Bytes]],
    total: int,
    out: Path,
    name: str,
    shard_bytes: int,
    heldout: float,
    progress: Report | None,
) -> dict[str, Any]:
    """Both sides of a set, all or nothing."""
    if shard_bytes < 1 or not 0 <= heldout < 1:
        raise DataError(f"shard size {shard_bytes} must be positive, held-out share {heldout} in [0, 1)")
    with ExitStack() as writers:
        train = writers.enter_context(ShardWriter(out, f"{name}-train", shard_bytes=shard_bytes))
        held = writers.enter_context(ShardWriter(out, f"{name}-heldout", shard_bytes=shard_bytes))
        for done, (key, members) in enumerate(samples, 1):
            with ExitStack() as files:
                (held if is_heldout(key, heldout) else train).add(key, members.open(files))
            if progress is not None:
                progress(f"writing {name}", done, max(done, total))
        if not train.count:
            raise DataError("nothing is left to train on", why=f"{held.count} samples are held out")
        shards = [*train.close(), *held.close()]
    return {
        "samples": train.count,
        "heldout": held.count,
        "bytes": train.bytes + held.bytes,
        "shards": [path.name for path in shards],
    }


def build_from_jsonl(
    source: Path,
    out: Path,
    *,
    name: str,
    fields: str = "",
    shard_bytes: int,
    heldout: float = 0.0,
    max_skip_rate: float = 0.05,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Writes the lines of a JSONL file into shards, each verbatim as the member json of sample `name-LINE`.

    A line that cannot be used (see `jsonl.check_line`) is left out, and listed with number, offset and reason
    in the result and in `name-skipped.jsonl`; beyond `max_skip_rate` of the lines DataError, and nothing is
    written. Returns as `build_from_folder`.
    """
    check_name(name)
    skipped: list[dict[str, Any]] = []
    read = Counter[str]()

    def usable() -> Iterator[tuple[str, _Bytes]]:
        for line in read_lines(source):
            read["lines"] += 1
            try:
                check_line(line, source, fields, key=line.key(name))
            except DataError as error:
                skipped.append({"line": line.number, "offset": line.offset, "reason": error.render()})
                continue
            yield line.key(name), _Bytes([("json", line.data)])
        _few_enough(skipped, read["lines"], max_skip_rate, source)

    facts = _write(usable(), 0, out, name, shard_bytes, heldout, progress)
    if skipped:
        text = "".join(json.dumps(entry, ensure_ascii=True) + "\n" for entry in skipped)
        (Path(out) / f"{name}-skipped.jsonl").write_text(text, encoding="utf-8")
    count = facts["samples"] + facts["heldout"]
    return {**facts, "members": {"json": count}, "skipped": skipped, "hidden": 0}


def _few_enough(skipped: list[dict[str, Any]], lines: int, rate: float, source: Path) -> None:
    allowed = max(1, int(rate * lines)) if rate > 0 else 0
    if len(skipped) > allowed or len(skipped) == lines:
        first = "; ".join(entry["reason"].replace("\n", " ") for entry in skipped[:3])
        raise DataError(
            f"{len(skipped)} of {lines} lines cannot be used",
            where=str(source),
            why=first or "it holds no line",
            fix="correct the lines, or allow a higher rate with --max-skips",
        )


__all__ = ["Line", "Scan", "build_from_folder", "build_from_jsonl", "check_name", "is_heldout", "scan_folder"]
