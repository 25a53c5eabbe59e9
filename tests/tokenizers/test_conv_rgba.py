"""The learned RGBA codec: exact alpha of whole cells, hidden colour without a say, exactness at any cut, training."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizer_samples import SMALL, picture, records
from two_ranks import losses_of, losses_of_two_ranks

from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.conv_net import WEIGHT
from ringweave.tokenizers.conv_rgba import ConvRgbaCodec, premultiplied
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.grid import BLANK, MISSING
from ringweave.tokenizers.learn import Schedule
from ringweave.tokenizers.learn_rgba import RgbaTraining
from ringweave.tokenizers.learn_run import learn_codecs
from ringweave.tokenizers.learn_start import NetSizes, Start, rgba_start
from ringweave.tokenizers.measure import composite
from ringweave.tokenizers.resize import bleed, resize_rgba
from ringweave.tokenizers.rgba import OPAQUE, RgbaCodec
from ringweave.tokenizers.set import TokenizerSet

U8 = NDArray[np.uint8]
NET = NetSizes(width=16, encoder_blocks=1, decoder_blocks=1)
SHORT = Schedule(steps=9, batch=4, seed=3)


def layer(seed: int, size: int = 48) -> U8:
    """Discs with soft edges: blank, opaque and mixed cells."""
    large = Image.fromarray(picture(seed, "RGBA", size=4 * size))
    return resize_rgba(np.asarray(large), size, size, how="box")


@cache
def start() -> Start:
    """A small closed form to train from."""
    layers = [layer(s) for s in range(12)]
    return rgba_start(layers, books=2, alpha_codes=24, colour_codes=24, net=NET, crop=4)


def loud(seed: int = 0) -> Tensors:
    """The start's tensors with networks that do something."""
    rng = np.random.default_rng(seed)
    out = dict(start().tensors)
    for name, value in out.items():
        if name.startswith(("encoder.", "decoder.")):
            out[name] = rng.integers(-WEIGHT // 2, WEIGHT // 2, value.shape).astype(np.int32)
    return out


def codec_of(tensors: Tensors) -> ConvRgbaCodec:
    codec = start().codec(tensors)
    assert isinstance(codec, ConvRgbaCodec)
    return codec


def hiding(image: U8, seed: int) -> U8:
    """`image` with noise for the colour under alpha 0."""
    noise = np.random.default_rng(seed).integers(0, 256, image.shape, dtype=np.uint8)
    noise[..., 3] = 0
    return np.where(image[..., 3:] == 0, noise, image)


def test_premultiplied_cells_are_the_composite_on_their_mean() -> None:
    rng = np.random.default_rng(1)
    cells = rng.integers(0, 256, (6, 4, 4)).astype(np.int64)
    cells[0, :, 3] = 0
    cells[1, :, 3] = 255
    colour, alpha = premultiplied(cells)
    assert np.array_equal(alpha, cells[..., 3])
    assert not colour[0].any()
    assert np.array_equal(colour[1], cells[1, :, :3].reshape(-1))
    for cell, found in zip(cells[2:], colour[2:], strict=True):
        share = cell[:, 3:] / 255
        mean = (cell[:, :3] * share).sum(0) / share.sum()
        wanted = cell[:, :3] * share + mean * (1 - share)
        assert np.abs(found.reshape(-1, 3) - wanted).max() < 2  # two divisions, rounded down


@pytest.mark.parametrize("tensors", ["start", "loud", "trained"])
def test_whole_cells_have_exact_alpha(tensors: str) -> None:
    if tensors == "trained":
        training = RgbaTraining(start().config, start().tensors, start().crops, SHORT)
        training.run()
        codec = codec_of(training.tensors())
    else:
        codec = codec_of(loud() if tensors == "loud" else start().tensors)
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (40, 37, 4), dtype=np.uint8)
    image[:16, :, 3] = 255
    image[16:24, :, 3] = 0
    cells = codec.encode(image)
    assert cells.shape == (5, 5, 3)
    assert (
        (cells[:2, :, 0] == OPAQUE).all()
        and (cells[:2, :, 1] == MISSING).all()
        and (cells[:2, :, 2] >= 0).all()
    )
    assert (cells[2] == BLANK).all()
    assert (cells[3:, :, 0] > OPAQUE).all() and (cells[3:, :, 1:] >= 0).all()
    back = codec.decode(cells)
    assert (back[:16, :, 3] == 255).all()
    assert not back[16:24].any()
    assert back[24:, :, 3].any()
    sizes = codec.block_sizes
    assert sizes == [24, 23, 24] and (cells.max((0, 1)) < sizes).all()


