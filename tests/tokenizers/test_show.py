"""Figures and pictures of held-out records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from tokenizer_samples import records

from ringweave.tokenizers.measure import composite, ink_f1, measure, psnr, si_sdr
from ringweave.tokenizers.set import TokenizerSet
from ringweave.tokenizers.show import show


def test_measure_reports_every_modality(tokenizers: TokenizerSet) -> None:
    heldout = records(1000, 5)
    heldout["image"].append({"png": b"broken"})
    figures = measure(tokenizers, heldout)
    assert set(figures) == {"text", "image", "rgba", "video", "audio", "score"}
    assert figures["text"]["lossy_documents"] == 0
    assert figures["text"]["bytes_per_token"] > 1.5
    assert figures["image"]["skipped"] == 1
    assert figures["image"]["records"] == 5
    assert figures["image"]["psnr"] > figures["image"]["floor_psnr"]
    assert figures["image"]["tokens_per_record"] == 6 * 7 + 2
    assert figures["video"]["frames_lost"] == 0
    assert figures["rgba"]["alpha_mae"] < 0.1
    assert figures["audio"]["si_sdr"] > 3
    assert 0.5 < figures["score"]["ink_f1"] <= 1
    assert all(0 < row["codes_used"] <= 1 for row in figures.values())


def test_show_writes_pictures_sounds_and_text(tokenizers: TokenizerSet, tmp_path: Path) -> None:
    paths = show(tokenizers, records(1000, 4), tmp_path / "out")
    names = sorted(path.name for path in paths)
    assert names == [
        "audio-decoded.wav", "audio-original.wav", "audio.png", "image.png", "rgba.png", "score.png",
        "text.txt", "video.png",
    ]  # fmt: skip
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            assert (pixels[:8] == 255).all(), "a clean margin"
            assert pixels.std() > 5
    pair = [soundfile.read(tmp_path / "out" / f"audio-{n}.wav")[0] for n in ("original", "decoded")]
    assert len(pair[0]) == len(pair[1])
    assert "[identical after decoding" in (tmp_path / "out" / "text.txt").read_text()


def test_metrics_by_hand() -> None:
    a = np.zeros((4, 4), np.uint8)
    assert psnr(a, a) == 100
    assert abs(psnr(a, a + 255)) < 1e-9
    wave = np.sin(np.arange(1000))
    assert si_sdr(wave, wave * 0.1) > 80
    assert ink_f1(a, a) == 1
    half = a.copy()
    half[:2] = 255
    assert abs(ink_f1(a, half) - 2 * 8 / (16 + 8)) < 1e-12
    layer = np.full((2, 2, 4), 128, np.uint8)
    assert np.allclose(composite([layer], np.zeros((2, 2, 3))), 128 * 128 / 255)
