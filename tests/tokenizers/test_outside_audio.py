"""Audio codecs from outside: ids of transformers' own classes, one clip at its true length."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_samples import tone
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.outside_audio import OutsideAudio

RATE, CODES = 8000, 16
ENCODEC = {"hidden_size": 8, "num_filters": 4, "upsampling_ratios": [4, 2], "num_lstm_layers": 1,
           "codebook_size": CODES, "sampling_rate": RATE, "target_bandwidths": [8.0, 12.0]}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "encodec": EncodecConfig(**ENCODEC),
    "dac": DacConfig(encoder_hidden_size=4, downsampling_ratios=[2, 4], decoder_hidden_size=16, n_codebooks=3,
                     codebook_size=CODES, codebook_dim=4, sampling_rate=RATE),
    "mimi": MimiConfig(hidden_size=16, num_filters=4, upsampling_ratios=[4, 2], num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, sliding_window=8,
                       codebook_size=CODES, codebook_dim=8, vector_quantization_hidden_dimension=8,
                       num_quantizers=3, upsample_groups=16, sampling_rate=RATE),
}  # fmt: skip
CLASSES: dict[str, Any] = {"encodec": EncodecModel, "dac": DacModel, "mimi": MimiModel}
HOP = {"encodec": 8, "dac": 8, "mimi": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model, written by the library, its codebooks as wide as what they quantise."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            model = CLASSES[name](CONFIGS[name])
            with torch.no_grad():
                latents = model.eval().encoder(torch.tensor(speech(2000) / 32768).float()[None, None])
                latents = (latents.latents if name == "mimi" else latents)[0].T
                for key, value in [*model.named_buffers(), *model.named_parameters()]:
                    if key.endswith((".embed", ".embed_sum", "codebook.weight")):
                        value.normal_(0, float(latents.std()))
                if name == "encodec":  # a random one gives nearly the same latents all the time
                    first, *rest = (layer.codebook.embed for layer in model.quantizer.layers)
                    first.copy_(latents[torch.randperm(len(latents))[:CODES]])
                    for book in rest:
                        book.copy_(torch.randn(book.shape) * (latents - latents.mean(0)).std(0) * 0.5)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return save


def speech(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """int16 [length]: a tone with noise."""
    noise = np.random.default_rng(seed).normal(0, 3000, length)
    return (np.resize(tone(seed, 0.2), length) * 0.5 + noise).clip(-32768, 32767).astype(np.int16)


load = cache(OutsideAudio.load)


@cache
def own(name: str, folder: Path) -> Any:
    """The class as its own loader gives it."""
    return CLASSES[name].from_pretrained(folder).eval()


def direct(name: str, folder: Path, wave: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """All codes [F, Q] of the class called as its documentation says."""
    model = own(name, folder)
    values = torch.tensor(wave / 32768, dtype=torch.float32)[None, None]
    with torch.no_grad():
        if name == "encodec":
            codes = model.encode(values, torch.ones_like(values).bool(), 12.0).audio_codes[0]
        elif name == "dac":
            ready = DacFeatureExtractor(sampling_rate=RATE, hop_length=HOP[name])
            inputs = ready(wave.astype(np.float32) / 32768, sampling_rate=RATE, return_tensors="pt")
            codes = model.encode(inputs["input_values"]).audio_codes
        else:
            codes = model.encode(values).audio_codes
    return codes[0].T.numpy()


@pytest.mark.parametrize("name", list(CLASSES))
def test_ids_are_those_of_the_class(saved: Callable[[str], Path], name: str) -> None:
    codec = load(saved(name))
    assert (codec.kind, codec.rate, codec.hop, codec.books) == (f"audio.{name}", RATE, HOP[name], 3)
    for length in (1, 7, 8, 9, 15, 16, 17, 100, 1601):
        ids = codec.encode(speech(length), RATE)
        assert ids.dtype == np.int32
        assert ids.shape == (codec.frames(length), 3)
        assert np.array_equal(ids, direct(name, saved(name), speech(length)))
    assert all(len(np.unique(book)) > CODES // 4 for book in ids.T)
    model = own(name, saved(name))
    codes = torch.from_numpy(ids.T[None].astype(np.int64).copy())
    with torch.no_grad():
        sound = model.decode(codes[None], [None]) if name == "encodec" else model.decode(audio_codes=codes)
    wanted = (sound.audio_values.reshape(-1) * 32768).clamp(-32768, 32767).numpy()
    back = codec.decode(ids)
    assert back.dtype == np.int16
    assert len(back) == len(ids) * codec.hop >= 1601
    assert np.abs(back - wanted).max() <= 1


@pytest.mark.parametrize("name", list(CLASSES))
def test_books_are_a_prefix(saved: Callable[[str], Path], name: str) -> None:
    whole = load(saved(name)).encode(speech(800), RATE)
    for books in (1, 2, 3):
        codec = load(saved(name), books=books)
        ids = codec.encode(speech(800), RATE)
        assert np.array_equal(ids, whole[:, :books])
        assert len(codec.decode(ids)) == 800
    for books in (0, 4):
        with pytest.raises(VocabularyError, match="books must be from 1 to 3"):
            load(saved(name), books=books)


@pytest.mark.parametrize("name", list(CLASSES))
def test_padding_would_change_ids_and_is_never_there(saved: Callable[[str], Path], name: str) -> None:
    """A clip in a zero-padded batch gets other ids (huggingface/transformers#43377); here it is alone."""
    codec = load(saved(name))
    model = codec.model
    changed = 0
    for seed in range(8):
        short = speech(500 + 13 * seed, seed)
        alone = codec.encode(short, RATE)
        batch = np.zeros((2, 1, 1000), np.float32)
        batch[0, 0, : len(short)], batch[1, 0] = short / 32768, speech(1000, seed) / 32768
        values = torch.from_numpy(batch)
        with torch.no_grad():
            if name == "encodec":
                mask = torch.arange(1000)[None] < torch.tensor([[len(short)], [1000]])
                padded = model.encode(values, mask, 12.0).audio_codes[0, 0]
            else:
                padded = model.encode(values).audio_codes[0]
        changed += int((padded.T.numpy()[: len(alone)] != alone).any())
        longer = codec.encode(speech(1000, seed), RATE)
        assert np.array_equal(codec.encode(short, RATE), alone)
        assert len(longer) > len(alone)
    assert changed > 0


@pytest.mark.parametrize("name", list(CLASSES))
def test_threads_and_autocast_change_no_id(saved: Callable[[str], Path], name: str) -> None:
    codec, wave = load(saved(name)), speech(4000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    two = codec.encode(wave, RATE)
    torch.set_num_threads(1)
    one = codec.encode(wave, RATE)
    torch.set_num_threads(threads)
    assert np.array_equal(one, two)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(codec.encode(wave, RATE), one)
        sound = codec.decode(one)
    assert np.array_equal(codec.decode(one), sound)


def test_channels_and_rate_have_a_rule(saved: Callable[[str], Path]) -> None:
    mono, mixed = (load(saved("dac"), channels=c) for c in ("mono", "downmix"))
    stereo = np.stack([speech(300, 1), speech(300, 2)], axis=1)
    with pytest.raises(DataError, match="2 channels for a mono codec"):
        mono.encode(stereo, RATE)
    mean = np.rint((stereo[:, 0].astype(float) + stereo[:, 1]) / 2).astype(np.int16)
    assert np.array_equal(mixed.encode(stereo, RATE), mono.encode(mean, RATE))
    assert mono.sha256 != mixed.sha256
    with pytest.raises(DataError, match="44100 Hz for a codec of 8000 Hz"):
        mono.encode(speech(300), 44_100)
    for bad in (np.zeros(0, np.int16), np.zeros(8, np.float32), np.zeros((2, 2, 2), np.int16)):
        with pytest.raises(DataError, match="int16"):
            mono.encode(bad, RATE)
    with pytest.raises(VocabularyError, match="channels must be"):
        load(saved("dac"), channels="stereo")


def test_wrong_codes_are_named(saved: Callable[[str], Path]) -> None:
    codec = load(saved("mimi"))
    for bad in (
        np.zeros((2, 3), np.float32),
        np.zeros((2, 4), np.int32),
        np.full((2, 3), CODES),
        np.zeros((0, 3), np.int32),
        np.zeros(3, np.int32),
    ):
        with pytest.raises(DataError, match="codes"):
            codec.decode(bad)
    missing = np.array([[-1, 3, -1]])
    assert np.array_equal(codec.decode(missing), codec.decode(np.array([[0, 3, 0]])))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"audio_channels": 2}, "it is stereo"),
        ({"normalize": True}, "loudness"),
        ({"chunk_length_s": 1.0, "overlap": 0.01}, "overlapping chunks"),
        ({"model_type": "wav2vec2"}, "wav2vec2"),
        ({"hidden_size": 16, "codebook_dim": 8}, "other shape: .* is "),
        ({"num_filters": "four"}, "does not describe a model"),
        ({"codebook_size": 17}, "power of 2"),
    ],
)
def test_models_that_ids_do_not_hold_are_refused(
    saved: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    config = json.loads((saved("encodec") / "config.json").read_text()) | change
    weights = load_file(saved("encodec") / "model.safetensors")
    if "audio_channels" in change:
        torch.manual_seed(0)
        EncodecModel(EncodecConfig(**ENCODEC, audio_channels=2)).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VocabularyError, match=match):
        OutsideAudio.load(tmp_path)


@pytest.mark.parametrize("name", list(CLASSES))
def test_tensors_that_do_not_fit_are_named(saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    state = load_file(saved(name) / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved(name) / "config.json").read_bytes())
    some = next(key for key in sorted(state) if key.startswith("decoder.") and key.endswith(".bias"))
    last = some.split(".", 1)[1]  # Mimi's class puts the halves' names under new ones
    for changed, match in (
        ({k: v for k, v in state.items() if k != some}, f"missing: .*{last}"),
        (
            state | {"encoder.junk": torch.zeros(1), "junk": torch.zeros(1)},
            "not expected: encoder.*junk, junk",
        ),
        (state | {some: torch.zeros(999)}, rf"other shape: .*{last} is \[999\]"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(VocabularyError, match=match):
            OutsideAudio.load(tmp_path)


def test_older_names_of_the_weights_load(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The published EnCodec stores weight norm as weight_g and weight_v."""
    state = load_file(saved("encodec") / "model.safetensors")
    old = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in state.items()
    }
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved("encodec") / "config.json").read_bytes())
    ids = OutsideAudio.load(tmp_path).encode(speech(800), RATE)
    assert np.array_equal(ids, load(saved("encodec")).encode(speech(800), RATE))
