"""Small sources for `data_resume.py`, and tokenizers that one of their texts is too much for until it is healed."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "data_pipes"))
from token_fixtures import Bytes, png, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.workers import Setup, TokenWorkers
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.segment import Role, Segment

HERE = Path(__file__).resolve().parent
HASH = "0" * 64
#: source -> plan, samples of each shard; `image` has fewer shards than a job has data ranks.
SOURCES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "image": (("caption?", "image"), (60,)),
    "notes": (("text",), (70, 50)),
    "text": (("text",), (50, 40, 45, 45)),
}
EPOCHS, LANES, BINS = 3, 4, 4
#: Packs of a global batch, of a balancing window; step that begins the second stage.
COUNT, WINDOW, SWITCH = 4, 8, 60
STAGES: tuple[dict[str, Any], ...] = (
    {"context": 256, "weights": {"text": 0.75, "image": 0.15, "notes": 0.10}},
    {"context": 640, "weights": {"text": 0.60, "image": 0.15, "notes": 0.25}},
)


class Breaking(Bytes):
    """Bytes as tokens; a text that begins with "broken" cannot be read while the file `heal` is not there."""

    def __init__(self, heal: str) -> None:
        super().__init__()
        self.heal = heal

    def text_segment(self, text: str, *, role: Role = "target", weight: float = 1.0) -> Segment:
        """One token a byte."""
        if text.startswith("broken") and not Path(self.heal).exists():
            raise DataError("cannot decode this text", where="a test")
        return super().text_segment(text, role=role, weight=weight)


def make(heal: str) -> Breaking:
    """For workers."""
    return Breaking(heal)


def write_data(folder: Path, *, seed: int = 0) -> None:
    """The shards with indexes and lengths, without tokens."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for name, (plan, shards) in SOURCES.items():
        for n, count in enumerate(shards):
            samples: list[dict[str, bytes]] = []
            for i in range(count):
                text = f"{name} {n} {i} " + "".join(rng.choices("abcdef ", k=rng.randrange(4, 90)))
                if name == "text":
                    broken = "broken " if (n, i) in ((1, 7), (3, 30)) else ""
                    text = broken + text + "x" * min(900, int(rng.lognormvariate(5.2, 0.8)))
                sample = {"txt": text.encode()}
                if name == "image":
                    sample["png"] = png(rng.randrange(3, 50), seed=i)
                samples.append(sample)
            shard = write_shard(folder / f"{name}-{n}.tar", samples)
            make_lengths(shard, plan, Bytes(), store_tokens=False)


def open_corpus(folder: Path, heal: str, *, workers: int, store: bool) -> Corpus:
    """The corpus of a rank; its workers tokenize what is not stored."""
    specs = [
        SourceSpec(name, [folder / f"{name}-{n}.tar" for n in range(len(shards))], plan)
        for name, (plan, shards) in SOURCES.items()
    ]
    setup = Setup(args=[heal], load="_resume_data:make", path=(str(HERE),))
    return Corpus.open(
        specs, manifest_hash=HASH, workers=TokenWorkers(workers, setup, timeout_s=60.0), store=store
    )


def new_planner(corpus: Corpus, *, seed: int) -> PackPlanner:
    """The plan of a run that begins."""
    return PackPlanner(
        lengths=corpus.lengths, seed=seed, batch=COUNT, window=WINDOW, bins=BINS, lanes=LANES, epochs=EPOCHS,
        **STAGES[0],
    )  # fmt: skip
