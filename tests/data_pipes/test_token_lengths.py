"""Lengths of shards: what tokenizing gives, tied to shard and vocabulary, read when needed; probes are exact."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.append(str(Path(__file__).parent))

from token_fixtures import Bytes, png, setup, texts, write_shard

from ringweave.data_pipes.corpus import Corpus, SourceSpec
from ringweave.data_pipes.documents import encode_sample
from ringweave.data_pipes.lengths import Table
from ringweave.data_pipes.make_lengths import make_lengths
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.sample import Sample
from ringweave.data_pipes.token_cache import TokenCache, build_cache, cache_path
from ringweave.data_pipes.token_lengths import lengths_path, open_lengths, read_lengths
from ringweave.data_pipes.token_probe import probe_length
from ringweave.data_pipes.workers import TokenWorkers
from ringweave.tokenizers.audio import AudioCodec
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.fit import FitSizes, fit_tokenizers
from ringweave.tokenizers.set import TokenizerSet

TEXT, HASH = ("text",), "0" * 64


@pytest.mark.parametrize("count", [0, 2])
def test_lengths_are_those_of_tokenizing_and_the_cache_is_the_same_bytes_from_workers(
    tmp_path: Path, count: int
) -> None:
    plan = ("caption?", "image")
    samples = [{"png": png(1 + i % 5, i), "txt": b"caption %d" % i} for i in range(150)]
    samples[70]["png"] = b"\x89PNG broken"
    shard = write_shard(tmp_path / "image-0.tar", samples)
    here = build_cache(shard, plan, Bytes()).read_bytes()
    cache_path(shard, plan, HASH).unlink()
    seen: list[tuple[int, int]] = []
    with TokenWorkers(count, setup()) as workers:
        path = make_lengths(shard, plan, Bytes(), workers=workers, progress=lambda a, b: seen.append((a, b)))
    assert path == lengths_path(shard, plan, HASH)
    assert path.name.startswith("image-0.tar.len-")
    assert cache_path(shard, plan, HASH).read_bytes() == here
    sizes = read_lengths(shard, plan, HASH)
    cache = TokenCache.open(shard, plan, HASH)
    assert sizes.load().tolist() == cache.lengths.tolist()
    assert [s["key"] for s in sizes.skipped] == ["image-0-70"]
    assert sizes.load()[70] == 0
    assert seen[-1] == (150, 150)
    stamp = path.stat().st_mtime_ns
    assert make_lengths(shard, plan, Bytes()) == path
    assert path.stat().st_mtime_ns == stamp, "what fits is kept"


def test_without_tokens_only_lengths_are_stored(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(20, orders={3: "undecodable"}))
    make_lengths(shard, TEXT, Bytes(), store_tokens=False)
    assert len(list(tmp_path.iterdir())) == 3
    first = lengths_path(shard, TEXT, HASH).read_bytes()
    make_lengths(shard, TEXT, Bytes())
    assert cache_path(shard, TEXT, HASH).exists(), "asked for now"
    assert lengths_path(shard, TEXT, HASH).read_bytes() == first
    lengths_path(shard, TEXT, HASH).unlink()
    assert read_lengths(shard, TEXT, HASH).load()[3] == 0, "a complete cache knows them as well"


def test_unusable_samples_are_journaled_up_to_a_rate_and_damage_aborts(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(40, orders={3: "undecodable", 9: "mistake"}))
    with TokenWorkers(1, setup()) as workers:
        make_lengths(shard, TEXT, Bytes(), workers=workers)
        assert {s["key"] for s in read_lengths(shard, TEXT, HASH).skipped} == {"text-0-3", "text-0-9"}
        bad = write_shard(tmp_path / "text-1.tar", texts(40, orders=dict.fromkeys(range(9), "undecodable")))
        for store in (True, False):
            with pytest.raises(DataError, match="cannot be used"):
                make_lengths(bad, TEXT, Bytes(), workers=workers, store_tokens=store)
        data = bytearray(shard.read_bytes())
        data[513] ^= 1
        shard.write_bytes(data)
        lengths_path(shard, TEXT, HASH).unlink()
        cache_path(shard, TEXT, HASH).unlink()
        with pytest.raises(DataError, match=r"damaged shard[\s\S]*text-0-0"):
            make_lengths(shard, TEXT, Bytes(), workers=workers)
    assert not list(tmp_path.glob("*.len-*"))


def test_stale_foreign_and_damaged_lengths_are_refused_by_name(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(20))
    with pytest.raises(DataError, match="no token lengths"):
        read_lengths(shard, TEXT, HASH)
    path = make_lengths(shard, TEXT, Bytes(), store_tokens=False)
    with pytest.raises(VocabularyError, match="another vocabulary"):
        read_lengths(shard, TEXT, "f" * 64)
    foreign = lengths_path(shard, TEXT, "f" * 64)
    foreign.write_bytes(path.read_bytes())
    with pytest.raises(VocabularyError):
        read_lengths(shard, TEXT, "f" * 64)
    whole, lengths = path.read_bytes(), read_lengths(shard, TEXT, HASH).load().tolist()
    refused = 0
    changes = [whole[:n] for n in range(0, len(whole), 97)]
    changes += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(0, len(whole), 5)]
    for data in changes:
        path.unlink()  # an open file is mapped: never write into it
        path.write_bytes(data)
        try:
            assert read_lengths(shard, TEXT, HASH).load().tolist() == lengths
        except DataError as error:
            assert path.name in error.where
            refused += 1
    assert refused > 0.8 * len(changes)
    path.unlink()
    path.write_bytes(whole)
    write_shard(shard, texts(20, words=2))
    with pytest.raises(DataError, match="stale token lengths"):
        read_lengths(shard, TEXT, HASH)
    make_lengths(shard, TEXT, Bytes(), store_tokens=False)
    assert read_lengths(shard, TEXT, HASH).load().tolist() != lengths, "made again"


def test_lengths_of_a_job_give_the_plans_of_plain_arrays(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"text-{n}.tar", texts(30 + n, words=9)) for n in range(3)]
    for shard in shards[:2]:
        make_lengths(shard, TEXT, Bytes(), store_tokens=False)
    build_cache(shards[2], TEXT, Bytes())
    lengths = open_lengths([("text", shards, TEXT)], HASH, whole=["text"])
    arrays = [TokenCache.open(s, TEXT, HASH).lengths if s == shards[2] else lengths.of("text", n)
              for n, s in enumerate(shards)]  # fmt: skip
    assert lengths.counts("text").tolist() == [30, 31, 32]
    assert lengths.whole("text")
    assert lengths["text"].tolist() == np.concatenate(arrays).tolist()
    table = Table({"text": arrays}, whole=["text"])
    plans = [
        PackPlanner(lengths=which, weights={"text": 1.0}, seed=3, context=64) for which in (lengths, table)
    ]
    assert [plans[0].next() for _ in range(40)] == [plans[1].next() for _ in range(40)]
    before = lengths.digest
    for shard in shards:
        make_lengths(shard, TEXT, Bytes())
    again = open_lengths([("text", shards, TEXT)], HASH, whole=["text"])
    assert again.digest == before, "sidecars and caches tell the same"
    swapped = open_lengths([("text", shards[::-1], TEXT)], HASH, whole=["text"])
    assert swapped.digest != before


def test_a_corpus_has_one_digest_however_its_lengths_were_made(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "text-0.tar", texts(30, orders={4: "undecodable"}))
    specs = [SourceSpec("text", [shard], TEXT)]
    make_lengths(shard, TEXT, Bytes(), store_tokens=False)
    sidecar = Corpus.open(specs, manifest_hash=HASH)
    build_cache(shard, TEXT, Bytes())
    lengths_path(shard, TEXT, HASH).unlink()
    cached = Corpus.open(specs, manifest_hash=HASH)
    assert sidecar.digest == cached.digest
    assert json.dumps(sidecar.skipped) == json.dumps(cached.skipped)
    assert [s["key"] for s in cached.skipped] == ["text-0-4"]


# --- probes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSet:
    """A real set of text, image and audio."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("set")
    words = b"the light on the water and three small boats lay still until the evening came again "
    records = {
        "text": [{"txt": words * (2 + i)} for i in range(8)],
        "image": [{"png": picture("PNG", 32, 32, i), "txt": words} for i in range(8)],
        "audio": [{"flac": sound("FLAC", 8000, 16_000, rng)} for _ in range(6)],
    }
    sizes = FitSizes(text_pieces=280, image_codes=16, audio_books=2, audio_codes=8, audio_bins=40)
    fit_tokenizers(records, folder, sizes=sizes)
    return TokenizerSet.load(folder)


