"""What the learned codecs of pictures, pages and sound share: cells to codes and back, all in integers.

A cell is a patch of pixels or a frame of frequencies, a vector of C integers. Encoding projects it to D numbers
(a principal-component basis, or the frequencies themselves), adds what a small convolution over the cells around it
says (`conv_net.py`), and takes the nearest codes (residual, one per book). Decoding sums the codes' vectors, projects
back, and adds what a second convolution over the cells around makes of them. With both convolutions at zero this is
the closed form that training starts from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import Tensors
from ringweave.tokenizers.conv_net import ACTIVATION, IntegerNet, Shape
from ringweave.tokenizers.vq import ResidualQuantizer

#: Integer steps per unit of the basis.
BASIS = 256
F64 = NDArray[np.float64]
#: Integers of a core's configuration.
FIELDS = (
    "books", "codes", "beam", "steps", "unit", "reach", "width", "encoder_blocks", "decoder_blocks", "rows", "columns",
)  # fmt: skip


def encoder_shape(config: dict[str, int], dims: int) -> Shape:
    """The convolution that corrects the D projected numbers of a cell."""
    return Shape(dims, config["width"], dims, config["encoder_blocks"], config["rows"], config["columns"])


def decoder_shape(config: dict[str, int], dims: int, channels: int) -> Shape:
    """The convolution that corrects the C decoded numbers of a cell."""
    return Shape(dims, config["width"], channels, config["decoder_blocks"], config["rows"], config["columns"])


class ConvCore:
    """cells float64 (integers) [n, h, w, C] <-> codes int32 [n, h, w, Q].

    config: FIELDS. A projected number is an integer of 1/`steps` cell units, at most `reach` units; `unit` cell units
    are 1.0 inside the convolutions; `steps` and `unit` are powers of two whose product is 256 or more. tensors:
    project [C, D] and back [D, C] (in 1/BASIS), mean [C] (cell units), codebooks [Q, K, D] (in 1/`steps`), and those
    of the two networks.
    """

    def __init__(self, config: dict[str, int], tensors: Tensors) -> None:
        self.config = {name: int(config[name]) for name in FIELDS}
        self._project = tensors["project"].astype(np.float64)
        self._back = tensors["back"].astype(np.float64)
        self._mean = tensors["mean"].astype(np.float64)
        channels, dims = self._project.shape
        steps, unit = self.config["steps"], self.config["unit"]
        if steps & (steps - 1) or unit & (unit - 1) or steps * unit < ACTIVATION:
            raise ValueError(
                f"steps {steps} and unit {unit} are not powers of two with a product of 256 or more"
            )
        self._steps = float(steps)
        self._reach = float(config["reach"]) * steps
        self.quantizer = ResidualQuantizer(
            tensors["codebooks"], beam=config["beam"], limit=self._reach * np.sqrt(dims)
        )
        self.books, self.codes = self.quantizer.books, self.quantizer.codes
        #: Steps of a projected number in one step of an activation.
        self._ratio = unit * steps / ACTIVATION
        self._encoder = IntegerNet(encoder_shape(config, dims), tensors, prefix="encoder.")
        self._decoder = IntegerNet(decoder_shape(config, dims, channels), tensors, prefix="decoder.")

    @property
    def radius(self) -> int:
        """Columns to either side that the code of a cell depends on."""
        return self._encoder.shape.radius

    def projected(self, cells: F64) -> F64:
        """The D numbers of each cell that are quantised, in 1/`steps`: integers [n, h, w, D]."""
        z = np.floor((cells - self._mean) @ self._project * (self._steps / BASIS) + 0.5)
        z = z + self._encoder(np.floor(z / self._ratio + 0.5)) * self._ratio
        return np.clip(np.floor(z), -self._reach, self._reach)

    def encode(self, cells: F64) -> NDArray[np.int32]:
        """Codes int32 [n, h, w, Q]."""
        z = self.projected(cells)
        return self.quantizer.encode(z.reshape(-1, z.shape[-1])).reshape(*z.shape[:-1], self.books)

    def decode(self, codes: NDArray[np.int32]) -> F64:
        """Cells float64 [n, h, w, C] in units, with fractions; a code of -1 adds nothing."""
        vectors = self.quantizer.decode(codes.reshape(-1, self.books)).reshape(*codes.shape[:-1], -1)
        plain = vectors @ self._back / (BASIS * self._steps) + self._mean
        correction = self._decoder(np.floor(vectors / self._ratio + 0.5))
        return plain + correction * (self.config["unit"] / ACTIVATION)


def zero_networks(config: dict[str, int], dims: int, channels: int) -> dict[str, NDArray[Any]]:
    """Weights of both networks that add nothing: the closed form."""
    out: dict[str, NDArray[Any]] = {}
    shapes = {"encoder.": encoder_shape(config, dims), "decoder.": decoder_shape(config, dims, channels)}
    for prefix, shape in shapes.items():
        for name, inputs, outputs, kernel in shape.layers():
            out[f"{prefix}{name}.weight"] = np.zeros((kernel * inputs, outputs), np.int32)
            out[f"{prefix}{name}.bias"] = np.zeros(outputs, np.int32)
    return out
