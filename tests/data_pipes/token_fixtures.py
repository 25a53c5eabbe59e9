"""Tokenizers and a reader that misbehave when told to, importable by worker processes; shards to use them on."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.workers import Setup
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.segment import Document, Role, Segment

HERE = str(Path(__file__).parent)


class Bytes:
    """A tokenizer set of bytes and pixels. log: file that gets a line for each document begun, from any process."""

    def __init__(self, log: str = "", *, shift: int = 0) -> None:
        self.log, self.shift = log, shift
        self.manifest = SimpleNamespace(hash=f"{shift:064x}")

    def _segment(self, values: np.ndarray, modality: str, role: Role, weight: float) -> Segment:
        ids = values.astype(np.int32).ravel() + 256 + self.shift
        positions = np.zeros((len(ids), 4), np.int32)
        positions[:, 0], positions[:, 2] = np.arange(len(ids)), ids % 11
        return Segment(ids, modality, positions, role=role, weight=weight)

    def text_segment(self, text: str, *, role: Role = "target", weight: float = 1.0) -> Segment:
        """One token a byte; some texts are orders."""
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {text[:40]}\n")
        obey(text)
        return self._segment(np.frombuffer(text.encode(), np.uint8), "text", role, weight)

    def image_segment(self, image: np.ndarray, *, role: Role = "target", weight: float = 1.0) -> Segment:
        """One token a pixel and channel."""
        return self._segment(image, "image", role, weight / 3)

    def document(self, key: str, segments: list[Segment]) -> Document:
        """The segments as they are."""
        return Document(key, tuple(segments))


def obey(text: str) -> None:
    """What decoders do to a process, on command."""
    order, _, argument = text.partition(" ")
    if order == "hang":
        while True:
            time.sleep(1)
    elif order == "eat":
        held = []
        while True:
            held.append(bytearray(8 << 20))
    elif order in ("segfault", "kill"):
        os.kill(os.getpid(), signal.SIGSEGV if order == "segfault" else signal.SIGKILL)
    elif order == "once" and not os.path.exists(argument):
        Path(argument).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif order == "slow":
        time.sleep(float(argument.split()[0]))
    elif order == "mistake":
        raise ValueError("a mistake in a decoder")
    elif order == "undecodable":
        raise DataError("cannot decode this text", where="a test")
    elif order == "foreign":
        raise VocabularyError("not of this vocabulary")


def make(log: str = "", shift: int = 0) -> Bytes:
    """For workers."""
    return Bytes(log, shift=int(shift))


class StallingReader(ShardReader):
    """A shard in a store that stalls on the samples whose number is written in `file`."""

    def __init__(self, shard: str, *, file: str) -> None:
        super().__init__(Path(shard))
        self._file = file

    def read(self, i: int) -> Sample:
        """As usual, or the error of a store that did not answer."""
        if str(i) in Path(self._file).read_text().split():
            raise DataError("the store stalled", where=f"{self.path}#{self.keys[i]}", why="no bytes for 20 s")
        return super().read(i)


def setup(*args: Any, reader: str | None = None, **options: Any) -> Setup:
    """What a worker loads to be `Bytes(*args)`."""
    made = Setup(args=[str(a) for a in args], load="token_fixtures:make", path=(HERE,))
    if reader is not None:
        made.reader, made.reader_options = f"token_fixtures:{reader}", options
    return made


def png(width: int, seed: int) -> bytes:
    """A small picture."""
    out = io.BytesIO()
    pixels = ((np.arange(2 * width * 3) * 37 + seed) % 251).astype(np.uint8).reshape(2, width, 3)
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write_shard(path: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    """An indexed shard of these members; keys are the shard's name and a number."""
    import webdataset  # not at the top: it imports torch, which workers do without

    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for i, members in enumerate(samples):
            writer.write({"__key__": f"{path.stem}-{i}", **members})
    write_index(path, build_index(path))
    return path


def texts(
    count: int, *, orders: dict[int, str] | None = None, words: int = 3, tag: str = ""
) -> list[dict[str, bytes]]:
    """Samples of text of different lengths, each with `tag` in front; orders: number -> text that is one."""
    plain = {i: tag + str(i) + " word" * (1 + i % words) for i in range(count)}
    return [{"txt": text.encode()} for text in (plain | (orders or {})).values()]


def same(ours: Document, other: Document) -> bool:
    """Whether two documents are equal, bit for bit, latents and all."""
    return ours.key == other.key and len(ours.segments) == len(other.segments) and all(
        (a.modality, a.role, a.attends, a.weight) == (b.modality, b.role, b.attends, b.weight)
        and a.ids.dtype == b.ids.dtype == np.int32 == a.positions.dtype == b.positions.dtype
        and np.array_equal(a.ids, b.ids) and np.array_equal(a.positions, b.positions)
        and (a.latents is None) == (b.latents is None)
        and (a.latents is None or b.latents is None or (
            a.latents.dtype == b.latents.dtype and np.array_equal(a.latents, b.latents)
        ))
        for a, b in zip(ours.segments, other.segments)
    )  # fmt: skip
