"""Many tasks over one record: each picture is encoded once, and no bit of any document is another for it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tokenizers")]

from token_fixtures import write_shard
from tokenizer_samples import picture, png

from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.encode_shards import encode_plans, encode_shard
from ringweave.data_pipes.layer_tasks import TASKS
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.worker_process import Setup
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.tokenizers import latent_codec
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.learn_vae import vae_config
from ringweave.tokenizers.picture_vae import PictureVae
from ringweave.tokenizers.segment import Document
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec

RECORDS = 3
PLANS = [TASKS["matting"], TASKS["text_to_layers"], ("text",), TASKS["removal_with_mask"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer set of words and latents."""
    config = vae_config(base=4, channels=2, patch=4)
    words = TextCodec.fit(["a disc and another disc over a third one"] * 9, size=300)
    made = tmp_path_factory.mktemp("set")
    TokenizerSet({"text": words, "latents": LatentCodec(config, PictureVae(config).to_stock())}).save(made)
    return made


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Records of three layers; no two records have one in common."""
    samples = []
    for n in range(RECORDS):
        layers = [picture(10 * n + k, "RGBA", 24).copy() for k in range(3)]
        layers[0][..., 3] = 255
        samples.append({f"layer{k}.png": png(layer) for k, layer in enumerate(layers)} | {"txt": b"a disc"})
    return write_shard(tmp_path / "scenes-0000.tar", samples)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each picture (black where it is clear) went through the autoencoder."""
    seen: Counter[bytes] = Counter()
    plain = LatentCodec._encoded

    def counted(self: LatentCodec, layer: Any) -> Any:
        seen[np.asarray(layer).tobytes()] += 1
        return plain(self, layer)

    monkeypatch.setattr(LatentCodec, "_encoded", counted)
    return seen


def bits(document: Document) -> list[Any]:
    """All that a document holds."""
    return [
        (
            s.ids.tobytes(), s.modality, s.positions.tobytes(), s.role, s.attends, np.asarray(s.weight).tobytes(),
            None if s.latents is None else (s.latents.dtype, s.latents.shape, s.latents.tobytes()),
        )
        for s in document.segments
    ]  # fmt: skip


def forget(tokenizers: TokenizerSet, limit: int) -> TokenizerSet:
    tokenizers.codecs["latents"]._memory = latent_codec._Memory(limit)
    return tokenizers


def test_no_task_of_a_record_encodes_a_picture_again(
    folder: Path, shard: Path, encoded: Counter[bytes]
) -> None:
    """All 39 tasks, with a memory, without one, and with one that holds two pictures."""
    found: dict[int, list[Any]] = {}
    times: dict[int, int] = {}
    for limit in (latent_codec.REMEMBERED, 0, 2 * 36 * 8 * 4):
        encoded.clear()
        tokenizers = forget(TokenizerSet.load(folder), limit)
        with ShardReader(shard) as reader:
            samples = [reader.read(n) for n in range(RECORDS)]
        found[limit] = [
            bits(encode_sample(sample, plan, tokenizers)) for plan in TASKS.values() for sample in samples
        ]
        times[limit] = sum(encoded.values())
        if limit == latent_codec.REMEMBERED:
            assert set(encoded.values()) == {1}
            assert times[limit] % RECORDS == 0 and times[limit] // RECORDS <= 12
    assert found[0] == found[latent_codec.REMEMBERED] == found[2 * 36 * 8 * 4]
    assert times[0] == sum(len([s for s in one if s[-1]]) for one in found[0]), "each grid once"
    assert times[0] > 7 * times[latent_codec.REMEMBERED]


def test_a_memory_holds_what_was_asked_for_last() -> None:
    memory = latent_codec._Memory(100)
    arrays = {key: np.full(10, n, np.float32) for n, key in enumerate([b"a", b"b", b"c"])}
    memory.keep(b"a", arrays[b"a"])
    memory.keep(b"b", arrays[b"b"])
    given = memory.get(b"a")
    assert given is not None
    given[:] = 9  # a copy
    memory.keep(b"c", arrays[b"c"])
    assert memory.get(b"b") is None and np.array_equal(memory.get(b"a"), arrays[b"a"])
    assert np.array_equal(memory.get(b"c"), arrays[b"c"])
    memory.keep(b"d", np.zeros(26, np.float32))  # larger than all of it
    assert memory.get(b"d") is None and memory.get(b"c") is not None
    for _ in range(3):
        memory.keep(b"c", arrays[b"c"])
    memory.keep(b"b", arrays[b"b"])
    assert [memory.get(key) is not None for key in (b"a", b"b", b"c")] == [False, True, True]


def files(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.iterdir() if p.suffix not in (".tar", ".idx")}


def test_caches_made_side_by_side_are_those_made_one_by_one(
    folder: Path, shard: Path, encoded: Counter[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, also after a stop in the middle; a memory too small for the shard is large enough for a batch."""
    setup, marked = Setup(args=[str(folder)]), TokenizerSet.load(folder).manifest.hash
    monkeypatch.setattr(latent_codec, "REMEMBERED", 0)
    with TokenWorkers(0, setup) as workers:
        for plan in PLANS:
            assert encode_shard(shard, plan, marked, workers=workers).made == RECORDS
    wanted, alone = files(shard.parent), sum(encoded.values())
    for name in wanted:
        (shard.parent / name).unlink()
    encoded.clear()
    monkeypatch.setattr("ringweave.data_pipes.encode_shards._FIRST", 1)
    monkeypatch.setattr(latent_codec, "REMEMBERED", 12 * 36 * 8 * 4)  # the pictures of one record
    said: list[tuple[int, int, int]] = []

    def stop(number: int, done: int, made: int) -> None:
        said.append((number, done, made))
        if len(said) == 5:
            raise KeyboardInterrupt

    with TokenWorkers(0, setup) as workers, pytest.raises(KeyboardInterrupt):
        encode_plans(shard, PLANS, marked, workers=workers, progress=stop)
    assert said == [(0, 1, 1), (1, 1, 1), (3, 1, 1), (0, 2, 2), (1, 2, 2)]
    with TokenWorkers(0, setup) as workers:
        made = encode_plans(shard, PLANS, marked, workers=workers)
    assert [one.made for one in made] == [RECORDS - 2, RECORDS - 2, RECORDS, RECORDS - 1]
    assert [one.samples for one in made] == [RECORDS] * 4
    assert files(shard.parent) == wanted
    # The third record, and the second by the last plan, after the stop: what came before it was forgotten with the set.
    assert sum(encoded.values()) < alone and max(encoded.values()) == 2
    encoded.clear()
    with TokenWorkers(0, setup) as workers:
        assert [one.made for one in encode_plans(shard, PLANS, marked, workers=workers)] == [0] * 4
    assert not encoded
