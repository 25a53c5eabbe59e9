"""Learned codecs: the integer network against torch, exactness at any cut, training that helps, stops and goes on."""

from __future__ import annotations

import hashlib  # noqa: F401 -- of the program below
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizer_samples import SMALL, page, picture, records, tone
from two_ranks import losses_of, losses_of_two_ranks

from ringweave.tokenizers.audio import mdct_basis
from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.conv_net import ACTIVATION, WEIGHT, IntegerNet, Shape
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.grid import BLANK
from ringweave.tokenizers.learn import Schedule, Training
from ringweave.tokenizers.learn_run import learn_codecs
from ringweave.tokenizers.learn_start import NetSizes, Start, audio_start, image_start, score_start
from ringweave.tokenizers.measure import psnr
from ringweave.tokenizers.set import TokenizerSet

NET = NetSizes(width=16, encoder_blocks=2, decoder_blocks=1)


def start_of(name: str) -> Start:
    """A small closed form to train from."""
    if name == "image":
        return image_start([picture(s) for s in range(12)], codes=32, net=NET, crop=4)
    if name == "score":
        return score_start([page(s) for s in range(6)], books=2, codes=16, patch=8, dims=16, net=NET, crop=4)
    clips = [tone(s) for s in range(6)]
    return audio_start(clips, rate=16_000, hop=320, bins=64, books=2, codes=16, net=NET, crop=8)