def test_the_start_is_the_closed_form() -> None:
    """Same books in another basis: composites as good as those of `RgbaCodec`, within what rounding may do."""
    layers, unseen = [layer(s) for s in range(12)], [layer(s) for s in range(100, 106)]
    closed = RgbaCodec.fit(layers, books=2, alpha_codes=24, colour_codes=24)
    ours = codec_of(start().tensors)
    ground = np.full((48, 48, 3), 255.0)

    def error(codec: RgbaCodec | ConvRgbaCodec) -> float:
        pairs = [(x, codec.decode(codec.encode(x))) for x in unseen]
        return float(np.mean([(composite([a], ground) - composite([b], ground)) ** 2 for a, b in pairs]))

    assert error(ours) < 1.2 * error(closed)


@pytest.mark.parametrize("tensors", ["start", "loud"])
def test_hidden_colour_changes_no_id(tensors: str) -> None:
    codec = codec_of(loud() if tensors == "loud" else start().tensors)
    sprite = np.zeros((32, 32, 4), np.uint8)
    sprite[5:21, 9:25] = (255, 0, 0, 255)
    green = sprite.copy()
    green[sprite[..., 3] == 0] = (0, 255, 0, 0)
    assert np.array_equal(codec.encode(sprite), codec.encode(green))
    for seed in range(4):
        image = layer(seed + 30)
        assert np.array_equal(codec.encode(image), codec.encode(hiding(image, seed)))
        shown = hiding(image, seed)
        shown[..., 3] = np.maximum(shown[..., 3], 1)
        assert (codec.encode(image) != codec.encode(shown)).any()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches_equal_whole(batch: int) -> None:
    codec = codec_of(loud())
    layers = np.stack([layer(s)[:45, :35] for s in range(100, 109)])
    whole = codec.encode(layers)
    parts = [codec.encode(layers[k : k + batch]) for k in range(0, len(layers), batch)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert (whole != codec_of(start().tensors).encode(layers)).any(), "the network has a say"
    assert np.array_equal(codec.decode(whole)[5], codec.decode(whole[5]))
    assert codec.decode(whole).shape == (9, 48, 40, 4)


def test_threads_change_no_id(tmp_path: Path) -> None:
    (tmp_path / "codec").write_bytes(codec_of(loud()).to_bytes())
    np.save(tmp_path / "layers.npy", np.stack([layer(s, size=96) for s in range(100, 104)]))
    program = (
        "import hashlib, pathlib, sys; import numpy as np\n"
        "from ringweave.tokenizers.conv_rgba import ConvRgbaCodec\n"
        "codec = ConvRgbaCodec.from_bytes(pathlib.Path('codec').read_bytes(), where='')\n"
        "cells = codec.encode(np.load('layers.npy'))\n"
        "print(hashlib.sha256(cells.tobytes() + codec.decode(cells).tobytes()).hexdigest(), 'torch' in sys.modules)"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path,
        ).stdout.split()
        for threads in ("1", "2")
    ]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(digests[0][0]) == 64 and digests[0][1] == "False"


def test_damaged_cells_decode() -> None:
    codec = codec_of(loud())
    rng = np.random.default_rng(4)
    cells = rng.integers(-2, 23, (5, 6, 3)).astype(np.int32)
    back = codec.decode(cells)
    assert back.shape == (40, 48, 4)
    clear = (cells[..., 0] < 0).repeat(8, 0).repeat(8, 1)
    assert not back[clear].any()
    assert (back[..., 3][(cells[..., 0] == OPAQUE).repeat(8, 0).repeat(8, 1)] == 255).all()


