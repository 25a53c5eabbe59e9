"""A small but real corpus and tokenizer set, made once, copied for each test that damages it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ringweave.data_pipes.demo import build_demo
from ringweave.launch.commands_data import records_by_source
from ringweave.tokenizers.fit import FitSizes, fit_tokenizers

# Test modules are imported one by one (import mode "importlib"), so shared helpers need a path of their own.
sys.path.append(str(Path(__file__).parent))

from hostile_server import HostileServer, serving

SOURCES = {
    "text": ["text"],
    "image": ["caption", "image"],
    "rgba": ["caption", "rgba"],
    "score": ["score"],
    "audio": ["audio"],
    "video": ["caption", "video"],
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data/ (a few records of every source) and tokenizers/."""
    place = tmp_path_factory.mktemp("made")
    build_demo(place / "data", limit=12, workers=1)
    sizes = FitSizes(
        text_pieces=600,
        image_codes=128,
        rgba_alpha_codes=64,
        rgba_colour_codes=64,
        audio_codes=64,
        score_codes=128,
    )
    fit_tokenizers(records_by_source(place / "data", "train"), place / "tokenizers", sizes=sizes)
    return place


class Job:
    """A copy of the small corpus with a config that trains on it in one process."""

    def __init__(self, made: Path, place: Path) -> None:
        self.place, self.data, self.run = place, place / "data", place / "run"
        shutil.copytree(made / "data", self.data)
        self.values = {
            "run": {"name": "job", "seed": 1, "dir": str(self.run)},
            "tokenizers": {"dir": str(made / "tokenizers")},
            "data": {
                "dir": str(self.data),
                "workers": {"count": 0},
                "sources": [
                    {
                        "name": n,
                        "shards": f"{n}-train-0000.tar",
                        "heldout": f"{n}-heldout-0000.tar",
                        "plan": plan,
                    }
                    for n, plan in SOURCES.items()
                ],
            },
            "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 2},
            "optimizer": {"lr": 1e-3},
            "stages": [{"context": 128, "batch": 2, "tokens": 1024}],
            "checkpoint": {"every": "2 steps"},
            "log": {"tensorboard": False},
        }

    def config(self) -> str:
        """The config as a file."""
        path = self.place / "job.yaml"
        path.write_text(yaml.safe_dump(self.values))
        return str(path)


@pytest.fixture
def job(made: Path, tmp_path: Path) -> Job:
    return Job(made, tmp_path)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    """A web server on this machine that misbehaves on demand (hostile_server.py)."""
    with serving() as server:
        yield server
