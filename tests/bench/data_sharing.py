"""Tokens/s into the trainer with decoding and tokenization on, on the 4 ranks of one data index (dp1·tp2·sp2).

All four ranks need the whole documents of the same packs. Ours: they share out the decoding and hand round the tokens
over gloo. Rival: every rank decodes for itself, as loaders do that know only of data ranks. Pictures (PNG, JPEG) and
sounds (FLAC) with captions, nothing cached; the same plans on both sides, and the packs are checked to be equal.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch.distributed as dist
import webdataset
from _harness import Part, arguments, emit, pinned_ranks
from PIL import Image

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.index import build_index, write_index
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.data_pipes.workers import Setup, TokenWorkers
from ringweave.pretrain.batch_reader import BatchReader
from ringweave.pretrain.data_exchange import DocumentExchange, data_groups
from ringweave.pretrain.prefetch import Prefetcher
from ringweave.tokenizers.fit import FitSizes, fit_tokenizers
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.set import TokenizerSet

RANKS, BATCH, CONTEXT = 4, 4, 4096
PLANS = {"image": ("caption", "image"), "photo": ("caption", "image"), "audio": ("caption", "audio")}
CAPTION = "a small boat lies still on the water and the light is low"


def picture(seed: int, form: str, size: int = 128) -> bytes:
    """A smooth picture with some grain, so that it costs what photographs cost."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(x * rng.uniform(1, 9) + y * rng.uniform(1, 9) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, form)
    return out.getvalue()


def sound(seed: int, seconds: float = 2.0, rate: int = 16_000) -> bytes:
    """A chord with some noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(150, 900, 3)) + rng.normal(0, 0.1, len(t))
    out = io.BytesIO()
    soundfile.write(out, (wave * 6000).astype(np.int16), rate, format="FLAC")
    return out.getvalue()


def record(source: str, seed: int) -> dict[str, bytes]:
    """One sample of a source."""
    media = {
        "image": lambda: {"png": picture(seed, "PNG")},
        "photo": lambda: {"jpg": picture(seed, "JPEG")},
        "audio": lambda: {"flac": sound(seed)},
    }
    return {**media[source](), "txt": f"{CAPTION} {seed}".encode()}


def build(folder: Path, samples: int) -> None:
    """Shards, tokenizers and lengths; no tokens."""
    fitted = {name: [record(name, 10_000 + n) for n in range(12)] for name in PLANS}
    text = [{"txt": f"{CAPTION} {n} {CAPTION[::-1]}".encode()} for n in range(40)]
    records = {"text": text, "image": fitted["image"] + fitted["photo"], "audio": fitted["audio"]}
    sizes = FitSizes(text_pieces=300, image_codes=512, audio_codes=128)
    fit_tokenizers(records, folder / "tokenizers", sizes=sizes)
    tokenizers = TokenizerSet.load(folder / "tokenizers")
    for name, plan in PLANS.items():
        shard = folder / f"{name}.tar"
        with open(shard, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for n in range(samples):
                writer.write({"__key__": f"{name}{n:05d}", **record(name, n)})
        write_index(shard, build_index(shard))
        make_lengths(shard, plan, tokenizers, store_tokens=False)


def stream(folder: Path) -> PackStream:
    """The plans from the start; tokens are made, not stored."""
    manifest = VocabularyManifest.load(folder / "tokenizers" / "tokenizers.json")
    workers = TokenWorkers(0, Setup(args=[str(folder / "tokenizers")]))
    specs = [SourceSpec(name, [folder / f"{name}.tar"], plan) for name, plan in PLANS.items()]
    corpus = Corpus.open(specs, manifest_hash=manifest.hash, workers=workers, store=False)
    planner = PackPlanner(lengths=corpus.lengths, weights=dict.fromkeys(PLANS, 1.0), seed=0, context=CONTEXT)
    return PackStream(corpus, planner)


def measure(folder: Path, exchange: DocumentExchange, steps: int) -> tuple[float, int, list[Any]]:
    """(seconds, tokens, ids of the last batch) of reading `steps` batches, as one rank of those that share."""
    source = Prefetcher(
        BatchReader(stream(folder), count=BATCH, mine=range(BATCH), exchange=exchange), depth=0
    )
    source.next()  # loads the tokenizers
    dist.barrier()
    started, tokens = time.perf_counter(), 0
    for _ in range(steps):
        batch = source.next()
        tokens += sum(plan.tokens for plan in batch.plans)
    dist.barrier()
    return time.perf_counter() - started, tokens, [pack.ids.tolist() for pack in batch.packs]


def ranks(folder: str, steps: int, runs: int) -> list[tuple[float, float]]:
    """Tokens/s (shared, each for itself) of each run; every other run the other way round."""
    shared, _ = data_groups(np.arange(RANKS).reshape(1, RANKS))
    found = []
    for run in range(runs + 1):
        sides = [shared, DocumentExchange()]
        results: list[Any] = [None, None]
        for n in (0, 1) if run % 2 == 0 else (1, 0):
            results[n] = measure(Path(folder), sides[n], steps)
        assert results[0][1:] == results[1][1:], "both sides must read the same packs"
        if run:  # the first one warms up
            found.append((results[0][1] / results[0][0], results[1][1] / results[1][0]))
    return found


def main() -> None:
    """Build the data, run the pairs, print the line."""
    args = arguments(__doc__)
    samples, steps, runs = (24, 2, 1) if args.tiny else (400, 12, args.runs)
    with tempfile.TemporaryDirectory() as place:
        build(Path(place), samples)
        pairs = pinned_ranks(RANKS, ranks, place, steps, runs)[0]
    ours, rival = zip(*pairs)
    part = Part("decode and tokenize", ours, rival, "tokens/s", 2.0, "higher")
    emit(
        "data sharing: 4 ranks of one data index decode each document once",
        part,
        versions=("pillow", "soundfile"),
        ranks=RANKS,
        layout="dp1·tp2·sp2",
        context=CONTEXT,
    )


if __name__ == "__main__":
    main()
