"""Training of the learned RGBA codec: `learn.Training` with two sets of books and losses on composites.

What the decoder makes is laid over black, white and a colour drawn for each cell, and compared there; alpha is compared
by itself too. Blank cells weigh nothing; opaque ones have no alpha to learn.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.conv_rgba import BASIS, RgbaCore, network_shapes, premultiplied
from ringweave.tokenizers.learn import Coded, Training
from ringweave.tokenizers.learn_core import Net, fixed_point

#: Share of the gradient that a value out of its range still gets: none would leave it there for ever.
LEAK = 0.05


class LearnedRgba(nn.Module):
    """An `RgbaCore` that learns. Numbers inside are in `unit`s; a cell's are those of colour, then of alpha."""

    def __init__(self, config: dict[str, int], tensors: Tensors, *, seed: int) -> None:
        super().__init__()
        self.config, self.unit = config, float(config["unit"])
        generator = torch.Generator().manual_seed(seed)
        for of in ("colour", "alpha"):
            for part, scale in (
                ("project", BASIS), ("back", BASIS), ("books", config["steps"] * self.unit), ("mean", self.unit),
            ):  # fmt: skip
                values = torch.tensor(tensors[f"{part}_{of}"] / scale, dtype=torch.float32)
                if part == "mean":
                    self.register_buffer(f"{part}_{of}", values)
                else:
                    self.register_parameter(f"{part}_{of}", nn.Parameter(values))
        self.split = self.project_colour.shape[1]
        self.pixels = config["patch"] ** 2
        shapes = network_shapes(config, self.split + self.project_alpha.shape[1])
        self.encoder = Net(shapes["encoder."], generator)
        self.decoder = Net(shapes["decoder."], generator)

    def encode(self, colour: Tensor, alpha: Tensor) -> Tensor:
        """Premultiplied colour over the mean [n, h, w, 3*p*p] and alpha [n, h, w, p*p] -> [n, h, w, D]."""
        numbers = (colour - self.mean_colour) @ self.project_colour
        numbers = numbers * (alpha.amax(-1, keepdim=True) > 0)
        z = torch.cat([numbers, (alpha - self.mean_alpha) @ self.project_alpha], -1)
        return z + self.encoder(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def plain_alpha(self, level: float) -> Tensor:
        """The numbers of a cell whose alpha is `level` (0 to 255) throughout: [D of alpha]."""
        return (level / self.unit - self.mean_alpha) @ self.project_alpha

    def decode(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of code vectors [n, h, w, D] -> straight colour and alpha of 0 to 1, not yet clipped."""
        more = self.decoder(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        colour = q[..., : self.split] @ self.back_colour + self.mean_colour + more[..., : 3 * self.pixels]
        alpha = q[..., self.split :] @ self.back_alpha + self.mean_alpha + more[..., 3 * self.pixels :]
        return colour * (self.unit / 255), alpha * (self.unit / 255)

    def rounded(self) -> Tensors:
        """Tensors of the `RgbaCore` these weights make."""
        scales = {
            "project": BASIS,
            "back": BASIS,
            "books": self.config["steps"] * self.unit,
            "mean": self.unit,
        }
        out = {
            f"{part}_{of}": fixed_point(getattr(self, f"{part}_{of}"), scale)
            for of in ("colour", "alpha")
            for part, scale in scales.items()
        }
        return out | self.encoder.rounded("encoder.") | self.decoder.rounded("decoder.")


class RgbaTraining(Training):
    """`learn.Training` of an `RgbaCore`. Cells of its crops are straight RGBA, then a background colour (RGB)."""

    learner = LearnedRgba
    integer = RgbaCore
    books = ("books_colour", "books_alpha")

    def _cells(self, x: Tensor) -> NDArray[np.int64]:
        """Straight cells [n, h, w, p*p, 4] of a batch."""
        whole = np.rint(x[..., :-3].double().numpy() * self.config["unit"]).astype(np.int64)
        return whole.reshape(*whole.shape[:-1], -1, 4)

    def _joint_terms(self, x: Tensor, weights: Tensor) -> tuple[list[Tensor], list[Coded]]:
        core, split, unit = self.core, self.core.split, self.core.unit
        cells = self._cells(x)
        colour, alpha = (torch.tensor(part / unit, dtype=torch.float32) for part in premultiplied(cells))
        z = core.encode(colour, alpha)
        opaque = torch.tensor(cells[..., 3].min(-1) == 255)
        seen = torch.tensor(cells[..., 3].max(-1) > 0) & (weights > 0)
        mixed = seen & ~opaque
        # A colour that shows little is worth little: its pull goes with the square of the cell's alpha.
        cover = (alpha * (unit / 255)).pow(2).mean(-1)
        q_colour = torch.zeros_like(z[..., :split])
        q_alpha = torch.where(opaque[..., None], core.plain_alpha(255.0), core.plain_alpha(0.0))
        coded, pulls = [], []
        for name, q, part, where, share, size in (
            ("books_colour", q_colour, z[..., :split], seen, cover, 3 * core.pixels),
            ("books_alpha", q_alpha, z[..., split:], mixed, torch.ones_like(cover), core.pixels),
        ):
            codes, total, pull = self._pull(part[where], getattr(core, name), share[where])
            q[where] = total
            pulls.append(pull / size)
            coded.append(Coded(name, part[where].detach(), codes))
        return [self._misses(torch.cat([q_colour, q_alpha], -1), x, weights), *pulls], coded

    def _pull(self, z: Tensor, books: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [m, Q] of z [m, D], their summed vectors with the gradient of z, and what draws both together."""
        rest, codes, pull = z, [], z.new_zeros(())
        for book in books:
            codes.append(((book * book).sum(1) - 2 * rest @ book.T).argmin(1))
            chosen = book[codes[-1]]
            to_book = (chosen - rest.detach()).pow(2).sum(1)
            to_code = (rest - chosen.detach()).pow(2).sum(1)
            pull = pull + ((to_book + self.schedule.commit * to_code) * share).sum()
            rest = rest - chosen.detach()
        return torch.stack(codes, 1), z - rest.detach(), pull

    def _decoder_terms(self, x: Tensor, weights: Tensor) -> Tensor:
        """Codes by the finished integer encoder, and the decoder's misses."""
        finished = self.finished()
        vectors = finished.vectors(finished.encode(self._cells(x)))
        q = torch.tensor(vectors / (self.config["steps"] * self.core.unit), dtype=torch.float32)
        return self._misses(q, x, weights)

    def _misses(self, q: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """What is missed over black, white and the cell's own background, and in alpha."""
        colour, alpha = (_into_range(part) for part in self.core.decode(q))
        straight = (x[..., :-3] * (self.core.unit / 255)).reshape(*x.shape[:-1], -1, 4)
        wanted = straight[..., 3]
        alpha = torch.where(wanted.amin(-1, keepdim=True) > 254.5 / 255, wanted, alpha)  # never coded
        colour = colour.reshape(straight[..., :3].shape)
        # Over a background b the error is `light + b * shade`.
        light = colour * alpha[..., None] - straight[..., :3] * wanted[..., None]
        shade = (wanted - alpha)[..., None]
        own = x[..., None, -3:] * (self.core.unit / 255)
        errors = [light, light + shade, light + own * shade, shade]
        parts = [e.pow(2).mean((-1, -2)) + self.schedule.absolute * e.abs().mean((-1, -2)) for e in errors]
        return (torch.stack(parts).sum(0) * weights).sum() * (255 / self.core.unit) ** 2 / 4


def _into_range(values: Tensor) -> Tensor:
    """Clipped to 0..1, with a little gradient beyond."""
    return values.clamp(0, 1).lerp(values, LEAK)
