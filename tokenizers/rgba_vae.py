"""RGBA autoencoders: from an RGB one to one of four channels, and the losses they are trained with.

Initialisation and losses are those of OmniAlpha (`tasks/vae/convert.py`, `alpha/vae/losses.py`); AlphaVAE and
Qwen-Image-Layered initialise alike. Left out are its perceptual term (LPIPS), as its network has to be downloaded, the
adversarial one (PatchGAN from step 4000 on), and the divergence from the RGB model, nil at its weight of 1e-16.

Pictures are [B, 4, H, W] with colour and alpha in [-1, 1], as the VAE takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringweave.tokenizers.errors import VocabularyError

if TYPE_CHECKING:
    from torch import Tensor

#: Means of a background's red, green and blue, and of their squares, in [-1, 1] (OmniAlpha's, of natural images).
BACKGROUND = (-0.0357, -0.0811, -0.1797)
BACKGROUND_SQUARED = (0.3163, 0.3060, 0.3634)
#: Levels that a channel of an opaque ground is drawn from, of 255.
GROUND_LEVELS = (0.0, 127.5, 255.0)


def from_rgb(vae3: Any) -> Any:
    """An `AutoencoderKLQwenImage` of 4 channels that does to opaque pictures what `vae3` does to their colour.

    The encoder does not see alpha yet, so latents are those of `vae3`; the decoder gives alpha 1 whatever it is given.
    All weights are copies. To fine-tune it, compare what the decoder gives before the class clips it: alpha stands at
    the very edge of the range, and torch gives no gradient there. VocabularyError unless `vae3` takes 3 channels.
    """
    import torch

    given = dict(vae3.config)
    if given.get("input_channels") != 3:
        raise VocabularyError(
            f"a VAE of 3 channels was expected, and this takes {given.get('input_channels')}"
        )
    config = {name: value for name, value in given.items() if not name.startswith("_")}
    with torch.device("meta"):
        vae4 = type(vae3)(**config | {"input_channels": 4})
    tensors = {name: value.detach().clone() for name, value in vae3.state_dict().items()}
    for name, axis, last in (
        ("encoder.conv_in.weight", 1, 0.0),
        ("decoder.conv_out.weight", 0, 0.0),
        ("decoder.conv_out.bias", 0, 1.0),
    ):
        alpha = torch.full_like(tensors[name].narrow(axis, 0, 1), last)
        tensors[name] = torch.cat([tensors[name], alpha], axis)
    vae4.load_state_dict(tensors, assign=True)
    return vae4.train(vae3.training)


def composite_errors(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(d [B, 3, H, W], e [B, 1, H, W]) such that the composites over a background b differ by d - b e.

    With straight colour c and alpha a in [0, 1]: d = c a - c' a', e = a - a'; the found picture is primed.
    """
    ours, theirs = (picture[:, 3:] * 0.5 + 0.5 for picture in (found, wanted))
    return wanted[:, :3] * theirs - found[:, :3] * ours, theirs - ours


def composite_mse(
    d: Tensor,
    e: Tensor,
    *,
    mean: tuple[float, float, float] = BACKGROUND,
    square: tuple[float, float, float] = BACKGROUND_SQUARED,
) -> Tensor:
    """Squared error of the composite, in expectation over random backgrounds: [B, 3, H, W].

    E[(d - b e)^2] = d^2 - 2 E[b] d e + E[b^2] e^2, exactly (AB-MSE). mean, square: E[b] and E[b^2] of each channel.
    """
    first, second = (d.new_tensor(values).reshape(1, 3, 1, 1) for values in (mean, square))
    return d.square() - 2 * first * d * e + second * e.square()


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of each posterior N(mean, exp(logvar)) from N(0, 1): as shaped as `mean`."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


@dataclass(frozen=True)
class VaeLoss:
    """Weights of the terms beside the composite's squared error, which has weight 1.

    absolute: of |d|, the premultiplied colour; alpha: of |e|; kl: of the divergence (OmniAlpha: 0, 0, 1e-6).
    """

    absolute: float = 0.0
    alpha: float = 0.0
    kl: float = 1e-6

    def __call__(self, found: Tensor, wanted: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        """[B]: terms summed over pixels and channels, as their weights have it; all divided by 3 H W.

        found, wanted: [B, 4, H, W]; mean, logvar: of the posterior, [B, Z, h, w].
        """
        d, e = composite_errors(found, wanted)
        total = composite_mse(d, e).sum((1, 2, 3)) + self.kl * divergence(mean, logvar).sum((1, 2, 3))
        if self.absolute:
            total = total + self.absolute * d.abs().sum((1, 2, 3))
        if self.alpha:
            total = total + self.alpha * e.abs().sum((1, 2, 3))
        return total / d[0].numel()


def opaque_some(pixels: NDArray[np.float64], share: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Pictures [n, H, W, 4] of 0..255, about `share` of them laid over a plain colour and so opaque.

    Each channel of a colour is drawn from GROUND_LEVELS (OmniAlpha, with a share of 0.3). What is drawn does not depend
    on what the pictures are.
    """
    chosen = rng.random(len(pixels)) < share
    grounds = np.array(GROUND_LEVELS)[rng.integers(0, len(GROUND_LEVELS), (len(pixels), 3))]
    alpha = pixels[..., 3:] / 255
    flat = pixels[..., :3] * alpha + grounds[:, None, None] * (1 - alpha)
    opaque = np.concatenate([flat, np.full_like(alpha, 255)], -1)
    return np.where(chosen[:, None, None, None], opaque, pixels)
