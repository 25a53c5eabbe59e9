"""Learned codecs for a tokenizer set that has its closed forms: read records, train, keep state, save the set."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringweave.tokenizers import members as read
from ringweave.tokenizers.audio import resample
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.fit import (
    LEARNABLE,
    FitSizes,
    RecordReader,
    Samples,
    training_images,
    training_latents,
    training_layers,
)
from ringweave.tokenizers.learn import Schedule, Training
from ringweave.tokenizers.learn_rgba import RgbaTraining
from ringweave.tokenizers.learn_start import (
    NetSizes,
    Start,
    audio_start,
    image_start,
    rgba_start,
    score_start,
)
from ringweave.tokenizers.learn_vae import VaeSchedule, VaeTraining, vae_config
from ringweave.tokenizers.set import TokenizerSet

#: Folder beside the codecs that holds the state of trainings that are not done.
STATE_FOLDER = "training"


def learn_codecs(
    samples: Samples,
    folder: Path,
    *,
    names: Sequence[str],
    schedule: Schedule,
    sizes: FitSizes | None = None,
    net: NetSizes | None = None,
    latents: Samples | None = None,
    save_every_s: float = 60.0,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Train the codecs `names` of the set in `folder` on `samples` and put them in the place of their closed forms.

    "latents" is trained from nothing; unless the schedule is a `VaeSchedule`, it takes steps and seed of it. latents:
    what it learns from, sources of any names, of which each record is read as latents read it
    (`members.latent_pictures_of`); else the layers of "rgba" and the pictures of "image" in `samples`.

    Every rank of a process group calls it with the same arguments; rank 0 writes. Stopped, it goes on from its last
    state when called again with the same settings. Returns {name: {"seconds", "steps", "loss", "resumed_at"}}, of
    "latents" also how many "layers" and "pictures" it learned from. Raises DataError for a modality without records or
    of another kind, and for a training that diverges.
    """
    sizes, say = sizes or FitSizes(), progress or (lambda _message: None)
    strange = [name for name in names if name not in LEARNABLE]
    if strange:
        raise DataError(
            f"{', '.join(strange)} cannot be learned", fix=f"name some of: {', '.join(LEARNABLE)}"
        )
    reader = RecordReader(samples, sizes.max_records)
    first = not dist.is_initialized() or dist.get_rank() == 0
    states, done, out = folder / STATE_FOLDER, {}, {}
    if first:
        states.mkdir(parents=True, exist_ok=True)
    for name in names:
        say(f"preparing the {name} tokenizer")
        training, finish = _prepared(name, reader, latents, sizes, net or NetSizes(), schedule)
        state = states / f"{name}.safetensors"
        if state.exists():
            training.restore(state)
        resumed, started = training.step, time.perf_counter()
        _run(training, state, name, save_every_s, say)
        training.save(state)  # whole, should one of the others be stopped
        done[name] = finish()
        out[name] = {
            "seconds": round(time.perf_counter() - started, 2),
            "steps": training.step,
            "loss": training.loss,
            "resumed_at": resumed,
        }
        if isinstance(training, VaeTraining):
            out[name] |= {"layers": training.layers, "pictures": training.pictures}
    if first:
        TokenizerSet.load(folder).replaced(done).save(folder)
        shutil.rmtree(states)
    if dist.is_initialized():
        dist.barrier()
    return out


def _run(training: Training, state: Path, name: str, every_s: float, say: Callable[[str], Any]) -> None:
    """All steps, with the state saved about every `every_s` seconds, at steps that all ranks agree on.

    On one thread: with several, sums are split by how many are free, and the codec would differ from run to run.
    """
    total, saved = training.schedule.steps, time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while training.step < total:
            training.run(until=training.step + 20)
            say(f"learning the {name} tokenizer: step {training.step} of {total}, loss {training.loss:.4f}")
            if time.perf_counter() - saved > every_s:
                training.save(state)
                saved = time.perf_counter()
    finally:
        torch.set_num_threads(threads)


def _prepared(
    name: str,
    reader: RecordReader,
    latents: Samples | None,
    sizes: FitSizes,
    net: NetSizes,
    schedule: Schedule,
) -> tuple[Training, Callable[[], Any]]:
    """The training of a codec before its first step, and what makes the codec of it after the last."""
    if name == "latents":
        vae = _autoencoder(reader, latents, sizes, schedule)
        return vae, vae.codec
    start = _start(name, reader, sizes, net, schedule.seed)
    trainer = RgbaTraining if name == "rgba" else Training
    mine = replace(schedule, commit=start.commit, decoder_only=start.decoder_only)
    training = trainer(start.config, start.tensors, start.crops, mine)
    return training, lambda: start.codec(training.tensors())


def _autoencoder(
    reader: RecordReader, latents: Samples | None, sizes: FitSizes, schedule: Schedule
) -> VaeTraining:
    """The training of the codec of latents before its first step. latents: see `learn_codecs`."""
    if not isinstance(schedule, VaeSchedule):
        crop = max(VaeSchedule.crop, 2 * sizes.latents_patch)
        schedule = VaeSchedule(steps=schedule.steps, seed=schedule.seed, crop=crop)
    config = vae_config(base=sizes.latents_base, channels=sizes.latents_channels, patch=sizes.latents_patch)
    if latents is None:
        pictures = [read.as_rgba(picture) for picture in reader("image", read.image_of)]
        return VaeTraining(config, training_layers(reader), pictures, schedule)
    layers, pictures = training_latents(RecordReader(latents, sizes.max_records), latents)
    return VaeTraining(config, layers, pictures, schedule)


def _start(name: str, reader: RecordReader, sizes: FitSizes, net: NetSizes, seed: int) -> Start:
    records: list[Any]
    if name == "image":
        records = training_images(reader)
    elif name == "audio":
        records = [resample(clip, rate, sizes.audio_rate) for clip, rate in reader("audio", read.audio_of)]
    elif name == "rgba":
        records = training_layers(reader)
    else:
        records = list(reader("score", read.score_of))
    if not records:
        raise DataError(f"there are no {name} records to learn from")
    if name == "image":
        return image_start(records, codes=sizes.image_codes, patch=sizes.image_patch, net=net, seed=seed)
    if name == "rgba":
        return rgba_start(
            records, books=sizes.rgba_alpha_books, alpha_codes=sizes.rgba_alpha_codes,
            colour_codes=sizes.rgba_colour_codes, patch=sizes.image_patch, net=net, seed=seed,
        )  # fmt: skip
    if name == "audio":
        return audio_start(
            records, rate=sizes.audio_rate, hop=sizes.audio_hop, bins=sizes.audio_bins, books=sizes.audio_books,
            codes=sizes.audio_codes, net=net, seed=seed,
        )  # fmt: skip
    return score_start(
        records, books=sizes.score_books, codes=sizes.score_codes, patch=sizes.score_patch, net=net, seed=seed
    )
