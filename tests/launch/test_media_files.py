"""`tokenizer encode FILE` hands on what training hands on: the same pixels, the same sound."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.sample import Sample
from ringweave.launch.media_files import encode_file, write_decoded
from ringweave.pretrain.errors import ConfigError
from ringweave.tokenizers.parse import Decoded
from ringweave.tokenizers.segment import Document, Segment


class Recorder:
    """One token a segment, and a note of what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_segment"):
            raise AttributeError(name)

        def segment(*values: Any, **_: Any) -> Segment:
            self.given.append((name, values))
            return Segment(np.zeros(1, np.int32), name.removesuffix("_segment"), np.zeros((1, 4), np.int32))

        return segment

    def document(self, key: str, segments: list[Segment]) -> Document:
        return Document(key, tuple(segments))


def picture(mode: str) -> bytes:
    sink = io.BytesIO()
    rng = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = rng.integers(0, 256, (9, 7, channels)).astype(np.uint8)
    Image.fromarray(pixels.squeeze() if channels == 1 else pixels, mode).save(sink, "PNG")
    return sink.getvalue()


def sound() -> bytes:
    sink = io.BytesIO()
    soundfile.write(
        sink, np.random.default_rng(1).integers(-9999, 9999, (501, 2)).astype(np.int16), 8000, format="WAV"
    )
    return sink.getvalue()


@pytest.mark.parametrize(
    ("ending", "modality", "data"),
    [
        *(
            ("png", kind, picture(mode))
            for kind in ("image", "rgba", "score")
            for mode in ("RGB", "RGBA", "L")
        ),
        ("wav", "audio", sound()),
        ("musicxml", "symbolic", b"<x/>"),
        ("mid", "midi", b"MThd"),
        ("txt", "text", "é".encode()),
    ],
)
def test_a_file_is_read_as_its_member_would_be(
    tmp_path: Path, ending: str, modality: str, data: bytes
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(data)
    alone, trained = Recorder(), Recorder()
    assert encode_file(path, alone, modality=modality).modality == modality
    member = "layer0.png" if modality == "rgba" else ending
    encode_sample(Sample("k", {member: data}, "s.tar", 0), [modality], trained)  # type: ignore[arg-type]
    (name, ours), (theirs_name, theirs) = alone.given[0], trained.given[0]
    assert name == theirs_name and len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert np.array_equal(mine, other)


def test_endings_name_their_modality(tmp_path: Path) -> None:
    path = tmp_path / "a.mid"
    path.write_bytes(b"MThd")
    assert encode_file(path, Recorder()).modality == "midi"
    with pytest.raises(ConfigError, match=r"no modality known for \.xyz"):
        encode_file(tmp_path / "a.xyz", Recorder())


def test_decoded_notes_become_files(tmp_path: Path) -> None:
    items = [
        Decoded("symbolic", "<x/>", 0, 1, True),
        Decoded("midi", b"MThd", 1, 2, True),
        Decoded("text", "t", 2, 3, True),
    ]
    written = write_decoded(items, tmp_path)
    names = [Path(entry["files"][0]).name for entry in written]
    assert names == ["000-symbolic.musicxml", "001-midi.mid", "002-text.txt"]
    assert (tmp_path / names[1]).read_bytes() == b"MThd"
