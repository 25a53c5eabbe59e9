"""Sampling from a diffusion transformer: packs of documents walked from noise to data together.

Guidance is true classifier-free guidance, u + g·(c - u) of a pass with the words and one with the empty prompt, whose
length per token is brought back to that of c (Qwen-Image's norm rescale). Solvers: Euler, and Heun's second order.
Everything random is keyed by (seed, name of the document), so a document looks the same in any pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ringweave.pretrain.dit_batch import SEGMENTS, DiffusionSettings
from ringweave.pretrain.flow import FlowSettings, noise_of, shift_of, shifted
from ringweave.pretrain.models.dit import LATENT, WORD, DiT
from ringweave.pretrain.models.dit_positions import Grid, document_positions
from ringweave.tokenizers.errors import DataError
from ringweave.tokenizers.manifest import BOS
from ringweave.tokenizers.segment import LATENT as PLACEHOLDER

F32 = NDArray[np.float32]
Solver = Literal["euler", "heun"]
SOLVERS: tuple[Solver, ...] = ("euler", "heun")


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """A document to make. words: ids without `bos`; grids: of all its layers in order; given: latents [cells, channels]
    of each grid that is a condition, in order; embeddings: vectors [n, text] of its words in place of ids, for a model
    that reads those."""

    name: str
    words: Sequence[int]
    grids: Sequence[Grid]
    given: Sequence[F32] = field(default_factory=tuple)
    embeddings: F32 | None = None

    def __post_init__(self) -> None:
        wanted = [grid.cells for grid in self.grids if grid.condition]
        if wanted != [len(g) for g in self.given] or all(grid.condition for grid in self.grids):
            raise DataError(
                f"document {self.name}: {len(self.given)} given layers of {[len(g) for g in self.given]} latents",
                why=f"its conditions have {wanted} cells, and it needs a layer to make",
            )

    @property
    def size(self) -> int:
        """Slots it takes, with its words."""
        words = 1 + len(self.words) if self.embeddings is None else len(self.embeddings)
        return words + sum(grid.cells for grid in self.grids)


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """steps of the walk; guidance 1.0: no pass without words; rescale: norm rescale of guided velocities."""

    steps: int = 20
    guidance: float = 4.0
    rescale: bool = True
    solver: Solver = "euler"
    seed: int = 0


class _Packed:
    """Wishes in one pack, with or without their words; without, a document has `bos` or one vector of zeros."""

    def __init__(self, wishes: Sequence[Wish], settings: DiffusionSettings, *, words: bool) -> None:
        vectors: list[tuple[slice, F32]] = []
        ids: list[int] = []
        kind: list[int] = []
        order: list[int] = []
        document: list[int] = []
        places = []
        self.targets: list[list[slice]] = []
        self.given: list[tuple[slice, F32]] = []
        for number, wish in enumerate(wishes):
            text = [BOS, *(wish.words if words else ())]
            if words and wish.embeddings is not None:
                text = [PLACEHOLDER] * len(wish.embeddings)
                vectors.append((slice(len(ids), len(ids) + len(text)), wish.embeddings))
            ids += text
            kind += [WORD] * len(text)
            order += range(len(text))
            here, there = document_positions(
                wish.grids, len(text), settings.preset, axes=settings.axes, sign=settings.sign
            )
            places += [here, there]
            given = iter(wish.given)
            own = []
            for grid in wish.grids:
                slots = slice(len(ids), len(ids) + grid.cells)
                ids += [0] * grid.cells
                kind += [LATENT] * grid.cells
                order += [0] * grid.cells
                if grid.condition:
                    self.given.append((slots, next(given)))
                else:
                    own.append(slots)
            self.targets.append(own)
            document += [number] * (len(ids) - len(document))
        self.ids, self.kind = torch.tensor([ids]), torch.tensor([kind])
        self.order, self.documents = torch.tensor([order]), torch.tensor([document], dtype=torch.int32)
        self.places = torch.from_numpy(np.concatenate(places)).long()[None]
        self.embeddings: torch.Tensor | None = None
        if settings.given:
            self.embeddings = torch.zeros(1, len(ids), settings.given)
            for slots, values in vectors:
                self.embeddings[0, slots] = torch.from_numpy(values)

    def velocity(self, model: DiT, states: list[list[F32]], levels: Sequence[float]) -> list[list[F32]]:
        """Velocities of every target of every wish, at a level of each."""
        latents = torch.zeros(1, self.ids.shape[1], model.shape.channels)
        for slots, values in self.given:
            latents[0, slots] = torch.from_numpy(values)
        for own, some in zip(self.targets, states):
            for slots, state in zip(own, some):
                latents[0, slots] = torch.from_numpy(state)
        sigma = torch.zeros(1, -(-len(levels) // SEGMENTS) * SEGMENTS)
        sigma[0, : len(levels)] = torch.tensor(levels)
        out = model(
            self.ids, kind=self.kind, places=self.places, segment=self.documents.long(), sigma=sigma,
            documents=self.documents, words=self.kind == WORD, order=self.order, latents=latents,
            embeddings=self.embeddings,
        )[0]  # fmt: skip
        return [[out[slots].numpy() for slots in own] for own in self.targets]


def schedule(steps: int, tokens: int, flow: FlowSettings) -> list[float]:
    """steps + 1 levels from 1 down to 0, shifted for a document whose targets have `tokens` latents each."""
    factor = shift_of(tokens, flow)
    return [shifted(1.0 - i / steps, factor) for i in range(steps)] + [0.0]


def guided(conditioned: F32, plain: F32, settings: SampleSettings) -> F32:
    """u + g·(c - u), with the norm of c per token where `rescale`."""
    out = plain + np.float32(settings.guidance) * (conditioned - plain)
    if settings.rescale:
        length = np.linalg.norm(out, axis=-1, keepdims=True)
        out = out * (np.linalg.norm(conditioned, axis=-1, keepdims=True) / np.maximum(length, 1e-12))
    return out.astype(np.float32)


def _check_words(wish: Wish, settings: DiffusionSettings) -> None:
    """DataError for ids where the model reads vectors, vectors where it reads ids, and other vectors than it reads."""
    if wish.embeddings is None:
        if settings.given and len(wish.words):
            raise DataError(
                f"document {wish.name}: words as ids, the model reads vectors of {settings.given} numbers",
                fix="give them as `embeddings`",
            )
        return
    shape = list(wish.embeddings.shape)
    if not settings.given or len(wish.words):
        raise DataError(f"document {wish.name}: embeddings {shape}, the model reads words as ids")
    if len(shape) != 2 or not shape[0] or shape[1] != settings.given:
        raise DataError(
            f"document {wish.name}: embeddings {shape}", why=f"the model reads [words, {settings.given}]"
        )


@torch.no_grad()
def sample(
    model: DiT,
    wishes: Sequence[Wish],
    diffusion: DiffusionSettings,
    settings: SampleSettings | None = None,
) -> list[list[F32]]:
    """Latents [cells, channels] of every target of every wish, in order, made in one pack.

    Raises DataError for settings that make no walk, and for words that the model does not read.
    """
    settings = settings or SampleSettings()
    if settings.steps < 1 or not math.isfinite(settings.guidance):
        raise DataError(f"a walk of {settings.steps} steps with guidance {settings.guidance}")
    for wish in wishes:
        _check_words(wish, diffusion)
    with_words = _Packed(wishes, diffusion, words=True)
    without = _Packed(wishes, diffusion, words=False) if settings.guidance != 1.0 else None

    def velocity(states: list[list[F32]], levels: Sequence[float]) -> list[list[F32]]:
        found = with_words.velocity(model, states, levels)
        if without is None:
            return found
        plain = without.velocity(model, states, levels)
        return [[guided(c, u, settings) for c, u in zip(*pair)] for pair in zip(found, plain)]

    walks, states = [], []
    for wish in wishes:
        targets = [(n, grid) for n, grid in enumerate(wish.grids) if not grid.condition]
        walks.append(schedule(settings.steps, targets[0][1].cells, diffusion.flow))
        states.append(
            [
                noise_of(settings.seed, f"sample/{wish.name}", 0, n, (grid.cells, model.shape.channels))
                for n, grid in targets
            ]
        )
    return walk(velocity, states, walks, solver=settings.solver)


def walk(
    velocity: Callable[[list[list[F32]], Sequence[float]], list[list[F32]]],
    states: list[list[F32]],
    walks: Sequence[Sequence[float]],
    *,
    solver: Solver = "euler",
) -> list[list[F32]]:
    """Solve dx/ds = velocity(x, s) along each document's levels, all of them in step.

    heun: the mean of the slopes at both ends of a step (second order); the last step is Euler's, for s = 0 tells a
    model nothing.
    """
    for at in range(len(walks[0]) - 1):
        here, there = [w[at] for w in walks], [w[at + 1] for w in walks]
        slope = velocity(states, here)
        ahead = _moved(states, slope, here, there)
        if solver == "heun" and at < len(walks[0]) - 2:
            after = velocity(ahead, there)
            slope = [[np.float32(0.5) * (a + b) for a, b in zip(*pair)] for pair in zip(slope, after)]
            ahead = _moved(states, slope, here, there)
        states = ahead
    return states


def _moved(
    states: list[list[F32]], slope: list[list[F32]], here: Sequence[float], there: Sequence[float]
) -> list[list[F32]]:
    return [
        [(x + np.float32(b - a) * v).astype(np.float32) for x, v in zip(xs, vs)]
        for xs, vs, a, b in zip(states, slope, here, there)
    ]
