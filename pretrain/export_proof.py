"""What the stock classes make of an exported diffusers folder, beside what the model makes: law 5 for the DiT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringweave.pretrain.errors import StorageError
from ringweave.pretrain.import_dit import read_private
from ringweave.pretrain.models.dit import LATENT, WORD, DiT
from ringweave.pretrain.models.dit_positions import Grid, Preset, document_positions
from ringweave.pretrain.models.dit_words import Words
from ringweave.pretrain.stock_positions import reproduced
from ringweave.tokenizers.latent_codec import LatentCodec

#: How far outputs of the stock classes may be from ours, relative to the largest.
BOUND = 5e-5
#: Small documents of all kinds: (grids, words).
DOCUMENTS: tuple[tuple[tuple[Grid, ...], int], ...] = (
    ((Grid(4, 6),), 7),
    ((Grid(3, 4, frames=3),), 4),
    ((Grid(5, 3), Grid(2, 4)), 1),
    ((Grid(4, 4), Grid(4, 4, condition=True)), 2),
    ((Grid(4, 4), Grid(4, 4), Grid(4, 4, condition=True)), 6),
    ((*[Grid(3, 5)] * 4, Grid(2, 3, condition=True)), 3),
    ((Grid(4, 4), Grid(2, 3, condition=True), Grid(3, 3, condition=True)), 5),
)


def prove(model: DiT, codec: LatentCodec | None, folder: Path) -> dict[str, float]:
    """The largest differences, by name. StorageError when the stock classes give other outputs than ours."""
    found = {"max_rel_output_diff": transformer_difference(model, folder)}
    if model.words is not None:
        found["max_rel_text_diff"] = words_difference(model.words, folder)
    if codec is not None:
        found["max_abs_vae_diff"] = vae_difference(codec, folder)
    wrong = {name: value for name, value in found.items() if not value <= BOUND}
    if wrong:
        raise StorageError(
            "the stock classes do not give the outputs of the model that was to be exported",
            where=str(folder),
            why=", ".join(f"{name} is {value:.1e}, more than {BOUND:.0e}" for name, value in wrong.items()),
            fix="nothing was written; look for parameters that are not finite, and at versions: ringweave doctor",
        )
    return found


@torch.no_grad()
def document_velocity(
    model: DiT,
    grids: Sequence[Grid],
    words: Tensor,
    latents: Tensor,
    sigma: float,
    *,
    preset: Preset,
    sign: int = 1,
) -> Tensor:
    """What the model says of one document alone: velocities [cells, out] of latents [cells, channels], conditions too.

    words: ids [n], or vectors [n, text] for a model without words of its own.
    """
    count, size = len(words), len(words) + len(latents)
    kind = torch.tensor([WORD] * count + [LATENT] * len(latents))
    places = document_positions(grids, count, preset, axes=len(model.shape.axes), sign=sign)
    given: dict[str, Tensor] = {}
    ids = torch.zeros(size, dtype=torch.int64)
    if model.words is None:
        vectors = words.new_zeros(size, words.shape[1])
        vectors[:count] = words
        given["embeddings"] = vectors[None]
    else:
        ids[:count] = words
    cells = latents.new_zeros(size, latents.shape[1])
    cells[count:] = latents
    out: Tensor = model(
        ids[None], kind=kind[None], places=torch.from_numpy(np.concatenate(places)).long()[None],
        segment=torch.zeros(1, size, dtype=torch.int64), sigma=torch.tensor([[sigma]]),
        documents=torch.zeros(1, size, dtype=torch.int32), words=(kind == WORD)[None],
        order=torch.arange(size)[None], latents=cells[None], **given,
    )  # fmt: skip
    return out[0, count:]


@torch.no_grad()
def transformer_difference(model: DiT, folder: Path) -> float:
    """Largest difference of velocities, relative to the largest velocity of the document.

    Over those of `DOCUMENTS` that the stock class reproduces, with the folder's rope and then with the other one
    (`use_layer3d_rope`), from noise and through the text encoder that the folder has.
    """
    from diffusers import QwenImageTransformer2DModel

    about = read_private(folder)
    preset, sign = about["preset"], about["sign"]
    words_of = None if model.words is None else _stock_words(folder)
    worst, seen, draw = 0.0, 0, torch.Generator().manual_seed(0)
    for layered in (False, True):
        grids_of = [
            (grids, count)
            for grids, count in DOCUMENTS
            if reproduced(grids, count, preset=preset, sign=sign, layered=layered)
        ]
        if not grids_of:
            continue
        with quiet():
            theirs = QwenImageTransformer2DModel.from_pretrained(
                folder / "transformer", use_layer3d_rope=layered, torch_dtype=torch.float32,
                use_safetensors=True, local_files_only=True,
            ).eval()  # fmt: skip
        for number, (grids, count) in enumerate(grids_of):
            sigma = (number + 0.5) / len(grids_of)
            latents = torch.randn(sum(g.cells for g in grids), model.shape.channels, generator=draw)
            if words_of is None:
                words = vectors = torch.randn(count, model.shape.text, generator=draw)
            else:
                words = _some_ids(count, words_of.config.vocab_size)
                vectors = words_of(words[None], use_cache=False).last_hidden_state[0]
            ours = document_velocity(model, grids, words, latents, sigma, preset=preset, sign=sign)
            stock = theirs(
                latents[None], vectors[None], timestep=torch.tensor([sigma]),
                img_shapes=[[(g.frames, g.height, g.width) for g in grids]], return_dict=False,
            )[0][0]  # fmt: skip
            worst, seen = _larger(worst, _relative(ours, stock)), seen + 1
    assert seen, "a model of which stock code reproduces nothing is refused before"
    return worst


@torch.no_grad()
def words_difference(words: Words, folder: Path, *, length: int = 64) -> float:
    """Largest difference of hidden states from those of transformers' LlamaModel, relative to the largest."""
    ids = _some_ids(length, words.shape.vocab)
    theirs = _stock_words(folder)(ids[None], use_cache=False).last_hidden_state[0]
    documents = torch.zeros(1, length, dtype=torch.int32)
    ours, _ = words(ids, order=torch.arange(length), documents=documents, owner=None)
    return _relative(ours, theirs)