def test_a_file_comes_back_and_another_kind_is_refused() -> None:
    codec = codec_of(loud())
    again = ConvRgbaCodec.from_bytes(codec.to_bytes(), where="here")
    assert np.array_equal(again.encode(layer(60)), codec.encode(layer(60)))
    assert again.to_bytes() == codec.to_bytes()
    with pytest.raises(VocabularyError, match=r"kind 'rgba.conv', not 'rgba'"):
        RgbaCodec.from_bytes(codec.to_bytes(), where="here")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("back_alpha", lambda t: t[:, :-1], "tensors of alpha do not fit"),
        ("books_colour", lambda t: np.concatenate([t, t]), "one book of colour"),
        ("project_colour", lambda t: np.full_like(t, 2**31 - 1).astype(np.int64) * 2**12, "too large to be exact"),
        ("encoder.in.weight", lambda t: t[1:], "expected"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(name: str, change: Any, match: str) -> None:
    tensors = dict(start().tensors)
    with pytest.raises(ValueError, match=match):
        codec_of(tensors | {name: change(tensors[name])})


def test_the_network_that_learns_is_the_one_that_runs() -> None:
    """Vectors, decoded colour and alpha of torch in fp32 beside those of the integer core."""
    training = RgbaTraining(start().config, loud(), start().crops, SHORT)
    with torch.no_grad():
        for net in (training.core.encoder, training.core.decoder):
            for name, parameter in net.named_parameters():
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    core = codec_of(training.core.rounded()).core
    cells = np.stack([layer(s) for s in (40, 41)]).reshape(2, 6, 8, 6, 8, 4)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 6, 64, 4).astype(np.int64)
    unit, steps = core.config["unit"], core.config["steps"]
    colour, alpha = (torch.tensor(p / unit, dtype=torch.float32) for p in premultiplied(cells))
    vectors = core.vectors(core.encode(cells))
    with torch.no_grad():
        z = training.core.encode(colour, alpha).numpy() * unit * steps
        found = training.core.decode(torch.tensor(vectors / (unit * steps), dtype=torch.float32))
        solid = training.core.plain_alpha(255.0).numpy() * unit * steps
    assert np.abs(z - core.projected(cells)).max() < 2 * unit * steps / 64
    assert np.abs(solid - core.solid).max() < 2
    codes = core.encode(cells)
    mixed = codes[..., 0] > OPAQUE
    wanted = core.decode(codes)
    ours = [np.clip(f.numpy() * 255, 0, 255) for f in found]
    assert np.abs(ours[0] - wanted[0])[mixed].max() < 2
    firm = (wanted[1] > 0) & (wanted[1] < 255)
    assert (np.abs(ours[1] - wanted[1]) * firm)[mixed].max() < 2


@pytest.mark.slow
@pytest.mark.parametrize("cut", [3, 6, 7])
def test_stopped_and_gone_on_equals_never_stopped(cut: int, tmp_path: Path) -> None:
    one = start()
    whole = RgbaTraining(one.config, one.tensors, one.crops, SHORT)
    whole.run()
    before = RgbaTraining(one.config, one.tensors, one.crops, SHORT)
    before.run(until=cut)
    before.save(tmp_path / "state.safetensors")
    after = RgbaTraining(one.config, one.tensors, one.crops, SHORT)
    after.restore(tmp_path / "state.safetensors")
    after.run()
    assert after.loss == whole.loss
    found, wanted = after.tensors(), whole.tensors()
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
    assert any((found[k] != one.tensors[k]).any() for k in found if k.startswith("decoder."))
    assert (found["books_alpha"] != one.tensors["books_alpha"]).any()
    assert (found["books_colour"] != one.tensors["books_colour"]).any()


@pytest.mark.slow
def test_the_last_phase_keeps_the_codes() -> None:
    one = start()
    training = RgbaTraining(one.config, one.tensors, one.crops, SHORT)
    training.run(until=training.schedule.joint + 1)
    joint = codec_of(training.tensors())
    training.run()
    done = codec_of(training.tensors())
    unseen = np.stack([layer(s) for s in range(80, 84)])
    assert np.array_equal(joint.encode(unseen), done.encode(unseen))
    assert (joint.decode(joint.encode(unseen)) != done.decode(done.encode(unseen))).any()


@pytest.mark.slow
def test_lost_codes_of_every_book_move_and_others_do_not() -> None:
    """As if no code had been used for long, just before step 49 looks after them."""
    one = start()
    training = RgbaTraining(one.config, one.tensors, one.crops, Schedule(steps=150, batch=2, seed=3))
    training.run(until=49)
    training.seen.zero_()
    before = {name: getattr(training.core, name).detach().clone() for name in training.books}
    training.run(until=50)
    row = 0
    for name, books in before.items():
        now, averages = getattr(training.core, name), getattr(training.average, name)
        for q, book in enumerate(books):
            moved = (now[q] - book).abs().amax(1) > 20 * training.schedule.rate
            assert 0 < int(moved.sum()) < len(book), f"{name} {q}"
            assert (training.seen[row, : len(book)][moved] == 1).all()
            assert (averages[q] - now[q])[moved].abs().max() < 0.01
            row += 1
    assert row == len(training.seen) == 3


@pytest.mark.slow
def test_training_lowers_the_held_out_error_over_every_ground() -> None:
    one = start()
    training = RgbaTraining(one.config, one.tensors, one.crops, Schedule(steps=160, batch=8, rate=3e-3))
    training.run()
    before, after = codec_of(one.tensors), codec_of(training.tensors())
    unseen = [layer(s) for s in range(200, 212)]
    for level in (0.0, 90.0, 255.0):
        ground = np.full((48, 48, 3), level)

        def error(codec: ConvRgbaCodec, ground: NDArray[np.float64] = ground) -> float:
            pairs = [(x, codec.decode(codec.encode(x))) for x in unseen]
            return float(np.mean([(composite([a], ground) - composite([b], ground)) ** 2 for a, b in pairs]))

        assert error(after) < 0.9 * error(before)


