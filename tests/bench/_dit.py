"""What the benchmarks of the diffusion transformer share: pictures of mixed sizes, their packs, and both models.

Words come as given vectors on every side, so nothing but the transformer itself is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ringweave.data_pipes.pack import Pack, Piece
from ringweave.data_pipes.planner import PackPlanner
from ringweave.data_pipes.stream import PackStream
from ringweave.pretrain.dit_batch import DiffusionSettings, DiTBatch, collate_diffusion
from ringweave.pretrain.engine import TorchEngine, make_adamw, world_loss
from ringweave.pretrain.models.dit import LATENT, WORD, DiT, DiTShape
from ringweave.pretrain.parallelize import build_model
from ringweave.tokenizers.bare import document as bare_document
from ringweave.tokenizers.bare import latent_segment
from ringweave.tokenizers.segment import Document, Segment

ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
#: Positions that the stock class has too, and words that are never dropped: all sides compute the same loss.
SETTINGS = DiffusionSettings(preset="msrope", drop=0.0)


@dataclass(frozen=True, slots=True)
class Size:
    """Model and work of a step: `packs` packs of `context` slots, documents of `smallest` to `largest` tokens."""

    layers: int = 4
    heads: int = 6
    axes: tuple[int, ...] = (16, 24, 24)
    channels: int = 64
    text: int = 256
    context: int = 4096
    packs: int = 2
    smallest: int = 64
    largest: int = 2048

    def shape(self) -> DiTShape:
        """As our model wants it; nothing begins at zero, so no gradient is trivial."""
        return DiTShape(
            layers=self.layers, heads=self.heads, axes=self.axes, channels=self.channels, out=self.channels,
            text=self.text, zero_init=False,
        )  # fmt: skip


TINY = Size(
    layers=2, heads=2, axes=(4, 6, 6), channels=8, text=16, context=192, packs=2, smallest=16, largest=96
)


class Pictures:
    """Documents of words and one picture, log-uniform in tokens; sides from 1:2 to 2:1, odd ones too."""

    digest = "pictures"

    def __init__(self, size: Size, count: int = 400) -> None:
        draws = np.random.default_rng(0)
        tokens = np.exp(draws.uniform(np.log(size.smallest), np.log(size.largest), count))
        words = draws.integers(1, size.smallest // 2 + 1, count)
        cells = np.maximum(tokens - words, 1)
        rows = np.maximum(1, np.sqrt(cells * 2.0 ** draws.uniform(-1, 1, count)).astype(np.int64))
        columns = np.maximum(1, np.rint(cells / rows).astype(np.int64))
        length = words + rows * columns
        inside = (length >= size.smallest) & (length <= size.largest)
        self.size, self.lengths = size, {"image": length[inside].astype(np.int64)}
        self.plans = np.stack([words, rows, columns], axis=1)[inside]

    def document(self, piece: Piece) -> Document:
        """The document a piece is cut from."""
        words, rows, columns = (int(n) for n in self.plans[piece.sample])
        places = np.zeros((words - 1, 4), np.int32)
        places[:, 0] = np.arange(words - 1)
        text = Segment(np.full(words - 1, 30, np.int32), "text", places) if words > 1 else None
        values = np.random.default_rng([0, piece.sample])
        latents = values.standard_normal((1, rows, columns, self.size.channels), dtype=np.float32)
        return bare_document(str(piece.sample), text, [latent_segment(latents, modality="image")])

    def vectors(self, sample: int) -> Tensor:
        """What stands for the words of a document, [words, text]."""
        values = np.random.default_rng([1, sample])
        shape = (int(self.plans[sample, 0]), self.size.text)
        return torch.from_numpy(values.standard_normal(shape, dtype=np.float32))


@dataclass(slots=True, kw_only=True)
class GivenWords(DiTBatch):
    """A batch whose words are vectors already; embeddings [n, l, text]."""

    embeddings: Tensor

    def inputs(self, part: slice = slice(None)) -> dict[str, Tensor]:
        """See `DiTBatch.inputs`."""
        return {**DiTBatch.inputs(self, part), "embeddings": self.embeddings[part]}


def make_steps(size: Size, count: int) -> list[list[Pack]]:
    """The packs of `count` steps."""
    corpus = Pictures(size)
    planner = PackPlanner(lengths=corpus.lengths, weights={"image": 1.0}, seed=0, context=size.context)
    stream = PackStream(corpus, planner)
    return [[stream.materialise(plan) for plan in stream.plans(size.packs)] for _ in range(count)]


def make_batch(packs: Sequence[Pack], size: Size) -> GivenWords:
    """As the trainer makes it, with the words' vectors."""
    batch, corpus = collate_diffusion(packs, SETTINGS, channels=size.channels), Pictures(size)
    embeddings = torch.zeros(*batch.kind.shape, size.text)
    for row, pack in enumerate(packs):
        for number, piece in enumerate(pack.plan.pieces):
            words = (batch.documents[row] == number) & (batch.kind[row] == WORD)
            embeddings[row, words] = corpus.vectors(piece.sample)
    fields = {name: getattr(batch, name) for name in DiTBatch.__dataclass_fields__}
    return GivenWords(**fields, embeddings=embeddings)


def our_model(size: Size) -> DiT:
    """Ours, its parameters a function of their names."""
    return build_model(size.shape(), None, seed=0).train()


def stock_model(size: Size) -> nn.Module:
    """diffusers' class with the very parameters of ours and its own defaults."""
    from diffusers import QwenImageTransformer2DModel

    shape = size.shape()
    model = QwenImageTransformer2DModel(
        patch_size=1, in_channels=shape.channels, out_channels=shape.out, num_layers=shape.layers,
        attention_head_dim=shape.head_dim, num_attention_heads=shape.heads, joint_attention_dim=shape.text,
        axes_dims_rope=shape.axes,
    )  # fmt: skip
    model.load_state_dict(our_model(size).state_dict(), strict=True)
    return model.train()


def our_step(batches: Sequence[DiTBatch], size: Size) -> Callable[[], float]:
    """A training step of ours, one pack a forward pass; gives the loss."""
    model = our_model(size)
    engine = TorchEngine(model, None, micro_batch=1, optimizer=make_adamw(model, **ADAMW))
    calls = iter(range(10**9))

    def step() -> float:
        sums, counts = engine.forward_backward(batches[next(calls) % len(batches)])
        engine.step(ADAMW["lr"])
        return world_loss(sums, counts, {}, normalize="modality")

    return step


@dataclass(slots=True)
class Alone:
    """One document as the stock class takes it: latents, velocity [m, channels], words' vectors [n, text]."""

    latents: Tensor
    velocity: Tensor
    words: Tensor
    sigma: float
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Words and latents."""
        return len(self.latents) + len(self.words)


def documents_of(packs: Sequence[Pack], batch: GivenWords) -> list[list[Alone]]:
    """The documents of each pack, noised as in the batch."""
    found = []
    for row, pack in enumerate(packs):
        grids = {span.doc: (span.frames, span.height, span.width) for span in pack.grids}
        some = []
        for number in range(len(pack.plan.pieces)):
            mine = batch.documents[row] == number
            cells, words = mine & (batch.kind[row] == LATENT), mine & (batch.kind[row] == WORD)
            some.append(
                Alone(
                    batch.latents[row][cells], batch.velocity[row][cells], batch.embeddings[row][words],
                    float(batch.sigma[row, number]), grids[number],
                )
            )  # fmt: skip
        found.append(some)
    return found
