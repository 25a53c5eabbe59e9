"""Image codecs brought from outside: diffusers' `VQModel`, and taming, LlamaGen and LWM weights through it.

Needs the extra ``outside`` (diffusers). Ids are those of the codec's own class for one picture at a time, in
float32 on one thread (`outside_files.exactly`): whatever the batch, an id depends on its own picture only.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.codec import pad_to
from ringweave.tokenizers.errors import DataError, VocabularyError
from ringweave.tokenizers.outside_files import (
    build,
    check_codes,
    diffusers_config,
    exactly,
    library,
    read_weights,
    to_pixels,
)
from ringweave.tokenizers.outside_layouts import layout_of, modern, to_vqmodel

if TYPE_CHECKING:
    import torch

#: Pixel values a codec was trained on: [-1, 1] or [0, 1].
PIXELS = ("signed", "unit")


class OutsideImage:
    """uint8 [..., H, W, 3] <-> codes int32 [..., ceil(H/p), ceil(W/p)].

    kind: "image." and the layout the weights were in; codes: size of the codebook; patch: pixels a code spans;
    sha256: identity of weights, config and pixel range; model: the frozen `VQModel`.
    """

    def __init__(
        self, model: Any, *, kind: str, sha256: str, pixels: str, unit_codes: bool, device: str
    ) -> None:
        self.model, self.kind, self.sha256, self.pixels, self.device = model, kind, sha256, pixels, device
        self.codes, self.dim = model.quantize.embedding.weight.shape
        self.patch = 2 ** (len(model.config.block_out_channels) - 1)
        self._own = kind != "image.vqmodel"
        self._unit_codes = unit_codes
        model.quantize.legacy = False  # the forward pass is the same; see `trainable`

    @classmethod
    def load(cls, path: Path, *, pixels: str | None = None, device: str = "cpu") -> OutsideImage:
        """Read a folder or .safetensors file (`read_weights`), whichever of the four layouts it is in.

        pixels: "signed" for codecs that see [-1, 1], "unit" for [0, 1]. Left out: [0, 1] for aMUSEd, whose
        config says `lookup_from_codebook`, and [-1, 1] for all others. No file states it, and the wrong one
        gives plausible ids of a washed-out picture.
        """
        weights = read_weights(path)
        layout = layout_of(weights)
        vqmodel = library("diffusers", "VQModel", extra="outside")
        if layout == "vqmodel":
            config, tensors = diffusers_config(weights, vqmodel), modern(weights.tensors)
        else:
            tensors, config = to_vqmodel(weights, layout)
        unit_codes = layout == "llamagen" and bool(weights.config.get("codebook_l2_norm", True))
        if unit_codes:
            book = tensors["quantize.embedding.weight"]
            tensors = tensors | {"quantize.embedding.weight": _unit(book)}
        pixels = pixels or ("unit" if config.get("lookup_from_codebook") else "signed")
        if pixels not in PIXELS:
            raise VocabularyError(f"pixels must be one of {PIXELS}, got {pixels!r}", where=weights.where)
        model = build(lambda: vqmodel(**config), tensors, where=weights.where, device=device)
        if model.config.in_channels != 3 or model.config.out_channels != 3:
            raise VocabularyError(
                f"the codec takes {model.config.in_channels} channels, not 3", where=weights.where
            )
        kind = f"image.{layout}"
        sha = weights.identity(kind, {"pixels": pixels})
        return cls(model, kind=kind, sha256=sha, pixels=pixels, unit_codes=unit_codes, device=device)

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Codes int32 [..., h, w] of uint8 [..., H, W, 3], edge-padded to whole patches."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3 or 0 in images.shape:
            raise DataError(f"pictures must be uint8 [.., H, W, 3], got {images.dtype} {list(images.shape)}")
        padded = pad_to(images, self.patch)
        lead, (height, width) = padded.shape[:-3], (n // self.patch for n in padded.shape[-3:-1])
        out = np.empty((math.prod(lead), height, width), np.int32)
        with exactly(self.device):
            for number, picture in enumerate(padded.reshape(-1, *padded.shape[-3:])):
                out[number] = self._encode_one(picture).reshape(height, width)
        return out.reshape(*lead, height, width)

    def _encode_one(self, picture: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Codes [h*w] of one picture [H, W, 3]."""
        import torch

        values = torch.tensor(picture).to(self.device).float()
        values = values / 255 if self.pixels == "unit" else values / 127.5 - 1
        latents = self.model.encode(values.movedim(-1, 0)[None]).latents
        if str(latents.dtype) != "torch.float32" or not latents.isfinite().all():
            raise DataError("the encoder gave values that are not finite float32", where=self.kind)
        if self._own:
            ids = self._nearest(latents[0].movedim(0, -1).reshape(-1, self.dim))
        else:
            ids = self.model.quantize(latents)[2][2]
        return ids.reshape(-1).cpu().numpy().astype(np.int32)

    def _nearest(self, points: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code by |z|^2 + |e|^2 - 2 z.e, as taming, LlamaGen and LWM write it: [n]."""
        book = self.model.quantize.embedding.weight
        if self._unit_codes:
            points = _unit(points)
        distance = (points**2).sum(1, keepdim=True) + (book**2).sum(1) - 2 * (points @ book.T)
        return distance.argmin(1)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """uint8 [..., p*h, p*w, 3] of codes [..., h, w]; -1 (missing) decodes as the mean of the codebook.

        DataError unless the codes are integers of the codebook: ids that went through floats come back wrong.
        """
        import torch

        codes = np.asarray(codes)
        whole = check_codes(codes, self.codes, what=self.kind, dims=2)
        lead, (height, width) = whole.shape[:-2], whole.shape[-2:]
        out = np.empty((math.prod(lead), height * self.patch, width * self.patch, 3), np.uint8)
        book = self.model.quantize.embedding.weight
        with exactly(self.device):
            rows = torch.cat([book, book.mean(0, keepdim=True)])
            for number, grid in enumerate(whole.reshape(-1, height, width)):
                points = rows[torch.from_numpy(grid).to(self.device)]  # -1 is the last row
                out[number] = self._decode_one(points.movedim(-1, 0)[None])
        return out.reshape(*lead, *out.shape[1:])

    def _decode_one(self, points: torch.Tensor) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] of code vectors [1, D, h, w]."""
        spatial = points if self.model.config.norm_type == "spatial" else None
        values = self.model.decoder(self.model.post_quant_conv(points), spatial)[0].movedim(0, -1)
        scaled = values * 255 if self.pixels == "unit" else (values + 1) * 127.5
        return to_pixels(scaled, what=self.kind)

    def trainable(self) -> Any:
        """A copy of the `VQModel` to fine-tune, its commitment weight on the commitment term.

        diffusers and taming weight the codebook term by beta and the commitment term by one unless told
        otherwise ("legacy"); with that, fine-tuning drags the encoder to the codes four times as hard as meant.
        """
        model = copy.deepcopy(self.model).requires_grad_(True).train()
        refuse_legacy(model, where=self.kind)
        return model


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of [n, D] at length 1."""
    from torch.nn.functional import normalize

    return normalize(vectors, dim=-1)


def refuse_legacy(model: torch.nn.Module, *, where: str) -> None:
    """VocabularyError when a quantiser inside `model` still has the commitment weight on the wrong term."""
    for name, module in model.named_modules():
        if getattr(module, "legacy", False):
            raise VocabularyError(
                f"the quantiser {name or 'itself'} weights the wrong loss term (legacy=True)",
                where=where,
                fix="set its `legacy` to False before training; ids do not change",
            )