def picture(form: str, width: int, height: int, seed: int, *, turn: int = 1, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).convert(mode)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    more = {"exif": exif} if turn != 1 else {}
    image.save(out, form, **more)
    return out.getvalue()


def sound(form: str, samples: int, rate: int, rng: np.random.Generator, channels: int = 1) -> bytes:
    out = io.BytesIO()
    wave = (rng.standard_normal((samples, channels)) * 3000).astype(np.int16)
    soundfile.write(out, wave, rate, format=form)
    return out.getvalue()


def test_a_probed_length_is_that_of_the_tokens(fitted: TokenizerSet) -> None:
    """Sizes that do and do not divide, modes, turned pictures, rates, channels, text before and after."""
    rng = np.random.default_rng(1)
    probed = 0
    for n in range(40):
        width, height = (int(v) for v in rng.integers(1, 70, 2))
        form, ext = [("PNG", "png"), ("JPEG", "jpg")][n % 2]
        mode = ("RGB", "L", "P")[n % 3] if form == "PNG" else ("RGB", "L", "CMYK")[n % 3]
        turn = 1 + n % 8 if form == "JPEG" else 1
        rate = int(rng.choice([8000, 16_000, 22_050, 44_100, 11_025]))
        kind, suffix = [("FLAC", "flac"), ("WAV", "wav")][n % 2]
        sample = Sample("k", {
            ext: picture(form, width, height, n, turn=turn, mode=mode), "txt": b"boats %d" % n,
            suffix: sound(kind, int(rng.integers(1, 3000)), rate, rng, 1 + n % 2),
        }, "s", 0)  # fmt: skip
        for plan in (("caption", "image"), ("audio", "caption?"), ("image", "text", "audio")):
            length = probe_length(sample, plan, fitted)
            assert length == len(encode_sample(sample, plan, fitted)), (plan, width, height, turn, rate)
            probed += length is not None
    assert probed == 120