def random_networks(start: Start, *, seed: int = 0) -> Tensors:
    """The start's tensors with networks that do something."""
    rng = np.random.default_rng(seed)
    out = dict(start.tensors)
    for name, value in out.items():
        if name.startswith(("encoder.", "decoder.")):
            out[name] = rng.integers(-WEIGHT // 2, WEIGHT // 2, value.shape).astype(np.int32)
    return out


@pytest.mark.parametrize("shape", [Shape(5, 7, 4, 2), Shape(6, 8, 3, 3, rows=1, columns=3)])
def test_the_integer_network_is_the_one_torch_trains(shape: Shape) -> None:
    """In fp64 and without rounding of activations, which is all that may differ: half a step a layer."""
    from ringweave.tokenizers.learn_core import Net

    generator = torch.Generator().manual_seed(3)
    net = Net(shape, generator).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter += (0.1 if "biases" in name else 0.3) * torch.randn(
                parameter.shape, generator=generator
            )
            parameter.copy_((parameter * WEIGHT).round() / WEIGHT)
    x = torch.randn(2, 5, 6, shape.inputs, generator=generator, dtype=torch.float64)
    x = (x * ACTIVATION).round() / ACTIVATION
    with torch.no_grad():
        wanted = net(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    found = IntegerNet(shape, net.rounded("n."), prefix="n.")(x.numpy() * ACTIVATION)
    assert np.array_equal(found, np.rint(found))
    assert np.abs(wanted).max() > 1
    assert np.abs(found / ACTIVATION - wanted).max() < 0.05


def test_networks_that_could_round_are_refused() -> None:
    shape = Shape(4, 4, 4, 0)
    tensors = {f"n.{n}.weight": np.full((4, 4), 2**31 - 1, np.int32) for n in ("in", "out")}
    tensors |= {f"n.{n}.bias": np.zeros(4, np.int32) for n in ("in", "out")}
    IntegerNet(shape, tensors, prefix="n.")
    tensors["n.in.weight"] = np.full((4, 4), 2**31 - 1, np.int64) * 2**9
    with pytest.raises(ValueError, match="too large to be exact"):
        IntegerNet(shape, tensors, prefix="n.")
    with pytest.raises(ValueError, match="expected"):
        IntegerNet(Shape(3, 4, 4, 0), tensors, prefix="n.")


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_image_batches_equal_whole(batch: int) -> None:
    start = start_of("image")
    codec = start.codec(random_networks(start))
    images = np.stack([picture(s)[:45, :35] for s in range(100, 109)])
    whole = codec.encode(images)
    parts = [codec.encode(images[k : k + batch]) for k in range(0, len(images), batch)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert (whole != start.codec(start.tensors).encode(images)).any(), "the network has a say"
    assert np.array_equal(codec.decode(whole)[5], codec.decode(whole[5]))
    assert codec.decode(whole).shape == (9, 48, 40, 3)


@pytest.mark.parametrize("chunk", [1, 319, 320, 997, 5000])
def test_audio_streams_equal_whole(chunk: int) -> None:
    start = start_of("audio")
    codec = start.codec(random_networks(start))
    samples = tone(50)[:7001] * 3
    if chunk == 1:
        samples = samples[:1500]
    whole = codec.encode(samples)
    assert len(whole) == codec.frames(len(samples))
    assert (whole != start.codec(start.tensors).encode(samples)).any(), "the network has a say"
    stream = codec.stream()
    parts = [stream.push(samples[k : k + chunk]) for k in range(0, len(samples), chunk)]
    assert np.array_equal(np.concatenate([*parts, stream.flush()]), whole)
    assert len(codec.decode(whole)) >= len(samples)


def test_an_edge_is_felt_as_far_as_the_radius_says_and_no_farther() -> None:
    start = start_of("audio")
    codec = start.codec(random_networks(start))
    assert codec.radius == 2
    samples = tone(51)[: 40 * 320] * 3
    changed = samples.copy()
    changed[20 * 320 :] = tone(52)[: 20 * 320] * 3
    same = (codec.encode(samples) == codec.encode(changed)).all(1)
    assert same[:18].all(), "frame 20 is the first with other samples"
    assert not same[18:].all()


def test_silence_and_blank_paper_stay() -> None:
    start = start_of("audio")
    loud = random_networks(start)
    loud["encoder.out.bias"] = np.full_like(loud["encoder.out.bias"], 1 << 28)
    sound = start.codec(loud)
    assert sound.encode(tone(3)).any()
    codes = sound.encode(np.zeros(4000, np.int16))
    assert not codes.any()
    assert not sound.decode(codes).any()
    start = start_of("score")
    paper = start.codec(random_networks(start))
    sheet = page(3).copy()
    sheet[:16] = 255
    codes = paper.encode(sheet)
    assert (codes[:2] == BLANK).all()
    assert (codes != BLANK).any()
    assert (paper.decode(codes)[:16] == 255).all()


@pytest.mark.slow
def test_threads_change_no_id() -> None:
    """BLAS adds in another order with two threads; integers do not mind."""
    program = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_learned import *\n"
        "start = start_of('image')\n"
        "codec = start.codec(random_networks(start))\n"
        "codes = codec.encode(np.stack([picture(s, size=128) for s in range(100, 104)]))\n"
        "print(hashlib.sha256(codes.tobytes() + codec.decode(codes).tobytes()).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for threads in ("1", "2")
    ]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(digests[0]) == 65


@pytest.mark.slow
def test_training_lowers_the_held_out_error_and_never_touches_the_codes_of_its_last_phase() -> None:
    start = image_start([picture(s) for s in range(24)], codes=64, net=NetSizes(32, 1, 2), crop=4)
    heldout = np.stack([picture(s) for s in range(200, 216)])

    def quality(codec: Any) -> float:
        return float(np.mean([psnr(a, b) for a, b in zip(heldout, codec.decode(codec.encode(heldout)))]))

    training = Training(start.config, start.tensors, start.crops, Schedule(steps=240, batch=12, rate=3e-3))
    training.run(until=training.schedule.joint + 1)
    joint = start.codec(training.tensors())
    training.run()
    trained = start.codec(training.tensors())
    assert np.array_equal(joint.encode(heldout), trained.encode(heldout))
    assert quality(trained) > quality(start.codec(start.tensors)) + 0.3


SHORT = Schedule(steps=9, batch=4, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "score", "audio"])
@pytest.mark.parametrize("cut", [3, 6, 7])
def test_stopped_and_gone_on_equals_never_stopped(name: str, cut: int, tmp_path: Path) -> None:
    """Within the first phase, between the two, within the second: bit for bit."""
    start = start_of(name)
    whole = Training(start.config, start.tensors, start.crops, SHORT)
    whole.run()
    before = Training(start.config, start.tensors, start.crops, SHORT)
    before.run(until=cut)
    before.save(tmp_path / "state.safetensors")
    after = Training(start.config, start.tensors, start.crops, SHORT)
    after.restore(tmp_path / "state.safetensors")
    assert after.step == cut
    after.run()
    assert after.loss == whole.loss
    found, wanted = after.tensors(), whole.tensors()
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
    assert any((found[k] != start.tensors[k]).any() for k in found if k.startswith("decoder."))


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    start = start_of("image")
    training = Training(start.config, start.tensors, start.crops, SHORT)
    training.run(until=1)
    path = tmp_path / "state.safetensors"
    training.save(path)
    other = Training(start.config, start.tensors, start.crops, Schedule(steps=10, batch=4, seed=3))
    with pytest.raises(DataError, match="another schedule"):
        other.restore(path)
    elsewhere = image_start([picture(s) for s in range(12, 24)], codes=32, net=NET, crop=4)
    with pytest.raises(DataError, match="another start"):
        Training(elsewhere.config, elsewhere.tensors, elsewhere.crops, SHORT).restore(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read the state"):
        training.restore(path)


def _training() -> Training:
    start = start_of("audio")
    return Training(start.config, start.tensors, start.crops, SHORT)


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns() -> None:
    assert np.allclose(losses_of_two_ranks(_training), losses_of(_training()), rtol=1e-4)


def test_threads_that_are_free_change_no_weight(tmp_path: Path) -> None:
    """Training pins itself to one thread, and gives the others back."""
    from ringweave.tokenizers.fit import fit_tokenizers

    seen: list[int] = []
    before = torch.get_num_threads()
    files = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            folder = tmp_path / str(threads)
            fit_tokenizers({"score": records(0, 8)["score"]}, folder, sizes=SMALL)
            learn_codecs(
                {"score": records(0, 8)["score"]}, folder, names=["score"], schedule=Schedule(steps=3, batch=2),
                sizes=SMALL, net=NET, progress=lambda _: seen.append(torch.get_num_threads()),
            )  # fmt: skip
            assert torch.get_num_threads() == threads
            files.append((folder / "score.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]
    assert seen == [1, 1, 2, 1]  # preparing, then learning


def test_a_set_takes_learned_codecs_in_place_of_closed_ones(tmp_path: Path) -> None:
    from ringweave.tokenizers.fit import fit_tokenizers

    train = records(0, 8)
    fit_tokenizers(train, tmp_path, sizes=SMALL)
    before = TokenizerSet.load(tmp_path)
    done = learn_codecs(
        train, tmp_path, names=["image", "audio", "score"], schedule=Schedule(steps=3, batch=2), sizes=SMALL,
        net=NET,
    )  # fmt: skip
    assert {name: entry["steps"] for name, entry in done.items()} == {"image": 3, "audio": 3, "score": 3}
    after = TokenizerSet.load(tmp_path)
    assert [after.codecs[n].kind for n in ("image", "rgba", "audio", "score")] == [
        "image.conv", "rgba", "audio.conv", "score.conv",
    ]  # fmt: skip
    assert after.manifest.hash != before.manifest.hash
    assert [b.size for b in after.manifest.blocks] == [b.size for b in before.manifest.blocks]
    assert not (tmp_path / "training").exists()
    sample = picture(300)
    [item] = after.decode(after.image_segment(sample).ids)
    assert item.complete and item.value.shape == sample.shape
    path = tmp_path / "image.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VocabularyError, match="the image codec is not the one the vocabulary was made with"):
        TokenizerSet.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("every_s", "from_step"), [(0.0, 20), (1e9, 0)])
def test_a_stopped_command_goes_on_and_ends_in_the_same_files(
    tmp_path: Path, every_s: float, from_step: int
) -> None:
    """Stopped in the second codec: the first is not trained again, the second goes on from its last state."""
    from ringweave.tokenizers.fit import fit_tokenizers

    train, schedule = records(0, 8), Schedule(steps=45, batch=2)

    def learn(folder: Path, stop_at: str = "") -> dict[str, Any]:
        def progress(message: str) -> None:
            if stop_at and stop_at in message:
                raise KeyboardInterrupt

        fit_tokenizers(train, folder, sizes=SMALL)
        return learn_codecs(
            train, folder, names=["image", "audio"], schedule=schedule, sizes=SMALL, net=NET,
            save_every_s=every_s, progress=progress,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "stopped", "audio tokenizer: step 40")
    done = learn(tmp_path / "stopped")
    assert (done["image"]["resumed_at"], done["audio"]["resumed_at"]) == (45, from_step)
    whole = learn(tmp_path / "whole")
    assert [done[n]["loss"] for n in done] == [whole[n]["loss"] for n in done]
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "stopped").iterdir())
    assert all(
        (tmp_path / "whole" / n).read_bytes() == (tmp_path / "stopped" / n).read_bytes() for n in names
    )


def test_the_zero_code_of_sound_stays_zero() -> None:
    start = start_of("audio")
    training = Training(start.config, start.tensors, start.crops, Schedule(steps=150, batch=2))
    training.run(until=60)
    books = training.tensors()["codebooks"]
    assert not books[:, 0].any()
    assert (books[:, 1:] != start.tensors["codebooks"][:, 1:]).any()


def test_what_cannot_be_learned_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text cannot be learned"):
        learn_codecs({}, tmp_path, names=["text"], schedule=SHORT)
    with pytest.raises(DataError, match="no image records"):
        learn_codecs({}, tmp_path, names=["image"], schedule=SHORT)


def test_the_basis_of_a_learned_sound_codec_is_the_closed_ones() -> None:
    assert np.array_equal(start_of("audio").fixed["basis"], mdct_basis(320, 64))
