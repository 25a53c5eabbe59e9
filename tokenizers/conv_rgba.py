"""Learned RGBA codec: the cells of `rgba.py`, with a small convolution before the codes and one after them.

A cell is blank (one control id), opaque (the reserved alpha code, then a colour code) or mixed (alpha codes, then a
colour code), as in the closed form, so alpha 0 and 255 of whole cells are exact whatever was learned.

Inside, a cell is its colour premultiplied by alpha and laid over the cell's own mean colour, and its alpha. What lies
under alpha 0 is gone before the first product, so it can change no id. Both are projected to a few numbers each, a
convolution over the cells around corrects all of them together, and colour and alpha take the nearest codes of their
own books. After decoding a second convolution makes straight colour and alpha of the codes around.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import Tensors, from_patches, pack_codec, pad_to, to_patches, unpack_codec
from ringweave.tokenizers.conv_net import ACTIVATION, EXACT, IntegerNet, Shape
from ringweave.tokenizers.grid import BLANK, MISSING
from ringweave.tokenizers.rgba import OPAQUE
from ringweave.tokenizers.vq import ResidualQuantizer

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
#: Integer steps per unit of the bases: finer than `conv_codec`'s, as flat colours have to come back as they were.
BASIS = 4096
#: Decoded alpha under the first is 0 and over the second 255: codes leave a haze of a few levels.
CLEAR, SOLID = 8, 247
#: Integers of a core's configuration.
FIELDS = (
    "patch", "beam", "steps", "unit", "reach", "width", "encoder_blocks", "decoder_blocks", "rows", "columns",
)  # fmt: skip


def network_shapes(config: dict[str, int], dims: int) -> dict[str, Shape]:
    """The two convolutions by the prefix of their tensors; `dims`: projected numbers of colour and alpha together."""
    pixels = config["patch"] ** 2
    width, rows, columns = config["width"], config["rows"], config["columns"]
    return {
        "encoder.": Shape(dims, width, dims, config["encoder_blocks"], rows, columns),
        "decoder.": Shape(dims, width, 4 * pixels, config["decoder_blocks"], rows, columns),
    }


def still_networks(config: dict[str, int], dims: int) -> Tensors:
    """Weights of both networks that add nothing: the closed form."""
    out: Tensors = {}
    for prefix, shape in network_shapes(config, dims).items():
        for name, inputs, outputs, kernel in shape.layers():
            out[f"{prefix}{name}.weight"] = np.zeros((kernel * inputs, outputs), np.int32)
            out[f"{prefix}{name}.bias"] = np.zeros(outputs, np.int32)
    return out


def premultiplied(cells: NDArray[np.int64]) -> tuple[F64, F64]:
    """Colour and alpha of straight cells [..., p*p, 4], in integers: [..., 3*p*p] and [..., p*p].

    Colour is premultiplied and laid over the cell's alpha-weighted mean colour; 0 where nothing shows.
    """
    rgb, alpha = cells[..., :3], cells[..., 3:]
    light = rgb * alpha
    mean = light.sum(-2, keepdims=True) // np.maximum(alpha.sum(-2, keepdims=True), 1)
    colour = (light + mean * (255 - alpha)) // 255
    return colour.reshape(*cells.shape[:-2], -1).astype(np.float64), alpha[..., 0].astype(np.float64)


class RgbaCore:
    """Straight cells, integers [n, h, w, p*p, 4] <-> codes int32 [n, h, w, books + 1] as in `rgba.RgbaCodec`.

    config: FIELDS, with steps, unit and reach as in `ConvCore`. tensors: for each of colour (C = 3*p*p) and alpha
    (C = p*p) `project_` [C, D] and `back_` [D, C] (in 1/BASIS), `mean_` [C] (levels), `books_` [Q, K, D] (in
    1/`steps`; one book of colour); and those of the two networks, whose numbers are colour's, then alpha's.
    """

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config = {name: int(config[name]) for name in FIELDS}
        steps, unit = self.config["steps"], self.config["unit"]
        if steps & (steps - 1) or unit & (unit - 1) or steps * unit < ACTIVATION:
            raise ValueError(
                f"steps {steps} and unit {unit} are not powers of two with a product of 256 or more"
            )
        self._steps, self._reach = float(steps), float(self.config["reach"]) * steps
        self._ratio = unit * steps / ACTIVATION  # steps of a projected number in one step of an activation
        self._tensors = {
            name: tensors[name].astype(np.float64)
            for name in (f"{part}_{of}" for part in ("project", "back", "mean") for of in ("colour", "alpha"))
        }
        self.pixels = self.config["patch"] ** 2
        _check(tensors, self.pixels)
        self.split = self._tensors["project_colour"].shape[1]  # numbers of colour
        dims = self.split + self._tensors["project_alpha"].shape[1]
        limit = self._reach * np.sqrt(dims)
        self.colour = ResidualQuantizer(tensors["books_colour"], limit=limit)
        self.alpha = ResidualQuantizer(tensors["books_alpha"], beam=config["beam"], limit=limit)
        shapes = network_shapes(self.config, dims)
        self._encoder = IntegerNet(shapes["encoder."], tensors, prefix="encoder.")
        self._decoder = IntegerNet(shapes["decoder."], tensors, prefix="decoder.")
        # What the decoder is told of cells that have no alpha code.
        self.clear = self._numbers(np.zeros((1, self.pixels)), "alpha")[0]
        self.solid = self._numbers(np.full((1, self.pixels), 255.0), "alpha")[0]

    def _numbers(self, values: F64, of: str) -> F64:
        """Projected, in 1/`steps`: integers [..., D]."""
        centred = values - self._tensors[f"mean_{of}"]
        return np.floor(centred @ self._tensors[f"project_{of}"] * (self._steps / BASIS) + 0.5)

    def projected(self, cells: NDArray[np.int64]) -> F64:
        """The numbers of each cell that are quantised, in 1/`steps`: integers [n, h, w, D]."""
        colour, alpha = premultiplied(cells)
        numbers = self._numbers(colour, "colour") * (alpha.max(-1, keepdims=True) > 0)
        z = np.concatenate([numbers, self._numbers(alpha, "alpha")], axis=-1)
        z = z + self._encoder(np.floor(z / self._ratio + 0.5)) * self._ratio
        return np.clip(np.floor(z), -self._reach, self._reach)

    def encode(self, cells: NDArray[np.int64]) -> I32:
        """Codes int32 [n, h, w, books + 1]."""
        alpha = cells[..., 3]
        blank, opaque = alpha.max(-1) == 0, alpha.min(-1) == 255
        mixed = ~(blank | opaque)
        z = self.projected(cells)
        out = np.full((*blank.shape, self.alpha.books + 1), MISSING, np.int32)
        out[mixed, :-1] = self.alpha.encode(z[mixed][:, self.split :])
        out[mixed, 0] += 1
        out[opaque, 0] = OPAQUE
        out[~blank, -1] = self.colour.encode(z[~blank][:, : self.split])[:, 0]
        out[blank] = BLANK
        return out

    def vectors(self, codes: I32) -> F64:
        """What the codes stand for, in 1/`steps`: integers [n, h, w, D]. A missing colour is the mean."""
        flat = codes.reshape(-1, self.alpha.books + 1)
        mixed = flat[:, 0] > OPAQUE
        out = np.zeros((len(flat), self.split + len(self.clear)))
        out[:, self.split :] = np.where((flat[:, :1] == OPAQUE), self.solid, self.clear)
        books = flat[mixed, :-1] - np.eye(1, self.alpha.books, dtype=np.int32)
        out[mixed, self.split :] = self.alpha.decode(books)
        seen = flat[:, 0] >= OPAQUE
        out[seen, : self.split] = self.colour.decode(flat[seen, -1:])
        return out.reshape(*codes.shape[:-1], -1)

    def decode(self, codes: I32) -> tuple[F64, F64]:
        """Straight colour [n, h, w, 3*p*p] and alpha [n, h, w, p*p] in levels, 0 to 255, with fractions.

        Alpha is 255 exactly where the cell is OPAQUE and 0 where it has no first alpha code.
        """
        q = self.vectors(codes)
        more = self._decoder(np.floor(q / self._ratio + 0.5)) * (self.config["unit"] / ACTIVATION)
        scale, named = BASIS * self._steps, self._tensors
        colour = q[..., : self.split] @ named["back_colour"] / scale + named["mean_colour"]
        alpha = q[..., self.split :] @ named["back_alpha"] / scale + named["mean_alpha"]
        colour = np.clip(colour + more[..., : 3 * self.pixels], 0, 255)
        alpha = np.rint(np.clip(alpha + more[..., 3 * self.pixels :], 0, 255))
        alpha = np.where(alpha < CLEAR, 0, np.where(alpha > SOLID, 255, alpha))
        alpha[codes[..., 0] == OPAQUE] = 255
        alpha[codes[..., 0] < 0] = 0
        colour[codes[..., 0] < 0] = 0
        return colour, alpha


def _check(tensors: Tensors, pixels: int) -> None:
    """ValueError unless bases, means and books fit each other and products with them are exact."""
    for of, channels in (("colour", 3 * pixels), ("alpha", pixels)):
        project, books = tensors[f"project_{of}"], tensors[f"books_{of}"]
        dims = project.shape[-1]
        found = [project.shape, tensors[f"back_{of}"].shape, tensors[f"mean_{of}"].shape, books.shape[2:]]
        if found != [(channels, dims), (dims, channels), (channels,), (dims,)]:
            raise ValueError(f"the tensors of {of} do not fit each other: {found}")
        largest = 255.0 + float(np.abs(tensors[f"mean_{of}"].astype(np.float64)).max())
        if largest * float(np.abs(project.astype(np.float64)).sum(0).max()) >= EXACT:
            raise ValueError(f"project_{of} has numbers too large to be exact")
    if tensors["books_colour"].shape[0] != 1:
        raise ValueError("there is one book of colour")


class ConvRgbaCodec:
    """uint8 [..., H, W, 4] <-> cells int32 [..., h, w, books + 1]: alpha codes, then the colour code.

    Blank cells hold BLANK throughout; opaque ones hold OPAQUE, then MISSING for the other alpha books.
    """

    kind = "rgba.conv"

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config, self.tensors = config, tensors
        self.core = RgbaCore(config, tensors)
        self.patch, self.books = config["patch"], self.core.alpha.books
        codes = self.core.alpha.codes
        #: ids of the blocks: first alpha book (with OPAQUE), the other alpha books, colour.
        self.block_sizes = [codes + 1] + [codes] * (self.books - 1) + [self.core.colour.codes]

    def encode(self, layer: U8) -> I32:
        """Cells int32 [..., h, w, books + 1] of uint8 [..., H, W, 4], edge-padded to whole patches."""
        grid = to_patches(pad_to(layer, self.patch), self.patch)
        cells = grid.reshape(-1, *grid.shape[-3:-1], self.patch**2, 4)
        codes = [self.core.encode(cells[n : n + 1].astype(np.int64)) for n in range(len(cells))]
        return np.concatenate(codes).reshape(*grid.shape[:-1], self.books + 1)

    def decode(self, cells: I32) -> U8:
        """Straight-alpha uint8 [..., p*h, p*w, 4]; a cell without its first alpha code is transparent."""
        grids = cells.reshape(-1, *cells.shape[-3:])
        out = np.empty((*grids.shape[:-1], self.patch**2, 4), np.uint8)
        for n in range(len(grids)):
            colour, alpha = self.core.decode(grids[n : n + 1])
            out[n, ..., :3] = np.rint(colour[0]).reshape(*grids.shape[1:-1], -1, 3)
            out[n, ..., 3] = alpha[0]
        return from_patches(out.reshape(*cells.shape[:-1], -1), self.patch, 4)

    def to_bytes(self) -> bytes:
        """The codec file."""
        return pack_codec(self.kind, self.config, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> ConvRgbaCodec:
        """Load `to_bytes`; VocabularyError when it is something else."""
        return cls(*unpack_codec(data, cls.kind, where=where))
