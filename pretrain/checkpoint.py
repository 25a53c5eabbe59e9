"""Checkpoints that any layout can load: safetensors shards and a JSON manifest, committed by a rename.

`step-00000040.tmp/` is filled by all ranks through torch.distributed.checkpoint (no pickle: Hugging Face
storage writes plain safetensors), then rank 0 hashes and fsyncs every file, writes `manifest.json` last,
fsyncs the folder and renames it. A folder without a manifest, or whose files differ from it, is never
loaded; the one before it is, with a warning. Older checkpoints go only after the new one reads back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.api import CheckpointException

from ringweave.parallel import watch
from ringweave.pretrain.errors import StorageError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint on disk and its verified manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps trained."""
        return int(self.manifest["step"])


def checkpoint_name(step: int) -> str:
    """`step-00000040`."""
    return f"step-{step:08d}"


def save(
    root: Path,
    step: int,
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    *,
    keep: int,
    stage_ends: bool = False,
) -> tuple[Saved, dict[str, float]]:
    """Write, commit and verify a checkpoint; every rank calls it. Gives it and {seconds, bytes}.

    keep: how many of the newest stay; stage_ends: and those of the ends of stages.
    Raises StorageError on every rank, leaving older checkpoints untouched and nothing half-made behind.
    """
    started = time.monotonic()
    final = root / checkpoint_name(step)
    temporary = root / (final.name + ".tmp")
    on_first_rank(lambda: _fresh(temporary))
    try:
        with _one_process_is_meant():
            dcp_save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except (
        Exception,
        CheckpointException,
    ) as e:  # the latter is no Exception, so that nobody catches it by accident
        on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise _storage_error(e, final, tensors) from e
    files: dict[str, Any] = on_first_rank(lambda: _commit(temporary, final, step, manifest))
    size = sum(f["size"] for f in files.values())
    saved = Saved(final, {**manifest, "step": step, "files": files})
    on_first_rank(lambda: retire(root, saved, keep, stage_ends=stage_ends))
    return saved, {"seconds": time.monotonic() - started, "bytes": float(size)}


def load(saved: Saved, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint, whatever layout wrote it; every rank calls it."""
    alone = not dist.is_initialized()
    with _one_process_is_meant():
        dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(saved.path)), no_dist=alone)


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without torch's remark that torch.distributed is disabled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def find(root: Path, *, warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint whose every file matches its manifest; damaged ones are passed over loudly."""
    if not root.is_dir():
        return None
    names = sorted((p.name for p in root.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
    for name in names:
        path = root / name
        try:
            return Saved(path, verify(path))
        except StorageError as e:
            warn(f"checkpoint {name} is not usable and was passed over: {e.what} ({e.why or e.where})")
    if names:
        raise StorageError(
            f"none of the {len(names)} checkpoints is usable",
            where=str(root),
            why="each has a missing or altered file (see the warnings above)",
            fix="restore one from a backup, or move the folder away to start from step 0",
        )
    return None


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint after checking every file's size and sha256. Raises StorageError."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise StorageError(
                f"checkpoint format {manifest['format']} is not {FORMAT}",
                where=str(path),
                fix="update ringweave",
            )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StorageError("manifest.json is missing or unreadable", where=str(path), why=str(e)) from e
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise StorageError(f"{name} is missing", where=str(path))
        size = file.stat().st_size
        if size != expected["size"]:
            raise StorageError(
                f"{name} has {size} bytes, its manifest says {expected['size']}", where=str(path)
            )
        digest = _sha256(file)
        if digest != expected["sha256"]:
            raise StorageError(
                f"{name} was altered",
                where=str(path),
                why=f"sha256 {digest[:12]}…, expected {expected['sha256'][:12]}…",
            )
    return manifest


def _fresh(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _commit(temporary: Path, final: Path, step: int, manifest: dict[str, Any]) -> dict[str, Any]:
    """Hash, fsync, manifest last, rename: after the rename the checkpoint exists, before it does not."""
    try:
        files = {}
        for file in sorted(temporary.iterdir()):
            _fsync(file)
            files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        record = {"format": FORMAT, **manifest, "step": step, "files": files}
        target = temporary / "manifest.json"
        target.write_text(json.dumps(record, indent=1))
        _fsync(target)
        _fsync(temporary)
        if final.exists():  # the same step saved again, by a later attempt
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(final.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return files


def retire(root: Path, newest: Saved, keep: int, *, stage_ends: bool = False) -> None:
    """Delete checkpoints beyond `keep` (with stage_ends not those of stages' ends), once the newest reads back."""
    verify(newest.path)
    old = sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), reverse=True)[max(keep, 1) :]
    for path in old:
        if not (stage_ends and ended_stage(path) is not None):
            shutil.rmtree(path)


def ended_stage(path: Path) -> int | None:
    """The stage (0-based) at whose end a checkpoint was made, None for one within a stage or without a manifest."""
    try:
        cursor = json.loads((path / "manifest.json").read_text())["cursor"]
        return int(cursor["stage"]) - 1 if cursor["stage_step"] == 0 and cursor["stage"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def at_stage_ends(root: Path) -> dict[int, int]:
    """{stage (0-based): step} of the checkpoints that are there of stages' ends, in order; none is verified."""
    names = sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name)) if root.is_dir() else []
    found = {ended_stage(p): int(p.name.removeprefix("step-")) for p in names}
    return {stage: step for stage, step in found.items() if stage is not None}


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run on rank 0 and give every rank its result, or raise its failure on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _guarded(action, raise_now=True)[0]
    box = [_guarded(action) if dist.get_rank() == 0 else None]
    with watch.at("broadcast of rank 0's result", 0):
        dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    value, failure = box[0]
    if failure is not None:
        raise StorageError(**failure)
    return value


def _guarded(action: Callable[[], Any], *, raise_now: bool = False) -> tuple[Any, dict[str, str] | None]:
    try:
        return action(), None
    except (OSError, StorageError) as e:
        error = e if isinstance(e, StorageError) else _storage_error(e, Path(str(e.filename or "")), {})
        if raise_now:
            raise error from e
        return None, {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}


def _storage_error(e: BaseException, path: Path, tensors: dict[str, Tensor]) -> StorageError:
    """Name a failed save: what was to be written, how much of it, and what the system said."""
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    said = str(e) if isinstance(e, OSError) else _first_cause(e)
    size = f"{need / 2**20:.1f} MiB of tensors" if need else "its files"
    return StorageError(
        "the checkpoint could not be saved",
        where=str(path),
        why=f"{said.strip().splitlines()[-1] if said.strip() else type(e).__name__} (needs {size})",
        fix="free space or point run.dir elsewhere; older checkpoints are untouched",
    )


def _first_cause(e: BaseException) -> str:
    failures = getattr(e, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {cause}"
    return str(e)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
