"""Public faults of tokenizers, codecs and decoders, each as a test that this code does not have it.

One test an entry; its docstring names the public issue, and the fuller test where there is one.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from media_samples import WHERE, chunk, movie, png_by_hand, saved, sound
from PIL import Image
from text_samples import HARD, documents
from tokenizer_samples import picture, tone
from transformers import MimiConfig, MimiModel

from ringweave.launch.media_files import read_ids
from ringweave.tokenizers import lmx, midi_events
from ringweave.tokenizers.audio import AudioCodec, resample
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.manifest import VocabularyManifest, require_same
from ringweave.tokenizers.media import decode_audio, decode_image, decode_video
from ringweave.tokenizers.members import as_mono
from ringweave.tokenizers.outside_audio import OutsideAudio
from ringweave.tokenizers.outside_latents import OutsideLatents
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.text import TextCodec
from ringweave.tokenizers.text_export import write_tokenizer_json
from ringweave.tokenizers.text_model import pieces_of
from ringweave.tokenizers.vq import ResidualQuantizer
from tokenizers import Tokenizer  # Hugging Face's

diffusers = pytest.importorskip("diffusers")


def test_1_runs_of_spaces_and_newlines_stay(tokenizers: TokenizerSet) -> None:
    """google/sentencepiece#650, google/sentencepiece#684: defaults strip them (test_text.py: 5,000 documents)."""
    codec = tokenizers.codecs["text"]
    for text in ("  two  spaces ", "\n\n\nx\n \n", "\t\t\r\n", "a\u2581b", *HARD):
        assert codec.decode(codec.encode(text)) == text


def test_2_a_newline_is_never_unknown(tokenizers: TokenizerSet) -> None:
    """google/sentencepiece#804, google/sentencepiece#101: without byte fallback a newline becomes `<unk>`."""
    for codec in (tokenizers.codecs["text"], TextCodec.fit(["words without any break " * 60] * 30, size=330)):
        unknown = [i for i, piece in enumerate(pieces_of(codec.model)) if piece.kind == 2]
        ids = codec.encode("\na\n\n\u6f22\U0001f3f3").tolist()
        assert unknown
        assert not set(ids) & set(unknown)
        assert len(codec.encode("\n")) == 1


def test_3_a_unigram_of_ours_gives_the_same_ids_elsewhere(tmp_path: Path) -> None:
    """huggingface/tokenizers#1515: their Unigram trainer ignores byte fallback; ours is trained by sentencepiece and
    exported (test_text_export.py: 2,000 documents)."""
    codec = TextCodec.fit(documents(60, seed=1), size=700, model_type="unigram")
    write_tokenizer_json(codec, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("\u6f22\u5b57 \U0001f469", *documents(20, seed=9), *HARD):
        found = theirs.encode(text, add_special_tokens=False).ids
        assert found == (codec.encode(text) + 256).tolist()
        assert theirs.decode(found, skip_special_tokens=False) == text


def test_4_a_vocabulary_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with sentencepiece 0.2.3: a unigram vocabulary of 4 training threads is not that of 1 (no public issue);
    one thread is always asked for (test_text.py: three processes)."""
    asked: list[Any] = []
    train = sentencepiece.SentencePieceTrainer.train

    def spy(**options: Any) -> None:
        asked.append(options["num_threads"])
        train(**options)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", spy)
    texts = documents(20, seed=3)
    hashes = {TextCodec.fit(texts, size=600, model_type="unigram").piece_hash() for _ in range(2)}
    assert asked == [1, 1]
    assert len(hashes) == 1


def test_5_a_vocabulary_is_the_same_after_loading(folder: Path, tokenizers: TokenizerSet) -> None:
    """Natooz/MidiTok#53, Natooz/MidiTok#228: ids move on reload, and trained ids raise KeyError."""
    again = TokenizerSet.load(folder)
    assert again.manifest == tokenizers.manifest
    assert again.manifest.hash == VocabularyManifest.from_json(tokenizers.manifest.to_json()).hash
    assert len(set(midi_events.tokens())) == midi_events.size()
    for number in range(midi_events.size()):
        midi_events.decode([number])
    assert lmx.to_text(lmx.from_text(lmx.to_text(range(lmx.SIZE)))) == lmx.to_text(range(lmx.SIZE))
    rng = np.random.default_rng(0)
    again.decode(rng.integers(0, again.manifest.size, 3000).astype(np.int32))


def test_6_another_id_of_a_special_token_is_an_error() -> None:
    """meta-llama/llama-models#219, pytorch/torchtune#1995: an image token was 128256 here and 128011 there."""
    digest = "a" * 64
    blocks = [("text", 1000, "text", "text", digest), ("image", 16, "image", "image", digest)]
    here, there = (
        VocabularyManifest.build(b, text_pieces=digest, preprocessing={}) for b in (blocks, blocks[::-1])
    )
    assert here.block("image").start != there.block("image").start
    with pytest.raises(VocabularyError, match="another vocabulary"):
        require_same(here, there, mine_is="here", theirs_is="the checkpoint")


def test_7_generated_ids_are_kept_as_ids(tokenizers: TokenizerSet, tmp_path: Path) -> None:
    """sgl-project/sglang#26555: text of generated ids, encoded again, gives other ids; so ids travel as ids."""
    codec = tokenizers.codecs["text"]
    ids = np.random.default_rng(0).integers(0, codec.size, 200).astype(np.int32)
    assert codec.encode(codec.decode(ids)).tolist() != ids.tolist()
    for number, kept in enumerate((ids, tokenizers.image_segment(picture(5)).ids)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"ids": kept.tolist()}))
        np.testing.assert_array_equal(read_ids(path), kept)