def vae_difference(codec: LatentCodec, folder: Path) -> float:
    """Largest difference of the cells of a random layer from those of diffusers' AutoencoderKLQwenImage."""
    from diffusers import AutoencoderKLQwenImage

    with quiet():
        theirs = AutoencoderKLQwenImage.from_pretrained(
            folder / "vae", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    side = 2 * codec.patch
    layer = np.random.default_rng(0).integers(0, 256, (side, side, 4), dtype=np.uint8)
    cells = LatentCodec.from_model(theirs.eval()).encode(layer)
    return float(np.abs(cells - codec.encode(layer)).max())


def _stock_words(folder: Path) -> Any:
    from transformers import LlamaModel

    with quiet():
        return LlamaModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()


def _some_ids(count: int, vocab: int) -> Tensor:
    return (torch.arange(count) * 7919 + 13) % vocab


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """0 where both are 0, as in a model that begins as the identity; nan for what is not finite."""
    difference, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    return difference / size if size else difference


def _larger(a: float, b: float) -> float:
    """The larger one; nan if one of them is."""
    return a if a != a or a > b else b


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports that transformers and diffusers write while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (kind, kind.get_verbosity(), kind.is_progress_bar_enabled())
        for kind in (diffusers_logging, transformers_logging)
    ]
    for kind, _, _ in before:
        kind.set_verbosity_error()
        kind.disable_progress_bar()
    try:
        yield
    finally:
        for kind, level, bar in before:
            kind.set_verbosity(level)
            if bar:
                kind.enable_progress_bar()