def test_what_headers_do_not_tell_is_not_probed(fitted: TokenizerSet) -> None:
    late = io.BytesIO()
    info = PngInfo()
    Image.new("RGB", (9, 20)).save(late, "PNG", pnginfo=info, exif=b"Exif\0\0")
    webp, ogg = picture("WEBP", 9, 20, 0), io.BytesIO()
    soundfile.write(ogg, np.zeros(4000), 16_000, format="OGG", subtype="VORBIS")
    for members, plan in (
        ({"png": late.getvalue()}, ("image",)),
        ({"webp": webp}, ("image",)),
        ({"ogg": ogg.getvalue()}, ("audio",)),
        ({"png": webp}, ("score",)),
        ({"png": b"\x89PNG broken"}, ("image",)),
    ):
        assert probe_length(Sample("k", members, "s", 0), plan, fitted) is None
    with pytest.raises(DataError, match="no member"):
        probe_length(Sample("k", {"txt": b"x"}, "s", 0), ("image",), fitted)


def test_frames_of_a_sound_do_not_depend_on_how_it_is_pushed(fitted: TokenizerSet) -> None:
    """The formula the probe uses against the encoder, at the edges of a frame."""
    codec = fitted.codecs["audio"]
    assert isinstance(codec, AudioCodec)
    for samples in (1, codec.hop - 1, codec.hop, codec.hop + 1, 3 * codec.hop, 3 * codec.hop + 1):
        assert len(codec.encode(np.zeros(samples, np.int16))) == codec.frames(samples)


def test_probed_lengths_of_a_shard_equal_those_of_tokenizing_it(fitted: TokenizerSet, tmp_path: Path) -> None:
    plan = ("caption", "image")
    samples = [{"png": picture("PNG", 5 + i, 40 - i, i), "txt": b"boats %d" % i} for i in range(20)]
    samples[7] = {"webp": picture("WEBP", 9, 20, 0), "txt": b"still"}
    shard = write_shard(tmp_path / "image-0.tar", samples)
    manifest = str(fitted.manifest.hash)
    probed = make_lengths(shard, plan, fitted, store_tokens=False).read_bytes()
    assert not cache_path(shard, plan, manifest).exists()
    lengths_path(shard, plan, manifest).unlink()
    assert make_lengths(shard, plan, fitted).read_bytes() == probed