def test_8_exif_and_alpha_of_palettes_and_keys() -> None:
    """kohya-ss/sd-scripts#1316: EXIF orientation ignored; vllm-project/vllm#44974: alpha of tRNS and palettes dropped
    (test_media_image.py: all orientations, depths and kinds)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = picture(1)[:20]
    data = saved(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, where=WHERE), np.rot90(pixels, -1))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = saved(palette, "PNG", transparency=b"\x07\xff")
    assert decode_image(data, where=WHERE).tolist() == [[[10, 20, 30, 7], [40, 50, 60, 255]]]
    grey = png_by_hand(np.array([[[1], [2]]]), 2, 0, chunk(b"tRNS", b"\0\2"))
    assert decode_image(grey, where=WHERE).tolist() == [[[85, 85, 85, 255], [170, 170, 170, 0]]]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random AutoencoderKL."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kl")
    diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4).save_pretrained(
        path
    )
    return path


def test_9_a_vae_runs_in_float32_and_never_gives_nan(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/diffusers#3209, huggingface/diffusers#7188: NaN in half precision; kohya-ss/sd-scripts#2322:
    autocast overrides the cast (test_outside_latents.py: the other classes)."""
    codec = OutsideLatents.load(vae)
    image = picture(2)
    plain = codec.encode(image)
    pixels = codec.decode(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(codec.encode(image).values, plain.values)
        np.testing.assert_array_equal(codec.decode(plain), pixels)
    assert plain.values.dtype == np.float32
    monkeypatch.setattr(codec, "_mode", lambda values: torch.full((1, 4, 48, 48), torch.nan))
    with pytest.raises(DataError, match="finite"):
        codec.encode(image)


def test_10_every_frame_of_a_clip_comes_back(tmp_path: Path) -> None:
    """Wan-Video/Wan2.1#448: 31 frames in, 29 out (test_outside_latents.py shows that the class alone loses them)."""
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).save_pretrained(tmp_path)  # fmt: skip
    frames = np.random.default_rng(0).integers(0, 256, (31, 8, 8, 3), dtype=np.uint8)
    codec = OutsideLatents.load(tmp_path)
    assert codec.decode(codec.encode(frames)).shape == frames.shape


def test_11_ids_of_a_sound_do_not_depend_on_padding(tmp_path: Path) -> None:
    """huggingface/transformers#43377: Mimi's ids change in a padded batch (test_outside_audio.py: three codecs)."""
    torch.manual_seed(0)
    config = MimiConfig(
        hidden_size=16, num_filters=4, upsampling_ratios=[4, 2], num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16, sliding_window=8, codebook_size=16, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_quantizers=2, upsample_groups=16, sampling_rate=8000,
    )  # fmt: skip
    MimiModel(config).save_pretrained(tmp_path)
    codec = OutsideAudio.load(tmp_path)
    short = tone(1, 0.1, 8000)
    before = codec.encode(short, 8000)
    codec.encode(tone(2, 0.4, 8000), 8000)  # company changes nothing: each is encoded alone
    np.testing.assert_array_equal(codec.encode(short, 8000), before)
    model = MimiModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        alone = model.encode(torch.tensor(short / 32768, dtype=torch.float32)[None, None]).audio_codes
    np.testing.assert_array_equal(before, alone[0].T.numpy())


@pytest.fixture(scope="module")
def sounds() -> AudioCodec:
    """A small codec of our own."""
    clips = [tone(seed, 0.5) for seed in range(6)]
    return AudioCodec.fit(clips, rate=16_000, hop=160, bins=80, books=2, codes=32, frames=2000)


