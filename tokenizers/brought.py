"""Codecs from outside as members of a tokenizer set: their weights lie in a folder of the set.

A set holds `image.outside.json` (kind, identity, how it is read) and the weights in `image/`, in place of
`image.safetensors`. The identity (sha256 over weights, config and reading) stands in the vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.manifest import canonical_json

DESCRIPTION = ".outside.json"
#: Codecs of a set that may be brought, and how their kinds begin.
BROUGHT = {"image": "image.", "audio": "audio."}
_COPIED = ("*.safetensors", "config.json", "*.safetensors.index.json")


class Brought:
    """`OutsideImage` or `OutsideAudio` with the interface of our codecs. weights: the folder or file they lie in.

    Missing codes (-1) are read as code 0: such codecs have no empty cell.
    """

    def __init__(self, name: str, codec: Any, weights: Path, options: dict[str, Any]) -> None:
        self.name, self.codec, self.weights, self.options = name, codec, Path(weights), options
        self.kind, self.sha256, self.codes = str(codec.kind), str(codec.sha256), int(codec.codes)
        if name == "image":
            self.patch = int(codec.patch)
        else:
            self.rate, self.hop, self.books = int(codec.rate), int(codec.hop), int(codec.books)

    @classmethod
    def load(cls, name: str, weights: Path, **options: Any) -> Brought:
        """Read weights as `load_outside` does; VocabularyError when they are not of a codec `name` can be."""
        from ringweave.tokenizers.outside_load import load_outside

        codec = load_outside(Path(weights), **options)
        if not codec.kind.startswith(BROUGHT[name]):
            raise VocabularyError(
                f"a codec of kind {codec.kind!r} cannot stand for {name}",
                where=str(weights),
                fix="latents are not ids: discrete codecs are VQModel, taming, LlamaGen, LWM, EnCodec, DAC, Mimi",
            )
        return cls(name, codec, Path(weights), options)

    def encode(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """Pictures uint8 [..., H, W, 3] -> [..., h, w]; sound int16 [T] at `rate` -> [F, books]."""
        codes = self.codec.encode(values) if self.name == "image" else self.codec.encode(values, self.rate)
        return np.asarray(codes, np.int32)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[Any]:
        """Inverse of `encode`, to uint8 or int16."""
        decoded: NDArray[Any] = self.codec.decode(np.maximum(codes, 0))
        return decoded

    def to_bytes(self) -> bytes:
        """The description."""
        text = canonical_json({"kind": self.kind, "sha256": self.sha256, "options": self.options})
        return text.encode("utf-8")

    def copy_weights(self, folder: Path) -> None:
        """Weights and config into `folder`, unless they lie there already."""
        source = self.weights if self.weights.is_dir() else self.weights.parent
        if folder.exists() and source.samefile(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [self.weights] if self.weights.is_file() else []
        patterns = ("config.json",) if wanted else _COPIED
        for file in [*wanted, *(found for pattern in patterns for found in source.glob(pattern))]:
            shutil.copyfile(file, folder / file.name)


def read_brought(name: str, data: bytes, weights: Path, *, where: str) -> Brought:
    """The codec that a description names. VocabularyError when it is malformed; identities are compared elsewhere."""
    try:
        described = json.loads(data)
        options = dict(described["options"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VocabularyError(
            "not a description of a codec from outside", where=where, why=f"{type(error).__name__}: {error}"
        ) from error
    return Brought.load(name, weights, **options)
