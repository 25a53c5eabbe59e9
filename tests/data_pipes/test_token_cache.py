"""A token cache equals a fresh encoding, or ends in a named error; `Corpus` puts caches together."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.index import build_index, index_path, write_index
from ringweave.data_pipes.pack import Piece
from ringweave.data_pipes.reader import ShardReader
from ringweave.data_pipes.token_cache import TokenCache, build_cache, cache_path
from ringweave.data_pipes.token_vocabulary import naming_blocks, vocabulary_path
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import VocabularyManifest
from ringweave.tokenizers.segment import Document, Role, Segment

PLAN = ("caption?", "image")


class Bytes:
    """A tokenizer set of bytes and pixels; `shift` makes another vocabulary, `scale` stretches positions."""

    def __init__(self, *, shift: int = 0, scale: int = 1) -> None:
        self.shift, self.scale = shift, scale
        self.manifest = SimpleNamespace(hash=f"{shift:064x}")

    def _segment(self, values: np.ndarray, modality: str, role: Role, weight: float) -> Segment:
        ids = values.astype(np.int32).ravel() + 256 + self.shift
        positions = np.zeros((len(ids), 4), np.int32)
        positions[:, 0] = np.arange(len(ids)) * self.scale
        positions[:, 2] = ids % 11
        return Segment(ids, modality, positions, role=role, weight=weight)

    def text_segment(self, text: str, *, role: Role = "target", weight: float = 1.0) -> Segment:
        if text == "other vocabulary":
            raise VocabularyError("not of this vocabulary")
        return self._segment(np.frombuffer(text.encode(), np.uint8), "text", role, weight)

    def image_segment(self, image: np.ndarray, *, role: Role = "target", weight: float = 1.0) -> Segment:
        return self._segment(image, "image", role, weight / 3)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def document(self, key: str, segments: list[Segment]) -> Document:
        return Document(key, tuple(segments))


def png(width: int, seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(
        ((np.arange(2 * width * 3) * 37 + seed) % 251).astype(np.uint8).reshape(2, width, 3)
    ).save(out, "png")
    return out.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
        for i, members in enumerate(samples):
            writer.write({"__key__": f"{path.stem}-{i}", **members})
    write_index(path, build_index(path))
    return path


def samples(count: int, *, seed: int = 0) -> list[dict[str, bytes]]:
    return [
        {"png": png(1 + (i + seed) % 5, i + seed), "txt": f"caption {i * i}".encode()} for i in range(count)
    ]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "image-0000.tar", samples(12))


def assert_same(ours: Document, fresh: Document) -> None:
    assert ours.key == fresh.key
    assert len(ours.segments) == len(fresh.segments)
    for a, b in zip(ours.segments, fresh.segments):
        assert (a.modality, a.role, a.attends, a.weight) == (b.modality, b.role, b.attends, b.weight)
        assert (a.ids.dtype, a.positions.dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.positions, b.positions)


@pytest.mark.parametrize("scale", [1, 9999])
def test_cached_documents_equal_fresh_ones(shard: Path, scale: int) -> None:
    """Also where positions leave 16 bits."""
    tokenizers = Bytes(scale=scale)
    seen: list[tuple[int, int]] = []
    path = build_cache(shard, PLAN, tokenizers, progress=lambda done, count: seen.append((done, count)))
    assert path == cache_path(shard, PLAN, tokenizers.manifest.hash)
    assert path.name.startswith("image-0000.tokens-")
    assert seen[-1] == (12, 12)
    cache = TokenCache.open(shard, list(PLAN), tokenizers.manifest.hash)
    with ShardReader(shard) as reader:
        fresh = [encode_sample(reader.read(i), PLAN, tokenizers) for i in range(len(reader))]
    assert len(cache) == 12
    assert cache.lengths.tolist() == [len(d) for d in fresh]
    assert cache.keys == [d.key for d in fresh]
    for i in (3, 0, 11, *range(12)):
        assert_same(cache.document(i), fresh[i])
    for i in (-1, 12):
        with pytest.raises(IndexError):
            cache.document(i)


def test_building_twice_gives_the_same_bytes_and_a_fitting_cache_is_kept(shard: Path) -> None:
    path = build_cache(shard, PLAN, Bytes())
    first, file = path.read_bytes(), path.stat().st_ino
    assert build_cache(shard, PLAN, Bytes()) == path
    assert path.stat().st_ino == file
    build_cache(shard, PLAN, Bytes(), force=True)
    assert path.stat().st_ino != file  # another file was renamed over it
    assert path.read_bytes() == first
    assert sorted(p.name for p in shard.parent.iterdir()) == sorted(
        [shard.name, index_path(shard).name, path.name]
    )


def test_plans_and_vocabularies_do_not_mix(shard: Path) -> None:
    with pytest.raises(DataError, match="no token cache") as missing:
        TokenCache.open(shard, PLAN, "0" * 64)
    assert type(missing.value) is DataError
    build_cache(shard, PLAN, Bytes())
    build_cache(shard, ("image",), Bytes(shift=3))
    with pytest.raises(VocabularyError, match="another vocabulary"):
        TokenCache.open(shard, PLAN, "f" * 64)
    with pytest.raises(DataError, match="no token cache"):
        TokenCache.open(shard, ("caption",), "0" * 64)
    # Renaming does not help: the whole hash is inside.
    os.replace(cache_path(shard, PLAN, "0" * 64), cache_path(shard, PLAN, "f" * 64))
    with pytest.raises(VocabularyError):
        TokenCache.open(shard, PLAN, "f" * 64)
    assert len(TokenCache.open(shard, ("image",), Bytes(shift=3).manifest.hash)) == 12


def test_a_changed_shard_or_index_makes_the_cache_stale(shard: Path) -> None:
    build_cache(shard, PLAN, Bytes())
    write_shard(shard, samples(12, seed=1))
    with pytest.raises(DataError, match="stale"):
        TokenCache.open(shard, PLAN, "0" * 64)
    build_cache(shard, PLAN, Bytes())  # made again without being forced
    assert_same(
        TokenCache.open(shard, PLAN, "0" * 64).document(2),
        encode_sample(ShardReader(shard).read(2), PLAN, Bytes()),
    )
    index_path(shard).unlink()
    with pytest.raises(DataError, match="ringweave data index"):
        TokenCache.open(shard, PLAN, "0" * 64)


def test_no_damage_to_a_cache_goes_unnoticed(shard: Path) -> None:
    """Every flipped byte and every truncation is an error, or leaves all documents as they were."""
    path = build_cache(shard, PLAN, Bytes())
    original = path.read_bytes()
    whole = TokenCache.open(shard, PLAN, "0" * 64)
    expected = [whole.document(i) for i in range(12)]
    refused = 0
    changes = [original[:cut] for cut in range(0, len(original), 211)]
    changes += [
        original[:at] + bytes([original[at] ^ 0x11]) + original[at + 1 :] for at in range(0, len(original), 7)
    ]
    for data in changes:
        path.unlink()
        path.write_bytes(data)
        try:
            cache = TokenCache.open(shard, PLAN, "0" * 64)
            documents = [cache.document(i) for i in range(12)]
        except DataError:
            refused += 1
            continue
        for ours, before in zip(documents, expected):
            assert_same(ours, before)
    assert refused > 0.8 * len(changes), (refused, len(changes))


def test_undecodable_samples_are_journaled_up_to_a_rate(tmp_path: Path) -> None:
    records = samples(40)
    records[5]["png"] = b"\x89PNG broken"
    del records[9]["txt"]
    shard = write_shard(tmp_path / "image-0000.tar", records)
    build_cache(shard, PLAN, Bytes())
    cache = TokenCache.open(shard, PLAN, "0" * 64)
    assert [s["key"] for s in cache.skipped] == ["image-0000-5", "image-0000-9"]
    assert "image-0000-5" in cache.skipped[0]["reason"]
    assert np.flatnonzero(cache.lengths == 0).tolist() == [5, 9]
    assert len(cache.document(5)) == 0
    assert cache.document(10).key == "image-0000-10"
    with pytest.raises(DataError, match="2 of the first 10") as caught:
        build_cache(shard, PLAN, Bytes(), max_skip_rate=0.03, force=True)
    assert str(shard) in str(caught.value)
    with pytest.raises(DataError, match="1 of the first 6"):
        build_cache(shard, PLAN, Bytes(), max_skip_rate=0, force=True)
    with pytest.raises(DataError, match="cannot be used"):
        build_cache(write_shard(tmp_path / "one-0000.tar", [{"txt": b"\xff"}]), ["text"], Bytes())


def test_damaged_shards_wrong_plans_and_foreign_ids_abort(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown plan item"):
        build_cache(shard, ["sound"], Bytes())
    foreign = [{"txt": b"fine"}] * 30 + [{"txt": b"other vocabulary"}]
    with pytest.raises(VocabularyError):
        build_cache(write_shard(tmp_path / "text-0000.tar", foreign), ["text"], Bytes())
    data = bytearray(shard.read_bytes())
    offset = build_index(shard).samples[4].members[0].offset
    data[offset + 20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="image-0000-4"):
        build_cache(shard, PLAN, Bytes())
    assert not list(shard.parent.glob("*.tokens-*"))
    assert not list(shard.parent.glob(".*"))


# --- corpus -----------------------------------------------------------------------------------------------


@pytest.fixture
def specs(tmp_path: Path) -> list[SourceSpec]:
    images = [write_shard(tmp_path / f"image-{n:04}.tar", samples(n + 2, seed=n)) for n in range(3)]
    texts = [write_shard(tmp_path / "text-0000.tar", [{"txt": t} for t in (b"aab", b"", b"b", b"abab")])]
    made = [SourceSpec("image", images, PLAN), SourceSpec("text", texts, ("text",))]
    for spec in made:
        for path in spec.shards:
            build_cache(path, spec.plan, Bytes())
    return made


def test_samples_count_through_the_shards(specs: list[SourceSpec]) -> None:
    corpus = Corpus.open(specs, manifest_hash="0" * 64)
    assert [len(corpus.lengths[n]) for n in ("image", "text")] == [2 + 3 + 4, 4]
    assert corpus.lengths["text"].tolist() == [3, 0, 1, 4]
    flat = [(shard, i) for n, shard in enumerate(specs[0].shards) for i in range(n + 2)]
    for sample, (shard, i) in enumerate(flat):
        fresh = encode_sample(ShardReader(shard).read(i), PLAN, Bytes())
        assert corpus.key("image", sample) == fresh.key == f"{shard.stem}-{i}"
        assert_same(corpus.document(("image", sample)), fresh)
        assert_same(corpus.document(Piece("image", 4, sample, 1, 2)), fresh)
        assert corpus.lengths["image"][sample] == len(fresh)
    for source, sample in (("image", 9), ("image", -1), ("audio", 0)):
        with pytest.raises(DataError):
            corpus.document((source, sample))


def test_digest_follows_the_data_not_the_folder(specs: list[SourceSpec], tmp_path: Path) -> None:
    digest = Corpus.open(specs, manifest_hash="0" * 64).digest
    assert Corpus.open(specs[::-1], manifest_hash="0" * 64).digest == digest
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in [p for p in tmp_path.iterdir() if p.is_file()]:
        os.replace(path, moved / path.name)
    here = [SourceSpec(s.name, [moved / p.name for p in s.shards], s.plan) for s in specs]
    assert Corpus.open(here, manifest_hash="0" * 64).digest == digest
    assert Corpus.open(here[:1], manifest_hash="0" * 64).digest != digest
    swapped = [SourceSpec("image", here[0].shards[::-1], PLAN), here[1]]
    assert Corpus.open(swapped, manifest_hash="0" * 64).digest != digest
    with pytest.raises(DataError, match="twice"):
        Corpus.open([here[0], here[0]], manifest_hash="0" * 64)
    with pytest.raises(DataError, match="no shards"):
        Corpus.open([SourceSpec("image", [], PLAN)], manifest_hash="0" * 64)
    with pytest.raises(VocabularyError):
        Corpus.open(here, manifest_hash="1" * 64)


def test_histogram_counts_trained_targets_only(specs: list[SourceSpec]) -> None:
    corpus = Corpus.open(specs, manifest_hash="0" * 64)
    expected: dict[str, Counter[int]] = {}
    for source, lengths in corpus.lengths.items():
        for sample in range(len(lengths)):
            tokens = [
                (seg.modality, int(t), seg.weight)
                for seg in corpus.document((source, sample)).segments
                for t in seg.ids
            ]
            for modality, token, weight in tokens[1:]:
                if weight > 0:
                    expected.setdefault(modality, Counter())[token] += 1
    found = corpus.target_histogram()
    assert {m: {i: int(c) for i, c in enumerate(counts) if c} for m, counts in found.items()} == expected
    # text: aab, b, abab lose their first byte: ab + bab -> a twice, b thrice
    assert corpus.unigram_entropy("text") == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)))
    assert set(corpus.target_histogram("text")) == {"text"}
    with pytest.raises(DataError, match="no target"):
        corpus.unigram_entropy("image", "text")
    assert "text" not in corpus.target_histogram("image"), "captions are conditions here"


def test_skips_of_all_caches_are_listed(tmp_path: Path) -> None:
    records = samples(20)
    records[3]["png"] = b"broken"
    shard = write_shard(tmp_path / "image-0007.tar", records)
    build_cache(shard, PLAN, Bytes())
    corpus = Corpus.open([SourceSpec("image", [shard], PLAN)], manifest_hash="0" * 64)
    assert [(s["source"], s["shard"], s["key"]) for s in corpus.skipped] == [
        ("image", shard.name, "image-0007-3")
    ]
    assert json.loads(json.dumps(corpus.skipped)) == corpus.skipped


def test_the_block_in_which_vocabularies_differ_is_named(shard: Path) -> None:
    """The manifest lies beside the caches; without it both hashes are still said."""
    parts = [("text", 300, "text", "text", "a" * 64), ("image", 64, "image", "image", "b" * 64)]
    older = VocabularyManifest.build(parts, text_pieces="a" * 64, preprocessing={})
    newer = VocabularyManifest.build(
        [parts[0], (*parts[1][:4], "c" * 64)], text_pieces="a" * 64, preprocessing={}
    )
    tokenizers = Bytes()
    tokenizers.manifest = older  # type: ignore[assignment]
    build_cache(shard, PLAN, tokenizers)
    with pytest.raises(VocabularyError) as caught, naming_blocks(newer):
        TokenCache.open(shard, PLAN, newer.hash)
    shown = str(caught.value)
    assert (
        "block 'image': weights cccccccccccc… in the vocabulary of the tokenizers, bbbbbbbbbbbb… in that of the"
        in shown
    )
    vocabulary_path(shard.parent, older.hash).write_text("{}")
    with pytest.raises(VocabularyError) as caught, naming_blocks(newer):
        TokenCache.open(shard, PLAN, newer.hash)
    assert older.hash[:12] in str(caught.value) and newer.hash[:12] in str(caught.value)