@pytest.mark.parametrize("chunk", [1, 7, 160, 1000, 44_100])
def test_12_ids_do_not_depend_on_the_size_of_chunks(sounds: AudioCodec, chunk: int) -> None:
    """descriptinc/descript-audio-codec#39, #45: chunks change ids; compress gives 1152 frames and encode 862."""
    samples = tone(9, 0.3)
    stream = sounds.stream()
    parts = [stream.push(samples[at : at + chunk]) for at in range(0, len(samples), chunk)]
    streamed = np.concatenate([*parts, stream.flush()])
    np.testing.assert_array_equal(streamed, sounds.encode(samples))
    assert len(streamed) == sounds.frames(len(samples)) == len(samples) // 160 + 1


def test_13_stereo_has_a_rule(sounds: AudioCodec) -> None:
    """descriptinc/descript-audio-codec#47, #32: stereo crashes or means nothing. Here to mono it is the mean."""
    both = np.stack([tone(1, 0.1), tone(2, 0.1)], axis=1)
    np.testing.assert_array_equal(as_mono(both), (both[:, 0].astype(int) + both[:, 1]) // 2)
    with pytest.raises(DataError, match="mono"):
        sounds.encode(both)  # never one channel after the other, or the first alone
    assert len(sounds.encode(as_mono(both))) == sounds.frames(len(both))


def test_14_no_code_is_lost_to_rounding_and_none_is_negative() -> None:
    """lucidrains/vector-quantize-pytorch#114: bf16 loses codes; #207: negative ids. Here codes are whole numbers."""
    rng = np.random.default_rng(0)
    books = np.unique(1000 + rng.integers(-9, 9, (4200, 8)), axis=0)[:4096][None].astype(np.int32)
    quantizer = ResidualQuantizer(books)
    codes = quantizer.encode(books[0].astype(np.float64))
    np.testing.assert_array_equal(codes[:, 0], np.arange(4096))
    np.testing.assert_array_equal(quantizer.decode(codes), books[0])
    far = quantizer.encode(np.rint(rng.normal(0, 1e4, (500, 8))))
    assert 0 <= far.min() <= far.max() < 4096
    rounded = torch.tensor(books[0]).to(torch.bfloat16).double().numpy()  # what bf16 would have made of them
    assert (quantizer.encode(rounded)[:, 0] != np.arange(4096)).sum() > 50


def test_15_loud_sound_is_not_clipped() -> None:
    """pytorch/audio#4211: saving as int16 saturates; sensein/b2aiprep#327: resampling overshoots, then clips
    (test_media_audio.py)."""
    wave = 1.5 * np.sin(np.arange(4000) * 0.05)
    samples, _ = decode_audio(sound(wave, 16_000, "WAV", "FLOAT"), where=WHERE)
    assert np.abs(samples[:, 0] - wave / 1.5 * 32768).max() < 3
    square = np.where(np.arange(8000) % 100 < 50, 32767, -32767).astype(np.int16)
    loud, quiet = (
        resample(square, 44_100, 16_000).astype(float),
        resample(square // 2, 44_100, 16_000).astype(float),
    )
    assert np.abs(quiet).max() > 17_000
    assert np.corrcoef(loud, quiet)[0, 1] > 0.999999


def test_16_times_and_range_of_video() -> None:
    """meta-pytorch/torchcodec#1209, #179: seeks are wrong with a start that is not 0, and in H.265 (nothing is sought
    here); #1708: full range of more than 8 bits read as limited (test_media_video.py)."""
    half = np.full((16, 16), 512, "<u2")
    planes = [[np.full((32, 32), level, "<u2"), half, half] for level in range(100, 1000, 100)]
    times = [3000 + 40 * k * k for k in range(9)]
    options = {"x265-params": "log-level=0:bframes=3:lossless=1", "preset": "ultrafast"}
    data = movie(
        planes, "yuv420p10le", codec="libx265", form="mp4", times=times, options=options, color_range=2
    )
    with av.open(io.BytesIO(data), "r") as file:
        assert file.streams.video[0].codec_context.name == "hevc"
    frames, seconds = decode_video(data, where=WHERE)
    np.testing.assert_allclose(seconds * 1000, times, atol=0.5)
    expected = [level * 255 / 1023 for level in range(100, 1000, 100)]
    assert np.abs(frames[:, 8, 8].T - expected).max() <= 1


def test_16_short_wavs_cost_about_what_their_reader_does() -> None:
    """meta-pytorch/torchcodec#966: 3.6 times as slow as the loader before, on the bytes of a WAV of one second."""
    data = sound(tone(1), 16_000, "WAV", "PCM_16")

    def seconds(read: Any) -> float:
        taken = []
        for _ in range(60):
            begun = time.perf_counter()
            read()
            taken.append(time.perf_counter() - begun)
        return float(min(taken))

    ours = seconds(lambda: decode_audio(data, where=WHERE))
    assert ours < 3 * seconds(lambda: soundfile.read(io.BytesIO(data), dtype="int16"))