def _training() -> RgbaTraining:
    return RgbaTraining(start().config, start().tensors, start().crops, SHORT)


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns() -> None:
    assert np.allclose(losses_of_two_ranks(_training), losses_of(_training()), rtol=1e-4)


def test_a_set_takes_it_in_the_place_of_the_closed_form(folder: Path, tmp_path: Path) -> None:
    before = TokenizerSet.load(folder)
    before.save(tmp_path)
    learn_codecs(
        records(0, 8), tmp_path, names=["rgba"], schedule=Schedule(steps=3, batch=2), sizes=SMALL, net=NET
    )
    after = TokenizerSet.load(tmp_path)
    assert after.codecs["rgba"].kind == "rgba.conv"
    assert [(b.name, b.size) for b in after.manifest.blocks] == [
        (b.name, b.size) for b in before.manifest.blocks
    ]
    assert after.manifest.hash != before.manifest.hash
    layers = [layer(300)[:45, :41], layer(301)[:45, :41]]
    [item] = after.decode(after.rgba_segment(layers).ids)
    assert item.complete and len(item.value) == 2
    codec = after.codecs["rgba"]
    for found, image in zip(item.value, layers, strict=True):
        assert np.array_equal(found, codec.decode(codec.encode(image)))


def test_layers_that_show_nothing_cannot_be_learned_from() -> None:
    with pytest.raises(DataError, match="nothing shows"):
        rgba_start([np.zeros((16, 16, 4), np.uint8)], books=2, alpha_codes=8, colour_codes=8)


@pytest.mark.parametrize("how", ["box", "bilinear", "bicubic", "lanczos"])
def test_a_resized_sprite_has_no_fringe(how: str) -> None:
    """Laid over a ground, it is the resized composite; Pillow's own resize of RGBA is not asked."""
    sprite = np.zeros((60, 52, 4), np.uint8)
    sprite[..., 1] = 255
    y, x = np.mgrid[:60, :52]
    sprite[(y - 30) ** 2 + (x - 24) ** 2 < 300] = (255, 0, 0, 255)
    for width, height in ((13, 15), (37, 20), (90, 111)):
        small = resize_rgba(sprite, width, height, how=how)
        assert small.shape == (height, width, 4)
        assert small[..., 1:3].max() <= 2
        assert (small[..., 0] >= 253).all(), "what is clear has the colour of the sprite beside it"
        for level in (0.0, 255.0):
            over = composite([sprite], np.full((60, 52, 3), level)).astype(np.float32)
            planes = [
                Image.fromarray(over[..., k]).resize((width, height), getattr(Image.Resampling, how.upper()))
                for k in range(3)
            ]
            wanted = np.clip(np.stack([np.asarray(p) for p in planes], -1), 0, 255)
            found = composite([small], np.full((height, width, 3), level))
            assert np.abs(found - wanted).max() <= 2


def test_bleeding_keeps_what_shows_and_fills_the_rest_from_beside_it() -> None:
    rng = np.random.default_rng(8)
    image = rng.integers(0, 256, (13, 22, 4), dtype=np.uint8)
    image[..., 3] = 0
    image[2:5, 1:4] = (10, 20, 30, 255)
    image[9:12, 18:21] = (200, 100, 50, 7)
    found = bleed(image)
    shown = image[..., 3] > 0
    assert np.array_equal(found[shown], image[shown])
    assert np.array_equal(found[..., 3], image[..., 3])
    assert found[3, 0, :3].tolist() == [10, 20, 30] and found[12, 21, :3].tolist() == [200, 100, 50]
    assert found[..., :3].min() >= 10 and found[..., 0].max() <= 200
    assert not bleed(np.full((3, 4, 4), 9, np.uint8) * np.array([1, 1, 1, 0], np.uint8)).any()


def test_what_cannot_be_resized_is_said() -> None:
    with pytest.raises(DataError, match=r"uint8 \[H, W, 4\]"):
        resize_rgba(np.zeros((4, 4, 3), np.uint8), 2, 2)
    with pytest.raises(DataError, match="0 x 2"):
        resize_rgba(np.zeros((4, 4, 4), np.uint8), 0, 2)
    with pytest.raises(DataError, match="no filter 'cubist'"):
        resize_rgba(np.zeros((4, 4, 4), np.uint8), 2, 2, how="cubist")
