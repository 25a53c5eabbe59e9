"""A small tokenizer set, fitted once a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ringweave.tokenizers.fit import fit_tokenizers
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.video import VideoCodec

# Test modules are imported one by one (import mode "importlib"), so shared helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

from tokenizer_samples import SMALL, records


@pytest.fixture(scope="session")
def train_records() -> dict[str, list[dict[str, bytes]]]:
    """What the set is fitted to."""
    return records(0, 30)


@pytest.fixture(scope="session")
def folder(
    tmp_path_factory: pytest.TempPathFactory, train_records: dict[str, list[dict[str, bytes]]]
) -> Path:
    """A fitted set on disk."""
    path = tmp_path_factory.mktemp("tokenizers")
    fit_tokenizers(train_records, path, sizes=SMALL)
    return path


@pytest.fixture(scope="session")
def tokenizers(folder: Path) -> TokenizerSet:
    """The fitted set, loaded."""
    return TokenizerSet.load(folder)


@pytest.fixture(scope="session")
def moving(tokenizers: TokenizerSet) -> TokenizerSet:
    """The fitted set, and a video codec."""
    return tokenizers.extended({"video": VideoCodec()})


@pytest.fixture(scope="session")
def video_codec(moving: TokenizerSet) -> VideoCodec:
    found = moving.codecs["video"]
    assert isinstance(found, VideoCodec)
    return found
